"""Validation of values, with the nearest valid ones."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configurations import composed, problems_of

from trainer.config import schema
from trainer.config.merge import merge
from trainer.config.schema import Run, Trainer
from trainer.config.validate import seconds as seconds_of
from trainer.config.validate import validate_world


def a_run(**trainer):
    return Run(name="a", run_dir="a", trainer=Trainer(**trainer))


def test_validate_init_needs_weights_and_matching_wildcards():
    assert problems_of(init={"skip": ["fc.*"]}) == {
        "init.skip": "needs init.weights, the location of the weights"
    }
    values = {"weights": "a.pt", "rename": {"a.*": "b.*.*", "c.*": "d", "e": ""}, "skip": ["x"]}
    assert problems_of(init=values) == {"init.rename": "'b.*.*' has more * than 'a.*'"}
    assert merge(composed(init=values))[0].init.rename == values["rename"]


def test_validate_fp16_shards_need_a_scaled_loss():
    values = {"parallel__strategy": "fsdp", "parallel__param_dtype": "fp16"}
    assert "set trainer.precision=fp16" in problems_of(**values)["parallel.param_dtype"]
    assert problems_of(**values, trainer__precision="fp16") == {}


@pytest.mark.parametrize(("key", "value", "text"), [
    ("trainer__max_epochs", 0, "nearest: 1"),
    ("trainer__global_batch_size", -4, "nearest: 1"),
    ("trainer__accumulate", 0, "nearest: 1"),
    ("trainer__log_every_steps", 0, "nearest: 1"),
    ("trainer__clip_norm", 0.0, "must be larger than 0"),
    ("trainer__clip_norm", float("nan"), "nan is not a number"),
    ("trainer__precision", "fp61", "did you mean 'fp16'?"),
    ("parallel__strategy", "dpp", "did you mean 'ddp'?"),
    ("parallel__bucket_cap_mb", -1.0, "must be larger than 0"),
    ("launch__device", "gpu", "is not one of its values"),
    ("launch__max_restarts", -1, "nearest: 0"),
    ("launch__nproc", "0", "neither auto nor 1, 2"),
    ("launch__nproc", -1, "neither auto nor 1, 2"),
    ("launch__nproc", 1.5, "neither auto nor 1, 2"),
    ("launch__nproc", "²", "neither auto nor 1, 2"),
    ("launch__threads", "all", "neither auto nor 1, 2"),
    ("checkpoint__keep_last", 0, "nearest: 1"),
    ("checkpoint__keep_best", -1, "nearest: 0"),
    ("checkpoint__every_s", 0.0, "must be larger than 0"),
    ("checkpoint__mode", "maximum", "is not one of its values"),
    ("checkpoint__on_error", "ignore", "is not one of its values"),
    ("preemption__grace_s", 0.0, "must be larger than 0"),
    ("preemption__grace_s", float("inf"), "is not a number of seconds"),
    ("seed", -1, "nearest: 0"),
    ("seed", 1 << 63, f"nearest: {(1 << 63) - 1}"),
    ("sample__classes", 0, "nearest: 1"),
    ("sample__shape", [3, 0], "a dimension below 1"),
    ("name", "a b", "must consist of letters"),
    ("name", "a/b", "must consist of letters"),
    ("name", "", "must consist of letters"), ("name", "..", "not only dots"),
    ("run_dir", "", "is empty"),
    ("run_dir", "s3://bucket", "is a bucket"),
    ("run_dir", "s3://bucket/", "is a bucket"),
    ("run_dir", "s3://key:secret@bucket/run", "contains credentials"),
    ("resume", "", "is empty"),
    ("scheduler", {"interval": "epok"}, "did you mean 'epoch'?"),
])  # fmt: skip
def test_validate_value_out_of_range_reports_a_valid_one(key, value, text):
    problems = problems_of(**{key: value})
    full = "scheduler.interval" if key == "scheduler" else key.replace("__", ".")
    assert list(problems) == [full]
    assert text in problems[full]


def test_validate_rejects_a_run_without_an_end():
    assert "never end" in problems_of(trainer__max_epochs=None)["trainer.max_epochs"]
    assert problems_of(trainer__max_epochs=None, trainer__max_steps=5) == {}


@pytest.mark.parametrize("group", ["model", "data", "task", "optimizer"])
@pytest.mark.parametrize("value", [{}, {"_target_": None}, {"_target_": ""}, {"lr": 1}, None])
def test_validate_group_without_target_reports_how_to_choose_one(group, value):
    problems = problems_of(**{group: value})
    assert list(problems) == [group]
    assert f"{group}=<name>" in problems[group]


@given(size=st.integers(1, 3000), world_size=st.integers(1, 64), accumulate=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_validate_world_reports_the_nearest_batch_sizes(size, world_size, accumulate):
    run = a_run(global_batch_size=size, accumulate=accumulate)
    problems = validate_world(run, world_size)

    def fits(n):
        return n > 0 and n % world_size == 0 and (n // world_size) % accumulate == 0

    if fits(size):
        assert problems == []
        return
    assert [problem.key for problem in problems] == ["trainer.global_batch_size"]
    named = problems[0].text.partition("nearest: ")[2].rstrip(")").replace(",", "").split(" or ")
    upper = next(n for n in range(size, 2 * size + 64 * 12) if fits(n))
    lower = next((n for n in range(size, 0, -1) if fits(n)), None)
    assert [int(n) for n in named] == ([upper] if lower is None else [lower, upper])


def test_validate_world_formats_batch_sizes_with_separators():
    (problem,) = validate_world(a_run(global_batch_size=10_001), 8)
    assert problem.text == (
        "10,001 samples cannot be divided over 8 ranks x 1 microbatch (nearest: 10,000 or 10,008)"
    )


def test_validate_world_single_strategy_rejects_two_ranks():
    run = dataclasses.replace(a_run(), parallel=schema.Parallel(strategy="single"))
    assert validate_world(run, 1) == []
    assert [problem.key for problem in validate_world(run, 2)] == ["parallel.strategy"]


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90.0), ("1.5", 1.5), ("30:00", 1800.0), ("2:00:30", 7230.0), ("1-12:00:00", 129600.0),
    ("", None), ("0", None), ("0:00", None), ("2h", None), ("1-2:3", None), ("-5", None),
    ("1:2:3:4", None),
])  # fmt: skip
def test_seconds_parses_slurm_time_formats(text, seconds):
    assert seconds_of(text) == seconds
