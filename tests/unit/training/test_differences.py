"""Differences between a checkpoint's configuration and the present one."""

import copy

import pytest

from tests.support.run_configs import CONFIG, changed
from trainer.core.nested import flatten
from trainer.training.differences import Difference, compare, rejection_text


def test_flatten_returns_leaves_by_dotted_key():
    nested = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": {}, "g": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": {}, "g": None}


def test_compare_equal_configurations_returns_nothing():
    assert compare(CONFIG, copy.deepcopy(CONFIG)) == ()


@pytest.mark.parametrize(("key", "value", "text"), [
    ("trainer__max_epochs", 5, "trainer.max_epochs: 3 -> 5"),
    ("checkpoint__metric", None, "checkpoint.metric: accuracy -> null"),
    ("model__dropout", 0.5, "model.dropout: (not set) -> 0.5"),
    ("model__channels", [4, 16], "model.channels: [4, 8] -> [4, 16]"),
])  # fmt: skip
def test_difference_text_has_the_key_and_both_values(key, value, text):
    (difference,) = compare(CONFIG, changed(**{key: value}))
    assert str(difference) == text
    (back,) = compare(changed(**{key: value}), CONFIG)
    assert (back.old, back.new) == (difference.new, difference.old)


def test_compare_sorts_by_key():
    differences = compare(CONFIG, changed(trainer__max_epochs=9, data__mean=0.1, seed=4))
    assert [d.key for d in differences] == ["data.mean", "seed", "trainer.max_epochs"]


@pytest.mark.parametrize("key", ["name", "run_dir", "resume", "init__weights", "init__skip"])
def test_compare_ignores_name_run_dir_resume_and_init(key):
    assert compare(CONFIG, changed(**{key: "other"})) == ()


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 1),
    ("model__hidden", 32), ("model___target_", "models.mlp.MLP"), ("model__dropout", 0.1),
    ("data__mean", 0.1), ("data___target_", "mine.Data"), ("task__label_smoothing", 0.1),
    ("optimizer__lr", 0.2), ("optimizer___target_", "torch.optim.Adam"),
    ("scheduler", {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}),
    ("trainer__global_batch_size", 32),
])  # fmt: skip
def test_difference_in_state_settings_prevents_resume(key, value):
    differences = compare(CONFIG, changed(**{key: value}))
    assert differences
    assert all(difference.prevents_resume for difference in differences)


@pytest.mark.parametrize(("key", "value"), [
    ("trainer__max_epochs", 30), ("trainer__max_steps", 7), ("trainer__log_every_steps", 50),
    ("trainer__accumulate", 2), ("trainer__clip_norm", 1.0), ("trainer__eval_every_steps", 3),
    ("checkpoint__every_steps", 50), ("checkpoint__metric", "loss"), ("launch__nproc", "4"),
    ("parallel__strategy", "single"), ("tracker", {}), ("data__dir", "/elsewhere"),
    ("data__cache_dir", "/tmp"), ("preemption", {"grace_s": 5.0}),
])  # fmt: skip
def test_difference_in_other_settings_allows_resume(key, value):
    differences = compare(CONFIG, changed(**{key: value}))
    assert differences
    assert not any(difference.prevents_resume for difference in differences)


def test_difference_in_nested_data_location_allows_resume():
    old = changed(data={"train": {"_target_": "x", "root": "a"}})
    new = changed(data={"train": {"_target_": "x", "root": "b"}})
    assert [difference.prevents_resume for difference in compare(old, new)] == [False]


def test_moves_data_is_true_for_seed_data_and_batch_size_only():
    moving = ("seed", "data.mean", "trainer.global_batch_size")
    neutral = ("model.hidden", "optimizer.lr", "trainer.max_epochs", "trainer.accumulate")
    assert all(Difference(key, 1, 2).moves_data for key in moving)
    assert not any(Difference(key, 1, 2).moves_data for key in neutral)


def test_rejection_text_lists_preventing_differences_and_alternatives():
    differences = compare(CONFIG, changed(model__hidden=99, trainer__max_epochs=9))
    text = rejection_text("runs/a", 1234, differences)
    assert "cannot continue runs/a from step 1,234" in text
    assert "\n  model.hidden: 16 -> 99\n" in text
    assert "max_epochs" not in text
    assert all(len(line) <= 79 for line in text.splitlines())
