"""A plain SIGTERM: save, exit 75; the same command goes on and ends with the same bits."""

import json
import signal

import pytest
from conftest import HARD

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
    assert "Stopped on request at step" in out
    assert "Traceback" not in err
    ended = attempt(command.folder / "runs/b", 1)
    assert ended["outcome"] == "preempted"
    assert ended["signal"] == signal.SIGTERM
    kept = list((command.folder / "runs/b/checkpoints").iterdir())
    assert [folder.name for folder in kept] == [f"step-{ended['step']:08d}.0001"]


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_stop_leaves_no_trace_in_the_result(command, ranks, rank):
    arguments = [*FRAGILE, f"launch.nproc={ranks}"]
    assert command(*arguments, "name=a").returncode == 0
    stopped = command(*arguments, "name=b", TERM_AT=f"{rank}:13")
    assert stopped.returncode == 75, stopped.stderr
    assert command(*arguments, "name=b").returncode == 0
    runs = command.folder / "runs"
    assert differences(str(runs / "a"), str(runs / "b")) == []


def test_under_torchrun_a_preempted_rank_exits_0_so_that_the_agent_does_not_restart_it(command):
    launcher = ["--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "trainer.run"]
    stopped = command(*launcher, *FRAGILE, "name=a", module="torch.distributed.run", TERM_AT="1:13")
    assert stopped.returncode == 0, stopped.stderr
    assert attempt(command.folder / "runs/a", 1)["outcome"] == "preempted"
    assert not (command.folder / "runs/a/attempts/0002.json").exists()
