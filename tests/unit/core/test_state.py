"""Training state: counters, best metric, and independent copies for checkpoints."""

import json

import pytest

from trainer.core.state import State
from trainer.errors import CheckpointError


def test_state_new_has_zero_counters():
    state = State()
    assert (state.step, state.epoch, state.samples, state.skipped) == (0, 0, 0, 0)
    assert state.cursor == {"epoch": 0, "batch": 0}
    assert State().cursor is not state.cursor


def test_advance_counts_steps_samples_and_skipped_updates():
    state = State()
    state.advance({"epoch": 0, "batch": 1}, samples=64, applied=True)
    state.advance({"epoch": 1, "batch": 0}, samples=64, applied=False)
    assert (state.step, state.samples, state.skipped, state.epoch) == (2, 128, 1, 1)
    assert state.cursor == {"epoch": 1, "batch": 0}


@pytest.mark.parametrize(("mode", "values", "best"), [
    ("max", [0.5, 0.7, 0.6], {"value": 0.7, "step": 2}),
    ("min", [0.5, 0.7, 0.4], {"value": 0.4, "step": 3}),
    ("max", [0.5, 0.5], {"value": 0.5, "step": 1}),
    ("max", [0.0], {"value": 0.0, "step": 1}),
    ("max", [float("nan"), 0.1], {"value": 0.1, "step": 2}),
    ("min", [0.3, float("nan")], {"value": 0.3, "step": 1}),
    ("max", [float("nan")], None),
])  # fmt: skip
def test_evaluated_keeps_the_earliest_best_value(mode, values, best):
    state = State()
    for value in values:
        state.advance(state.cursor, samples=1, applied=True)
        state.evaluated({"loss": -value, "accuracy": value}, metric="accuracy", mode=mode)
    assert state.best == best
    assert state.last_eval_step == len(values)


def test_evaluated_without_a_metric_stores_metrics_but_no_best():
    state = State(step=3)
    state.evaluated({"loss": 1.0}, metric=None, mode="max")
    assert (state.best, state.last_eval_step, state.metrics) == (None, 3, {"loss": 1.0})


def advanced_state():
    state = State()
    state.advance({"epoch": 2, "batch": 3}, samples=5, applied=False)
    state.evaluated({"loss": 0.25}, metric="loss", mode="min")
    return state


def test_state_dict_survives_a_json_round_trip():
    again = State()
    again.load_state_dict(json.loads(json.dumps(advanced_state().state_dict())))
    assert again == advanced_state() != State()


def test_state_dict_is_a_copy():
    state = advanced_state()
    before = state.state_dict()
    text = json.dumps(before)
    state.cursor["batch"] = 99
    state.metrics["loss"] = 99.0
    state.advance({"epoch": 9, "batch": 9}, samples=1, applied=True)
    assert json.dumps(before) == text


def test_load_state_dict_names_an_unknown_field():
    with pytest.raises(CheckpointError, match="unknown fields mood"):
        State().load_state_dict({**State(step=3).state_dict(), "mood": 1})
