"""SIGTERM: save and exit with 75; the same command continues with identical results."""

import json
import signal
import time
from pathlib import Path

import pytest
from support.run_commands import HARD

from scripts.compare_runs import differences

FRAGILE = [*HARD, "task._target_=mine.task.Fragile"]


def attempt(folder, number):
    return json.loads((folder / f"attempts/{number:04d}.json").read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_to_the_command_saves_and_exits_75(command, wait_for, ranks):
    arguments = [*FRAGILE, f"launch.nproc={ranks}", "checkpoint.every_steps=null"]
    arguments += ["checkpoint.every_epochs=null"]
    assert command(*arguments, "name=a").returncode == 0
    endless = [*arguments, "name=b", "trainer.max_epochs=4000"]
    process = command.start(*endless)
    metrics = command.folder / "runs/b/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    assert "Stopped by SIGTERM at step" in out
    assert "Traceback" not in err
    ended = attempt(command.folder / "runs/b", 1)
    assert ended["outcome"] == "preempted"
    assert ended["reason"] == "SIGTERM"
    folders = list((command.folder / "runs/b/checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step-{ended['last_step']:08d}.0001"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_preempted_run_ends_with_identical_results(command, ranks, rank):
    arguments = [*FRAGILE, f"launch.nproc={ranks}"]
    assert command(*arguments, "name=a").returncode == 0
    stopped = command(*arguments, "name=b", TERM_AT=f"{rank}:13")
    assert stopped.returncode == 75, stopped.stderr
    assert command(*arguments, "name=b").returncode == 0
    runs = command.folder / "runs"
    assert differences(str(runs / "a"), str(runs / "b")) == []


@pytest.mark.slow
def test_attempts_shorter_than_an_evaluation_take_steps(command):
    arguments = [*FRAGILE, "name=a", "checkpoint.every_steps=null", "checkpoint.every_epochs=null"]
    steps = []
    for number in range(1, 5):
        stopped = command(*arguments, SIGNAL_IN_EVALUATION="SIGTERM")
        assert stopped.returncode == 75, stopped.stderr
        steps.append(attempt(command.folder / "runs/a", number)["last_step"])
        has_warning = "the evaluation of step 7 is left out" in stopped.stdout
        assert has_warning == (number == 3)
    assert steps == [7, 7, 14, 14]


@pytest.mark.slow
def test_preempted_rank_under_torchrun_exits_with_0(command):
    launcher = ["--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "trainer.run"]
    stopped = command(*launcher, *FRAGILE, "name=a", module="torch.distributed.run", TERM_AT="1:13")
    assert stopped.returncode == 0, stopped.stderr
    assert attempt(command.folder / "runs/a", 1)["outcome"] == "preempted"
    assert not (command.folder / "runs/a/attempts/0002.json").exists()


@pytest.mark.slow
def test_killed_launcher_ends_its_ranks_and_the_run_can_resume(command, wait_for):
    arguments = [*FRAGILE, "launch.nproc=2", "name=a"]
    process = command.start(*arguments, "trainer.max_epochs=4000")
    metrics = command.folder / "runs/a/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 9, process)
    rank_0 = attempt(command.folder / "runs/a", 1)["pid"]
    process.kill()
    process.communicate(timeout=60)
    assert ends(rank_0)
    went_on = command(*arguments)
    assert went_on.returncode == 0, went_on.stderr


def ends(pid):
    """Wait until another process has ended, for a bounded time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
