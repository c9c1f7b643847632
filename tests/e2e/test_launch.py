"""Launch forms: one process, local ranks, torchrun on one node and on two; the same training."""

import json
import re
import socket
import subprocess
import sys

import pytest
from support.run_commands import HARD

from scripts.compare_runs import differences

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]
SHORT = [*FRAGILE, "trainer.max_steps=8"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_give_identical_results_in_every_launch_form(command):
    assert command(*SHORT, "name=local", "launch.nproc=2").returncode == 0
    one_node = command(
        "--standalone", "--nproc-per-node=2", "-m", "trainer.run", *SHORT, "name=one",
        module="torch.distributed.run",
    )  # fmt: skip
    assert one_node.returncode == 0, one_node.stderr
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                f"--node-rank={node}", "--rdzv-backend=static",
                "--master-addr=127.0.0.1", f"--master-port={port}",
                "-m", "trainer.run", *SHORT, "name=two",
            ],
            cwd=command.folder, env=command.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    runs = command.folder / "runs"
    assert differences(str(runs / "local"), str(runs / "one")) == []
    assert differences(str(runs / "local"), str(runs / "two")) == []


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nproc_by_hand_wins_in_an_interactive_slurm_shell(command, ranks):
    shell = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip
    done = command(*SHORT, "name=a", f"launch.nproc={ranks}", **shell)
    assert done.returncode == 0, done.stderr
    record = json.loads((command.folder / "runs/a/attempts/0001.json").read_text())
    assert record["world_size"] == ranks


def test_nodes_without_a_shared_run_directory_are_rejected(command, tmp_path):
    port = free_port()
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    nodes = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        facts = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer.run", *SHORT, "name=a"],
                cwd=folder,
                env={**command.env, **facts, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    errors = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], errors
    assert "but all nodes need the same" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert [list(folder.rglob("*.json")) for folder in folders] == [[], []]


def test_failing_rank_is_reported_once_and_stops_the_others(command):
    failed = command(*SHORT, "name=a", "launch.nproc=3", FAIL_AT="1:5")
    assert failed.returncode == 1
    output = failed.stdout + failed.stderr
    assert output.count("ZeroDivisionError: a bug in the user's own code") == 1
    assert output.count("Traceback") == 1
    assert "rank 1 failed" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["trainer.freeze=[nothing.*]", "checkpoint.metric=acuracy"])
def test_config_error_after_the_start_exits_with_2(command, mistake):
    arguments = (*SHORT, "trainer.eval_every_steps=2", mistake)
    codes = [command(*arguments, f"launch.nproc={count}") for count in (1, 2)]
    assert [done.returncode for done in codes] == [2, 2]
    for done in codes:
        setting = re.escape(mistake.split("=")[0])
        messages = re.findall(rf"^error: {setting}", done.stderr, re.MULTILINE)
        assert len(messages) == 1, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_output_of_other_ranks_is_in_the_run_directory(command):
    assert command(*SHORT, "name=a", "launch.nproc=2").returncode == 0
    logs = sorted(path.name for path in (command.folder / "runs/a/logs").rglob("*.log"))
    assert "stderr.log" in logs


def test_bug_in_one_process_prints_its_traceback(command):
    failed = command(*SHORT, "name=a", FAIL_AT="0:3")
    assert failed.returncode == 1
    assert failed.stderr.count("ZeroDivisionError: a bug in the user's own code") == 1
    assert 'task.py"' in failed.stderr


@pytest.mark.slow
def test_ranks_with_different_configurations_are_rejected(command):
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.run", *SHORT, "name=a", f"optimizer.lr={lr}"],
            cwd=command.folder,
            env={
                **command.env, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, lr in enumerate((0.1, 0.2))
    ]  # fmt: skip
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], errors
    assert "ranks 0 and 1 have different configurations" in errors[0]
    assert errors[1] == ""
