"""Goodput and run condition, computed from attempt records."""

from datetime import UTC, datetime

import pytest

from trainer.checkpoint import attempts


def record(number, outcome="error", **more):
    fields = {"attempt": number, "host": "n1", "started": f"12:0{number}", **more}
    return {**fields, "outcome": outcome} if outcome else fields


def test_goodput_counts_repeated_steps():
    records = [
        record(1, "preempted", first_step=0, last_step=10, starting_s=2.0, training_s=10.0),
        record(2, None, first_step=10, last_step=17, starting_s=3.0, training_s=7.0),  # saved 12
        record(3, None),  # killed before its first step
        record(4, "done", first_step=12, last_step=20, starting_s=1.0, training_s=8.0),
    ]
    result = attempts.goodput(records, 20)
    assert (result.useful_steps, result.all_steps) == (20, 25)
    assert result.fraction == 0.8
    assert (result.attempts, result.preempted) == (4, 1)
    assert (result.starting_s, result.training_s) == (6.0, 25.0)
    assert str(result) == (
        "4 attempts (1 preempted): 80.0 % of 25 steps were useful, 5 were repeated; 6 s of "
        "startup, 25 s of training"
    )


def test_goodput_of_killed_attempt_uses_its_last_checkpoint():
    records = [
        record(1, None, first_step=0, last_step=155),
        record(2, None, first_step=200, last_step=340, resumed_from={"step": 200, "attempt": 1}),
        record(3, None, first_step=300, resumed_from={"step": 300, "attempt": 2}),
    ]
    result = attempts.goodput(records, 400)
    assert (result.useful_steps, result.all_steps) == (400, 200 + 140 + 100)


def test_goodput_ignores_damaged_record():
    damaged = record(1, None, first_step=None, last_step="x", starting_s=10**400, training_s=None)
    good = record(2, "done", first_step=0, last_step=9, training_s=1.5)
    result = attempts.goodput([damaged, good], 9)
    assert (result.all_steps, result.starting_s, result.training_s) == (9, 0.0, 1.5)


def test_goodput_of_fork_starts_at_its_first_step():
    result = attempts.goodput([record(1, "done", first_step=100, last_step=130)], 130)
    assert (result.useful_steps, result.all_steps) == (30, 30)


def test_goodput_without_records_is_zero():
    assert attempts.goodput([], 0).fraction == 0.0


# --- condition of a run, from its files ----------------------------------------------------------


def at(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@pytest.mark.parametrize(("more", "heard_s", "state", "since_s"), [
    ({"ended": at(500), "outcome": "done"}, 990, "finished", 500),
    ({"ended": at(500), "outcome": "preempted"}, None, "stopped", 500),
    ({"ended": at(500), "outcome": "error"}, None, "died", 500),
    ({"ended": at(500)}, None, "died", 500),
    ({"told": at(950), "first_step": 0}, None, "running", 950),
    ({"told": at(900), "first_step": 0}, 995, "running", 995),
    ({"told": at(900), "first_step": 0}, 905, "silent", 905),
    ({"started": at(950)}, None, "starting", 950),
    ({"started": "yesterday"}, None, "silent", None),
])  # fmt: skip
def test_condition_follows_newest_record(more, heard_s, state, since_s):
    record = {"attempt": 1, "started": at(800), **more}
    result = attempts.condition(record, last_activity_s=heard_s, now_s=1000)
    assert (result.state, result.since_s) == (state, since_s)


def test_condition_without_record_is_unknown():
    assert attempts.condition(None, last_activity_s=3.0, now_s=1000).state == "unknown"
