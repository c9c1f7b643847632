"""Two live jobs on one run: the newest attempt owns it, the older one exits with 76."""

import json
import re

import pytest
from support.run_commands import HARD, committed

from scripts.compare_runs import differences

ARGUMENTS = [*HARD, "task._target_=mine.task.Fragile"]


def steps_of(run):
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_older_job_exits_with_76_and_the_result_is_unchanged(command, wait_for):
    assert command(*ARGUMENTS, "name=a").returncode == 0
    run = command.folder / "runs/b"
    older = command.start(*ARGUMENTS, "name=b", PAUSE_AT="0:17")
    paused = command.folder / "paused"
    wait_for(paused.exists, older)
    before = committed(run)  # a save may still be running during the pause
    newer = command(*ARGUMENTS, "name=b")
    assert newer.returncode == 0, newer.stderr
    resumed_from = re.search(r"resuming from step (\d+);", newer.stdout)
    assert resumed_from, newer.stdout
    assert before[-1] <= int(resumed_from[1]) <= 17
    paused.unlink()
    out, err = older.communicate(timeout=120)
    assert older.returncode == 76, (out, err)
    assert "superseded" in err
    assert "attempt 2 was started" in err
    assert "Traceback" not in err
    assert differences(str(command.folder / "runs/a"), str(run)) == []
    assert steps_of(run) == list(range(1, 41))
    assert command(*ARGUMENTS, "name=b").returncode == 0  # already finished
