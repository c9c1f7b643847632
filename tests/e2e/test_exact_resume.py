"""A run killed anywhere ends with the same bits as one that was never killed."""

import json

import pytest
from support.run_commands import HARD

from scripts.compare_runs import differences

# One save before the kill: it starts at its step, since no earlier save can still be in flight.
FRAGILE = [*HARD, "task._target_=mine.task.Fragile", "checkpoint.every_steps=10"]


@pytest.mark.parametrize(("ranks", "extra"), [
    (1, ["trainer.accumulate=2"]),
    (2, []),
    # Two ranks give the same sum in either order; DDP's bucket order matters from three on.
    pytest.param(3, [], marks=pytest.mark.slow),
    pytest.param(
        3, ["parallel.static_graph=true", "parallel.bucket_cap_mb=0.01"], marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_run_killed_within_an_epoch_ends_with_identical_results(command, ranks, extra):
    arguments = [*FRAGILE, f"launch.nproc={ranks}", *extra]
    undisturbed = command(*arguments, "name=a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    # Forward passes before the first step: the warm-up of DDP from three ranks on.
    before = 2 if ranks > 2 else 0
    passes = 2 if "trainer.accumulate=2" in extra else 1
    rank = ranks - 1
    killed = command(
        *arguments,
        "name=b",
        DIE_AT=f"{rank}:{before + passes * 13}",
        DIE_AFTER="runs/b/checkpoints/step-00000010.*/manifest.json",  # it is written meanwhile
    )
    assert killed.returncode != 0
    assert "Traceback" not in killed.stderr
    if ranks > 1:
        assert f"rank {rank} " in killed.stderr
        assert "was killed by SIGKILL" in killed.stderr
    last = command(*arguments, "name=b")
    assert last.returncode == 0, last.stderr
    assert "resuming from step 10; 30 steps left" in last.stdout
    runs = command.folder / "runs"
    assert differences(str(runs / "a"), str(runs / "b")) == []


@pytest.mark.slow
def test_differences_detects_another_seed(command):
    """The oracle above can fail: another seed gives other bits."""
    short = [*HARD, "trainer.max_steps=3"]
    assert command(*short, "name=a").returncode == 0
    assert command(*short, "name=b", "seed=1").returncode == 0
    runs = command.folder / "runs"
    changes = differences(str(runs / "a"), str(runs / "b"))
    assert "tensor model.conv1.weight" in changes


@pytest.mark.slow
def test_run_killed_twice_logs_every_step_once(command):
    arguments = [*FRAGILE, "name=a"]
    assert "Traceback" not in command(*arguments, DIE_AT="0:13").stderr
    assert "Traceback" not in command(*arguments, DIE_AT="0:9").stderr
    assert command(*arguments).returncode == 0
    lines = (command.folder / "runs/a/metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert [line["step"] for line in parsed if line["split"] == "train"] == list(range(1, 41))
    evaluated = [line["step"] for line in parsed if line["split"] == "eval"]
    assert evaluated == [7, 14, 20, 21, 28, 35, 40]


@pytest.mark.slow
def test_another_number_of_ranks_keeps_the_sample_order_and_warns(command):
    assert command(*FRAGILE, "name=a", "launch.nproc=2", "trainer.max_steps=10").returncode == 0
    more = command(*FRAGILE, "name=a", "launch.nproc=1")
    assert more.returncode == 0, more.stderr
    assert "resuming from step 10; 30 steps left" in more.stdout
    assert "not bit-exact from here on, because of world_size 2 -> 1" in more.stdout
