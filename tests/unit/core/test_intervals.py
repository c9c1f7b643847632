"""Intervals and retention: tables and properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.intervals import Every, due, stale


@pytest.mark.parametrize(("every", "step", "epoch", "ended", "final", "is_due"), [
    (Every(), 7, 1, False, False, False),
    (Every(), 10, 1, True, False, False),
    (Every(), 10, 1, False, True, True),
    (Every(steps=5), 4, 0, False, False, False),
    (Every(steps=5), 5, 0, False, False, True),
    (Every(steps=5), 10, 1, True, False, True),
    (Every(steps=5), 12, 1, True, False, False),
    (Every(steps=1000), 3000, 0, False, False, True),
    (Every(epochs=1), 10, 1, True, False, True),
    (Every(epochs=1), 11, 1, False, False, False),  # in the middle of the next one
    (Every(epochs=2), 10, 1, True, False, False),
    (Every(epochs=2), 20, 2, True, False, True),
    (Every(steps=3, epochs=2), 20, 2, True, False, True),
    (Every(steps=5, epochs=2), 20, 2, True, True, True),
])  # fmt: skip
def test_due(every, step, epoch, ended, final, is_due):
    assert due(every, step=step, epoch=epoch, epoch_ended=ended, final=final) is is_due


@pytest.mark.parametrize(("steps", "keep_last", "keep_best", "mode", "deleted"), [
    ({}, 2, 1, "max", []),
    ({5: None}, 2, 1, "max", []),
    ({5: None, 10: None, 15: None}, 2, 0, "max", [5]),
    ({15: None, 5: None, 10: None}, 1, 0, "max", [5, 10]),
    ({5: None, 10: None}, 0, 0, "max", [5]),  # the newest is always kept
    ({5: 0.9, 10: 0.5, 15: 0.6, 20: 0.7}, 2, 1, "max", [10]),
    ({5: 0.9, 10: 0.5, 15: 0.6, 20: 0.7}, 2, 1, "min", [5]),
    ({5: 0.9, 10: 0.5, 15: 0.6, 20: 0.7}, 1, 2, "max", [10, 15]),
    ({5: 0.9, 10: 0.5, 15: 0.6, 20: 0.7}, 1, 0, "max", [5, 10, 15]),
    ({5: None, 10: 0.5, 15: None, 20: None}, 1, 3, "max", [5, 15]),
    ({5: 0.9, 10: 0.9, 15: 0.9, 20: 0.1}, 1, 1, "max", [10, 15]),  # the first that reached it
    ({5: 0.9, 10: 0.9, 15: 0.9, 20: 1.0}, 1, 1, "min", [10, 15]),
    ({5: float("nan"), 10: 0.5, 15: 0.4, 20: 0.1}, 1, 1, "max", [5, 15]),  # NaN is never the best
    ({5: float("nan"), 10: 0.5, 15: 0.4, 20: 0.1}, 1, 1, "min", [5, 10, 15]),
    ({5: float("inf"), 10: 0.5, 15: 0.4}, 1, 1, "max", [10]),
])  # fmt: skip
def test_stale(steps, keep_last, keep_best, mode, deleted):
    assert stale(steps, keep_last=keep_last, keep_best=keep_best, mode=mode) == deleted


@given(
    steps=st.dictionaries(
        st.integers(1, 200), st.none() | st.floats(-2, 2) | st.just(float("nan")), max_size=20
    ),
    keep_last=st.integers(1, 5),
    keep_best=st.integers(0, 5),
    mode=st.sampled_from(["max", "min"]),
)
@settings(max_examples=200, deadline=None)
def test_stale_retains_newest_and_best_and_no_more(steps, keep_last, keep_best, mode):
    deleted = stale(steps, keep_last=keep_last, keep_best=keep_best, mode=mode)
    retained = set(steps) - set(deleted)
    assert set(deleted) <= set(steps)
    assert set(sorted(steps)[-keep_last:]) <= retained
    assert len(retained) <= keep_last + keep_best
    values = [value for value in steps.values() if value is not None and value == value]
    if values and keep_best:
        best = max(values) if mode == "max" else min(values)
        assert min(step for step, value in steps.items() if value == best) in retained
