"""Crash loops: the attempts that count, their limits, and the wait after losses."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint import crash_loop
from trainer.errors import NEVER_REQUEUE, ConfigError, CrashLoopError, PeerLostError, StoreError

SAME = {"config_digest": "c1", "code_digest": "s1"}


def record(number, kind="failure", **more):
    fields = {"attempt": number, "host": "n1", "started": f"12:0{number}", **SAME}
    ends = {
        "failure": {"outcome": "error", "exit_code": 1, "cause": "x", "error": "ValueError: x"},
        "peer": {"outcome": "error", "exit_code": 75, "cause": "y", "error": "PeerLostError: y"},
        "config": {"outcome": "error", "exit_code": 2, "cause": "z", "error": "ConfigError: z"},
        "superseded": {"outcome": "error", "exit_code": 76, "cause": "w"},
        "preempted": {"outcome": "preempted"},
        "done": {"outcome": "done"},
        "killed": {},
    }
    return {**fields, **ends[kind], **more}


def counts(kinds, saved_by=(), **more):
    records = [record(number, kind, **more) for number, kind in enumerate(kinds, 1)]
    result = crash_loop.streak(records, set(saved_by), SAME)
    return len(result.failures), len(result.losses)


def check(records, saved_by=()):
    streak = crash_loop.streak(records, set(saved_by), SAME)
    crash_loop.check(streak, "runs/a", max_failures=3, max_losses=10)


def test_three_equal_failures_raise_with_causes_and_the_way_on():
    check([record(1), record(2)])
    with pytest.raises(CrashLoopError) as caught:
        check([record(1), record(2), record(3)])
    text = str(caught.value)
    assert "the last 3 attempts of runs/a crashed before saving a checkpoint" in text
    assert "attempt 3 (n1, 12:03): ValueError: x" in text
    assert "launch.forgive=true" in text
    assert "any change of the configuration or code" in text
    assert caught.value.exit_code == NEVER_REQUEUE


def test_ten_losses_raise_with_advice():
    losses = [record(n, "killed" if n % 2 else "peer") for n in range(1, 11)]
    check(losses[:9])
    with pytest.raises(CrashLoopError, match="the last 10 attempts of runs/a were killed or lost"):
        check(losses)


def test_zero_disables_each_limit():
    failures = crash_loop.streak([record(n) for n in range(1, 9)], set(), SAME)
    crash_loop.check(failures, "runs/a", max_failures=0, max_losses=1)
    losses = crash_loop.streak([record(n, "killed") for n in range(1, 99)], set(), SAME)
    crash_loop.check(losses, "runs/a", max_failures=1, max_losses=0)


@pytest.mark.parametrize(("kinds", "expected"), [
    (["config"] * 9, (0, 0)),
    (["superseded"] * 9, (0, 0)),
    (["preempted"] * 9, (0, 0)),
    (["failure", "config", "failure", "preempted", "failure"], (3, 0)),
    (["failure", "killed", "failure", "peer", "failure"], (3, 2)),
    (["failure", "failure", "done", "failure"], (1, 0)),
    (["killed", "killed", "killed"], (0, 3)),
])  # fmt: skip
def test_only_failures_and_losses_count(kinds, expected):
    assert counts(kinds) == expected


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_streak_ends_at_a_save(saved_by):
    assert counts(["failure"] * 4, [saved_by]) == (4 - saved_by, 0)
    assert counts(["killed"] * 4, [saved_by]) == (0, 4 - saved_by)


@pytest.mark.parametrize("changed", [{"config_digest": "c2"}, {"code_digest": "s2"}])
def test_attempts_of_another_configuration_or_code_do_not_count(changed):
    assert counts(["failure", "killed"] * 3, **changed) == (0, 0)


def test_another_exception_ends_the_row_of_failures():
    records = [record(1), record(2), record(3, cause="other"), record(4), record(5)]
    assert len(crash_loop.streak(records, set(), SAME).failures) == 2


def test_forgiven_attempt_hides_the_earlier_ones():
    records = [record(1), record(2, "killed"), record(3, forgiven=True), record(4)]
    result = crash_loop.streak(records, set(), SAME)
    assert [r["attempt"] for r in result.failures] == [4, 3]
    assert result.losses == []


def test_records_of_earlier_versions_do_not_count():
    old = {"outcome": "error", "error": "ValueError: x", "host": "n1", "started": "12:00"}
    records = [{**old, "attempt": n} for n in range(1, 9)]
    records += [{"attempt": n, "host": "n1"} for n in range(9, 20)]
    result = crash_loop.streak(records, set(), SAME)
    assert (result.failures, result.losses) == ([], [])


def test_attempt_restarted_by_scheduler_is_not_a_loss():
    def restarted(*jobs):
        records = [record(n, "killed", job=j, restart=str(n - 1)) for n, j in enumerate(jobs, 1)]
        return len(crash_loop.streak(records, set(), SAME).losses)

    assert restarted("7", "7", "7") == 1  # the last attempt was not restarted
    assert restarted("7", "8") == 2


@given(st.integers(0, 60), st.floats(0, 1000))
def test_wait_doubles_up_to_five_minutes_less_the_time_that_passed(count, passed_s):
    at = datetime.fromtimestamp(1000, UTC).isoformat(timespec="seconds")
    records = [record(n, "killed", started=at) for n in range(1, count + 1)]
    wait_s = crash_loop.streak(records, set(), SAME).wait_s(1000 + passed_s)
    full_s = 0.0 if count < 3 else min(10.0 * 2 ** (count - 3), 300.0)
    assert wait_s == pytest.approx(max(full_s - passed_s, 0.0))


def test_loss_text_names_the_attempts():
    assert crash_loop.streak([record(1)], set(), SAME).loss_text("runs/a") == ""
    one = crash_loop.streak([record(1, "killed")], set(), SAME).loss_text("runs/a")
    assert one.startswith("the last attempt of runs/a was killed or lost")
    assert "attempt 1 (n1, 12:01): killed, for example by SIGKILL" in one


# --- causes ---------------------------------------------------------------------------------------


def raised(function):
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError


def cause(function):
    return crash_loop.failure_facts(raised(function))["cause"]


def fail(error):
    raise error


def fail_elsewhere(error):
    raise error


def test_cause_ignores_numbers_and_addresses():
    one = cause(lambda: fail(ValueError("step 12 at 0x7f01, loss 0.25")))
    assert one == cause(lambda: fail(ValueError("step 3 at 0xdead, loss 7")))


@pytest.mark.parametrize("other", [
    lambda: fail(TypeError("x")), lambda: fail(ValueError("y")),
    lambda: fail_elsewhere(ValueError("x")),
])  # fmt: skip
def test_cause_differs_by_type_message_and_place(other):
    assert cause(lambda: fail(ValueError("x"))) != cause(other)


@pytest.mark.parametrize(("error", "code"), [
    (ValueError("x"), 1), (ConfigError("x"), 2), (StoreError("x"), 75), (PeerLostError("x"), 75),
    (SystemExit(3), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_failure_facts_have_the_exit_code(error, code):
    assert crash_loop.failure_facts(error)["exit_code"] == code
