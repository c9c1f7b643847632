"""A run with a mirror: a disk that may be lost, and a slower second store."""

import shutil
import socket

import pytest
from support.run_commands import HARD, committed, in_folder

from scripts.compare_runs import differences

# One save before the kill: it starts at its step, since no earlier save can still be in flight.
FRAGILE = [*HARD, "task._target_=mine.task.Fragile", "checkpoint.every_steps=10"]


@pytest.fixture
def full(command):
    """Return the directory of an uninterrupted run."""
    assert command(*FRAGILE, "name=full").returncode == 0
    return str(command.folder / "runs/full")


def begin(command, *arguments, **env):
    """Kill the run after step 13, once step 10 is in the mirror."""
    killed = command(
        *FRAGILE, "name=a", "checkpoint.mirror=mirror/a", *arguments,
        DIE_AT="0:13", DIE_AFTER="mirror/a/checkpoints/step-00000010.*/manifest.json", **env,
    )  # fmt: skip
    assert killed.returncode in (-9, 75), killed.stderr
    return command.folder / "runs/a", command.folder / "mirror/a"


def same(run, full):
    return differences(str(run), full) == [] and (run / "metrics.jsonl").exists()


def steps_of(run):
    import json

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_loss_of_either_store_loses_nothing(command, full):
    run, mirror = begin(command)
    shutil.rmtree(run)
    stopped = command(*FRAGILE, "name=a", "checkpoint.mirror=mirror/a", TERM_AT="0:9")
    assert stopped.returncode == 75, stopped.stderr
    assert "resuming from step 10 of mirror/a" in stopped.stdout
    newest = committed(run)[-1]
    assert committed(mirror)[-1] == newest  # also the last save
    shutil.rmtree(mirror)
    done = command(*FRAGILE, "name=a", "checkpoint.mirror=mirror/a")
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {newest}; " in done.stdout
    for folder in (run, mirror):
        assert same(folder, full)
        assert steps_of(folder) == list(range(1, 41))
        assert len(committed(folder)) == 2
        assert len(list(folder.glob("attempts/????.json"))) == 3


@pytest.mark.slow
def test_restart_copies_the_end_of_a_run_to_its_mirror(command):
    arguments = [*FRAGILE, "name=a", "trainer.max_steps=9"]
    assert command(*arguments).returncode == 0
    again = command(*arguments, "checkpoint.mirror=mirror/a")
    assert again.returncode == 0, again.stderr
    assert committed(command.folder / "mirror/a") == [9]
    assert steps_of(command.folder / "mirror/a") == list(range(1, 10))
    assert "is finished" in command(*arguments, "checkpoint.mirror=mirror/a").stdout


@pytest.mark.slow
def test_damaged_checkpoint_is_read_from_the_mirror(command, full):
    run, _ = begin(command)
    shard = next(run.glob("checkpoints/step-00000010.*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    done = command(*FRAGILE, "name=a", "checkpoint.mirror=mirror/a")
    assert done.returncode == 0, done.stderr
    assert "damaged checkpoint" in done.stdout
    assert "Trying its copy" in done.stdout
    assert "resuming from step 10 of mirror/a" in done.stdout
    assert same(run, full)


def nodes(folder):
    """Two folders, each the working directory of a node, with its own run_dir."""
    return [in_folder(folder / name) for name in ("node0", "node1")]


def run_on(nodes, *arguments, **env):
    """Run torchrun on both nodes until both end; return rank 0's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        node.start(
            "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
            "--master-addr=127.0.0.1", f"--master-port={port}",
            "-m", "trainer.run", *FRAGILE, "name=a", *arguments,
            module="torch.distributed.run", OMP_NUM_THREADS="1", **env,
        )
        for rank, node in enumerate(nodes)
    ]  # fmt: skip
    out = [process.communicate(timeout=240) for process in started]
    return started[0].returncode, "".join(out[0])


@pytest.mark.slow
def test_nodes_with_local_disks_resume_after_swap_and_loss(command, tmp_path):
    assert command(*FRAGILE, "name=full", "launch.nproc=2").returncode == 0
    first = nodes(tmp_path)
    mirror = tmp_path / "mirror/a"
    _, output = run_on(first, f"checkpoint.mirror={mirror}", TERM_AT="1:13")
    newest = committed(mirror)[-1]
    assert f"Stopped by SIGTERM at step {newest}; newest checkpoint: step {newest}." in output
    steps = committed(first[0].folder / "runs/a")
    assert (len(steps), steps[-1]) == (2, newest)
    assert committed(first[1].folder / "runs/a") == []  # it has shards but no manifest
    shards = [p.name for p in first[1].folder.glob("runs/a/checkpoints/*/*.safetensors")]
    assert len(shards) == 2
    assert all(name.startswith("r00001-of-00002-") for name in shards)
    swapped = [first[1], in_folder(tmp_path / "fresh")]
    code, output = run_on(swapped, f"checkpoint.mirror={mirror}")
    assert code == 0, output
    assert f"resuming from step {newest} of {mirror}; " in output
    assert differences(str(mirror), str(command.folder / "runs/full")) == []
    assert steps_of(swapped[0].folder / "runs/a") == list(range(1, 41))


@pytest.mark.slow
def test_nodes_with_local_disks_and_no_mirror_are_rejected_with_alternatives(tmp_path):
    code, output = run_on(nodes(tmp_path))
    assert code != 0
    assert "but all nodes need the same" in output
    assert "checkpoint.mirror=s3://bucket/name" in output


def test_mirror_inside_the_run_is_rejected(command):
    done = command(*HARD, "name=a", "checkpoint.mirror=runs/a/copy")
    assert done.returncode == 2
    assert "checkpoint.mirror" in done.stderr
    assert "are nested" in done.stderr
