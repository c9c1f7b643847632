"""What the records of attempts say together."""

from datetime import UTC, datetime

import pytest

from trainer.checkpoint import attempts
from trainer.errors import NEVER_REQUEUE, CrashLoopError


def record(number, outcome="error", **more):
    found = {"attempt": number, "host": "n1", "started": f"12:0{number}", **more}
    return {**found, "outcome": outcome} if outcome else found


def refuse(records, saved_by=(), most=3):
    attempts.check_crash_loop(records, set(saved_by), most, "runs/a")


def test_so_many_deaths_in_a_row_without_a_save_are_refused_with_their_causes():
    dead = [record(1, error="ValueError: x"), record(2, None), record(3, error="OSError: y")]
    refuse(dead[:2])
    with pytest.raises(CrashLoopError) as caught:
        refuse(dead)
    text = str(caught.value)
    assert "the last 3 attempts of runs/a crashed" in text
    assert "attempt 3 (n1, 12:03): OSError: y" in text
    assert "attempt 2 (n1, 12:02): killed, for example" in text
    assert "max_attempts_without_progress=0" in text
    assert caught.value.exit_code == NEVER_REQUEUE
    refuse(dead, most=0)
    refuse(dead, most=4)


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_an_attempt_that_saved_something_ends_the_row(saved_by):
    dead = [record(n) for n in (1, 2, 3, 4)]
    if saved_by == 1:
        with pytest.raises(CrashLoopError, match="the last 3 attempts"):
            refuse(dead, [saved_by])
    else:
        refuse(dead, [saved_by])


def test_preempted_attempts_neither_count_nor_end_the_row():
    refuse([record(n, "preempted") for n in range(1, 9)])
    mixed = [record(1), record(2, "preempted"), record(3), record(4, "preempted"), record(5)]
    with pytest.raises(CrashLoopError, match="the last 3"):
        refuse(mixed)


def test_a_run_that_was_done_once_ends_the_row():
    refuse([record(1), record(2), record(3, "done"), record(4), record(5)])


def test_what_the_scheduler_took_away_and_started_again_does_not_count():
    taken = [record(1, None, job="7"), record(2, None, job="7", restart="1"),
             record(3, None, job="7", restart="2")]  # fmt: skip
    refuse(taken, most=2)
    with pytest.raises(CrashLoopError):
        refuse(taken, most=1)  # the last one: nobody has started it again
    with pytest.raises(CrashLoopError):
        refuse([record(1, None, job="7"), record(2, None, job="8")], most=2)
    with pytest.raises(CrashLoopError):
        refuse([record(1, job="7"), record(2, job="7", restart="1")], most=2)


def test_goodput_counts_what_was_repeated():
    records = [
        record(1, "preempted", first_step=0, last_step=10, starting_s=2.0, training_s=10.0),
        record(2, None, first_step=10, last_step=17, starting_s=3.0, training_s=7.0),  # saved 12
        record(3, None),  # died before it had begun
        record(4, "done", first_step=12, last_step=20, starting_s=1.0, training_s=8.0),
    ]
    found = attempts.goodput(records, 20)
    assert (found.useful_steps, found.all_steps) == (20, 25)
    assert found.fraction == 0.8
    assert (found.attempts, found.preempted) == (4, 1)
    assert (found.starting_s, found.training_s) == (6.0, 25.0)
    assert str(found) == (
        "4 attempts (1 preempted): 80.0 % of 25 steps were useful, 5 were repeated; 6 s of "
        "startup, 25 s of training"
    )


def test_of_an_attempt_that_died_between_two_words_what_was_saved_of_it_counts():
    records = [
        record(1, None, first_step=0, last_step=155),
        record(2, None, first_step=200, last_step=340, resumed_from={"step": 200, "attempt": 1}),
        record(3, None, first_step=300, resumed_from={"step": 300, "attempt": 2}),
    ]
    found = attempts.goodput(records, 400)
    assert (found.useful_steps, found.all_steps) == (400, 200 + 140 + 100)


def test_a_damaged_record_counts_for_nothing():
    damaged = record(1, None, first_step=None, last_step="x", starting_s=10**400, training_s=None)
    good = record(2, "done", first_step=0, last_step=9, training_s=1.5)
    found = attempts.goodput([damaged, good], 9)
    assert (found.all_steps, found.starting_s, found.training_s) == (9, 0.0, 1.5)


def test_a_fork_counts_from_where_it_began():
    found = attempts.goodput([record(1, "done", first_step=100, last_step=130)], 130)
    assert (found.useful_steps, found.all_steps) == (30, 30)


def test_without_records_nothing_was_done():
    assert attempts.goodput([], 0).fraction == 0.0


# --- how a run is, from outside ------------------------------------------------------------------


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
def test_how_a_run_is_follows_from_its_newest_record(more, heard_s, state, since_s):
    record = {"attempt": 1, "started": at(800), **more}
    found = attempts.condition(record, last_activity_s=heard_s, now_s=1000)
    assert (found.state, found.since_s) == (state, since_s)


def test_a_run_without_a_record_is_unknown():
    assert attempts.condition(None, last_activity_s=3.0, now_s=1000).state == "unknown"
