"""Strict merge: every problem at once, each with its full key."""

import dataclasses

import pytest
from omegaconf import OmegaConf
from support.configurations import composed, problems_of

from trainer.config.merge import merge
from trainer.config.redact import stored
from trainer.config.schema import Checkpoint, Preemption, Trainer
from trainer.errors import Problem, closest, problems_text


def test_merge_valid_configuration_gets_the_defaults():
    run, problems = merge(composed())
    assert problems == []
    assert run.trainer == Trainer()
    assert run.checkpoint == Checkpoint()
    assert run.preemption == Preemption()
    assert run.scheduler == {}
    assert (run.seed, run.resume) == (0, "auto")


def test_merge_values_override_defaults_and_open_groups_stay_unchanged():
    run, problems = merge(
        composed(trainer__max_epochs=3, sample__shape=[3, 4, 5], model__deep={"a": [1, {"b": 2}]})
    )
    assert problems == []
    assert (run.trainer.max_epochs, run.trainer.accumulate) == (3, 1)
    assert run.sample.shape == [3, 4, 5]
    assert run.model == {"_target_": "mine.Net", "deep": {"a": [1, {"b": 2}]}}
    assert type(run.model["deep"]) is dict


def test_merge_brings_locations_to_their_normal_form(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    run, problems = merge(
        composed(
            run_dir="~/runs//a/", resume="file:///old/", init__weights="./w.safetensors",
            checkpoint__mirror="S3://bucket/a//b/",
        )
    )  # fmt: skip
    assert problems == []
    assert (run.run_dir, run.resume) == ("/home/someone/runs/a", "/old")
    assert (run.checkpoint.mirror, run.init.weights) == ("s3://bucket/a/b", "w.safetensors")


def test_merge_rejects_what_only_looks_like_a_location():
    problems = problems_of(
        run_dir="s3:/bucket/a", resume="gs:/b/c", init__weights="s3:b/c",
        checkpoint__mirror="s3://b/../c",
    )  # fmt: skip
    texts = dict(problems)
    assert set(texts) == {"run_dir", "resume", "init.weights", "checkpoint.mirror"}
    assert "write s3://bucket/a, or ./s3:/bucket/a" in texts["run_dir"]


def test_merge_result_is_frozen():
    run, _ = merge(composed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.trainer.max_epochs = 5


def test_merge_does_not_share_default_objects_between_runs():
    first, second = merge(composed())[0], merge(composed())[0]
    first.sample.shape.append(9)
    first.preemption.signals.clear()
    assert second.sample.shape == [1, 28, 28]
    assert Preemption().signals == second.preemption.signals != []


@pytest.mark.parametrize(("key", "near"), [
    ("modle", "model"),
    ("trainer__max_epoch", "max_epochs"),
    ("checkpoint__evry_steps", "every_steps"),
    ("launch__nprocs", "nproc"),
    ("parallel__strategi", "strategy"),
    ("sample__shapes", "shape"),
    ("preemption__signal", "signals"),
    ("init__weight", "weights"),
])  # fmt: skip
def test_merge_unknown_key_reports_full_key_and_closest_name(key, near):
    problems = problems_of(**{key: 1})
    assert problems == {key.replace("__", "."): f"no such key (did you mean '{near}'?)"}


def test_merge_unknown_key_without_a_close_name_lists_valid_keys():
    problems = problems_of(init__zzz=1)
    assert problems == {
        "init.zzz": "no such key (valid: allow_pickle, rename, skip, strict, weights)"
    }


@pytest.mark.parametrize(("key", "value"), [
    ("trainer__max_epochs", "many"), ("trainer__max_epochs", 2.0), ("trainer__max_epochs", 2.5),
    ("trainer__max_epochs", True), ("trainer__max_epochs", [1]), ("trainer__max_epochs", {"a": 1}),
    ("trainer__global_batch_size", None), ("trainer__clip_norm", "x"),
    ("trainer__clip_norm", True), ("trainer__deterministic", "maybe"),
    ("trainer__precision", None), ("sample__shape", 5), ("sample__shape", "28"),
    ("sample__shape", ["a"]), ("sample__shape", [1.5]), ("sample__shape", None),
    ("sample__shape", {"a": 1}), ("preemption__signals", "SIGTERM"), ("seed", 1e4),
    ("seed", None), ("name", ["a"]), ("resume", None), ("launch__nproc", None),
    ("model", 3), ("model", "cnn"), ("model", [1]), ("tracker", "console"),
    ("trainer", 3), ("trainer", None), ("trainer", [1]), ("trainer", "fast"),
])  # fmt: skip
def test_merge_wrong_type_reports_full_key_and_value(key, value):
    problems = problems_of(**{key: value})
    full = key.replace("__", ".")
    assert list(problems) == [full]
    assert repr(value) in problems[full]


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("trainer__clip_norm", 1, 1.0), ("trainer__max_steps", None, None), ("name", 123, "123"),
    ("resume", 12, "12"), ("launch__nproc", 2, "2"), ("trainer__max_epochs", "3", 3),
])  # fmt: skip
def test_merge_accepts_lossless_conversions(key, value, expected):
    run, problems = merge(composed(**{key: value}))
    assert problems == []
    for part in key.split("__"):
        run = getattr(run, part)
    assert (run, type(run)) == (expected, type(expected))


@pytest.mark.parametrize("group", ["scheduler", "tracker"])
def test_merge_optional_group_may_be_null(group):
    run, problems = merge(composed(**{group: None}))
    assert problems == []
    assert getattr(run, group) == {}


def test_merge_missing_name_and_run_dir_are_problems():
    node = composed()
    del node["name"], node["run_dir"]
    assert {problem.key for problem in merge(node)[1]} == {"name", "run_dir"}
    assert set(problems_of(name="???", run_dir="???")) == {"name", "run_dir"}


def test_merge_unresolvable_interpolation_reports_full_key_at_every_depth():
    problems = problems_of(
        trainer__max_steps="${nope.x}",
        sample__shape=[1, "${rows}"],
        model__width="${widht}",
        model__blocks=[{"size": "${oc.env:PERDURE_NOT_SET}"}],
        parallel="${nowhere}",
    )
    assert set(problems) == {
        "trainer.max_steps", "sample.shape[1]", "model.width", "model.blocks[0].size", "parallel",
    }  # fmt: skip
    assert "'nope.x' not found" in problems["trainer.max_steps"]
    assert "PERDURE_NOT_SET" in problems["model.blocks[0].size"]


def test_merge_unresolvable_value_is_reported_once():
    assert list(problems_of(model__a={"b": "${c}"})) == ["model.a.b"]


def test_merge_mandatory_value_in_an_open_group_is_a_problem():
    assert problems_of(data__dir="???") == {"data.dir": "is not set; give it a value"}


@pytest.mark.parametrize("backslashes", [1, 3, 5])
@pytest.mark.parametrize("shape", ["{}", "[{}]", "{{deep: {}}}"])
def test_merge_rejects_text_that_would_be_resolved_twice(backslashes, shape):
    text = "\\" * backslashes + "${oc.create:'{_target_: torch.load}'}"
    node = OmegaConf.create({"data": {"_target_": "a.b", "eval": None}})
    node.data.eval = {"{}": text, "[{}]": [text], "{{deep: {}}}": {"deep": text}}[shape]
    problems = merge(node)[1]
    (problem,) = [problem for problem in problems if problem.key.startswith("data")]
    assert problem.key.startswith("data.eval")
    assert "resolved a second time" in problem.text


def test_merge_resolves_interpolations_before_checking_types():
    run, problems = merge(composed(trainer__max_epochs="${sample.classes}", sample__classes=7))
    assert problems == []
    assert run.trainer.max_epochs == 7
    problems = problems_of(trainer__max_epochs="${name}")
    assert "'a' does not fit" in problems["trainer.max_epochs"]


def test_merge_reports_all_problems_together():
    problems = problems_of(
        modle={}, name="a b", seed=-1, trainer__max_epochs="x", trainer__max_step=3,
        trainer__accumulate=0, sample__shape=5, model__x="${y}", data=None,
    )  # fmt: skip
    assert set(problems) == {
        "modle", "name", "seed", "trainer.max_epochs", "trainer.max_step", "trainer.accumulate",
        "sample.shape", "model.x", "data",
    }  # fmt: skip


def test_merge_leaves_its_input_unchanged():
    node = composed(trainer__max_epochs="x", model__x="${name}")
    before = OmegaConf.to_yaml(node, resolve=False)
    merge(node)
    stored(node)
    assert OmegaConf.to_yaml(node, resolve=False) == before


def test_merge_is_idempotent():
    run, _ = merge(
        composed(trainer__max_epochs=3, scheduler={"_target_": "x", "interval": "epoch"})
    )
    again, problems = merge(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(run))))
    assert problems == []
    assert again == run


def test_problems_text_aligns_keys_and_indents_continued_lines():
    text = problems_text([Problem("a.long.key", "is wrong"), Problem("b", "two\nlines")])
    assert text == (
        "2 problems in the configuration:\n"
        "  a.long.key  is wrong\n"
        "  b           two\n"
        "              lines"
    )
    assert problems_text([Problem("a", "b")]).startswith("1 problem in")


def test_closest_returns_a_near_name_or_lists_valid_ones():
    assert closest("adm", ["adam", "sgd"]) == " (did you mean 'adam'?)"
    assert closest("xyz", ["adam", "sgd"]) == " (valid: adam, sgd)"
    assert closest("xyz", []) == ""
    assert closest("x", map(str, range(100, 113))).endswith("111, …)")


@pytest.mark.parametrize(("key", "full"), [
    ("lr", "'optimizer.lr'"), ("max_epochs", "'trainer.max_epochs'"),
    ("trainer__lr", "'optimizer.lr'"),
    ("every_steps", "'checkpoint.every_steps'"), ("metric", "'checkpoint.metric'"),
])  # fmt: skip
def test_merge_key_of_another_group_suggests_the_full_key(key, full):
    node = composed(optimizer={"_target_": "x", "lr": 0.1}, **{key: 1})
    (problem,) = merge(node)[1]
    assert problem == Problem(key.replace("__", "."), f"no such key (did you mean {full}?)")
