"""The strict merge: every problem at once, each with its full key; what is stored of it all."""

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from trainer.config import schema
from trainer.config.schema import Checkpoint, Preemption, Run, Trainer, check_world, merge, stored
from trainer.errors import Problem, closest, problems_text

VALID = {
    "name": "a",
    "run_dir": "runs/a",
    "model": {"_target_": "mine.Net"},
    "data": {"_target_": "mine.Data"},
    "task": {"_target_": "mine.Task"},
    "optimizer": {"_target_": "mine.Sgd"},
}


def composed(**changes):
    """Return a valid configuration with dotted `changes` (`__` stands for a dot)."""
    node = OmegaConf.create(copy.deepcopy(VALID))
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value, merge=False, force_add=True)
    return node


def problems_of(**changes):
    return {problem.key: problem.text for problem in merge(composed(**changes))[1]}


def a_run(**trainer):
    return Run(name="a", run_dir="a", trainer=Trainer(**trainer))


def test_a_valid_configuration_has_no_problems_and_gets_the_defaults():
    run, problems = merge(composed())
    assert problems == []
    assert run.trainer == Trainer()
    assert run.checkpoint == Checkpoint()
    assert run.preemption == Preemption()
    assert run.scheduler == {}
    assert (run.seed, run.resume) == (0, "auto")


def test_given_values_win_over_defaults_and_open_groups_are_taken_as_they_are():
    run, problems = merge(
        composed(trainer__max_epochs=3, sample__shape=[3, 4, 5], model__deep={"a": [1, {"b": 2}]})
    )
    assert problems == []
    assert (run.trainer.max_epochs, run.trainer.accumulate) == (3, 1)
    assert run.sample.shape == [3, 4, 5]
    assert run.model == {"_target_": "mine.Net", "deep": {"a": [1, {"b": 2}]}}
    assert type(run.model["deep"]) is dict


def test_the_configuration_is_frozen():
    run, _ = merge(composed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.trainer.max_epochs = 5


def test_defaults_of_two_runs_are_not_the_same_objects():
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
def test_an_unknown_key_is_named_in_full_with_the_closest_one(key, near):
    found = problems_of(**{key: 1})
    assert found == {key.replace("__", "."): f"no such key (did you mean '{near}'?)"}


def test_how_weights_are_taken_needs_weights_and_stars_that_stand_for_something():
    assert problems_of(init={"skip": ["fc.*"]}) == {
        "init.skip": "needs init.weights, the place of the weights that are meant"
    }
    given = {"weights": "a.pt", "rename": {"a.*": "b.*.*", "c.*": "d", "e": ""}, "skip": ["x"]}
    assert problems_of(init=given) == {
        "init.rename": "'b.*.*' has more * than 'a.*', which they stand for"
    }
    assert merge(composed(init=given))[0].init.rename == given["rename"]


def test_an_unknown_key_like_no_other_is_answered_with_the_valid_ones():
    found = problems_of(init__zzz=1)
    assert found == {"init.zzz": "no such key (valid: allow_pickle, rename, skip, strict, weights)"}


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
def test_a_wrong_type_is_one_problem_with_the_full_key_and_the_value_found(key, value):
    found = problems_of(**{key: value})
    full = key.replace("__", ".")
    assert list(found) == [full]
    assert repr(value) in found[full]


@pytest.mark.parametrize(("key", "value", "kept"), [
    ("trainer__clip_norm", 1, 1.0), ("trainer__max_steps", None, None), ("name", 123, "123"),
    ("resume", 12, "12"), ("launch__nproc", 2, "2"), ("trainer__max_epochs", "3", 3),
])  # fmt: skip
def test_what_loses_nothing_in_the_conversion_is_accepted(key, value, kept):
    run, problems = merge(composed(**{key: value}))
    assert problems == []
    for part in key.split("__"):
        run = getattr(run, part)
    assert (run, type(run)) == (kept, type(kept))


def test_half_precision_shards_need_a_scaled_loss():
    given = {"parallel__strategy": "fsdp", "parallel__param_dtype": "fp16"}
    assert "set trainer.precision=fp16" in problems_of(**given)["parallel.param_dtype"]
    assert problems_of(**given, trainer__precision="fp16") == {}


@pytest.mark.parametrize("group", ["scheduler", "tracker"])
def test_an_optional_group_may_be_null(group):
    run, problems = merge(composed(**{group: None}))
    assert problems == []
    assert getattr(run, group) == {}


@pytest.mark.parametrize(("key", "value", "text"), [
    ("trainer__max_epochs", 0, "nearest: 1"),
    ("trainer__global_batch_size", -4, "nearest: 1"),
    ("trainer__accumulate", 0, "nearest: 1"),
    ("trainer__log_every_steps", 0, "nearest: 1"),
    ("trainer__clip_norm", 0.0, "must be larger than 0"),
    ("trainer__clip_norm", float("nan"), "must be larger than 0"),
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
    ("checkpoint__on_error", "go on", "is not one of its values"),
    ("preemption__grace_s", 0.0, "must be larger than 0"),
    ("preemption__grace_s", float("inf"), "is not a number of seconds"),
    ("seed", -1, "nearest: 0"),
    ("seed", 1 << 63, f"nearest: {(1 << 63) - 1}"),
    ("sample__classes", 0, "nearest: 1"),
    ("sample__shape", [3, 0], "an axis below 1"),
    ("name", "a b", "must be made of letters"),
    ("name", "a/b", "must be made of letters"),
    ("name", "", "must be made of letters"), ("name", "..", "not dots alone"),
    ("run_dir", "", "is empty"),
    ("run_dir", "s3://bucket", "a whole bucket"),
    ("run_dir", "s3://bucket/", "a whole bucket"),
    ("run_dir", "s3://key:secret@bucket/run", "has credentials in it"),
    ("resume", "", "is empty"),
    ("scheduler", {"interval": "epok"}, "did you mean 'epoch'?"),
])  # fmt: skip
def test_a_value_out_of_range_is_a_problem_with_what_would_be_right(key, value, text):
    found = problems_of(**{key: value})
    full = "scheduler.interval" if key == "scheduler" else key.replace("__", ".")
    assert list(found) == [full]
    assert text in found[full]


def test_a_run_that_would_never_end_is_refused():
    assert "never end" in problems_of(trainer__max_epochs=None)["trainer.max_epochs"]
    assert problems_of(trainer__max_epochs=None, trainer__max_steps=5) == {}


@pytest.mark.parametrize("group", ["model", "data", "task", "optimizer"])
@pytest.mark.parametrize("value", [{}, {"_target_": None}, {"_target_": ""}, {"lr": 1}, None])
def test_a_group_without_a_target_is_told_how_to_choose_one(group, value):
    found = problems_of(**{group: value})
    assert list(found) == [group]
    assert f"{group}=<name>" in found[group]


def test_missing_name_and_run_dir_are_problems_and_not_exceptions():
    node = composed()
    del node["name"], node["run_dir"]
    assert {problem.key for problem in merge(node)[1]} == {"name", "run_dir"}
    assert set(problems_of(name="???", run_dir="???")) == {"name", "run_dir"}


def test_an_interpolation_that_cannot_be_resolved_has_its_full_key_at_every_depth():
    found = problems_of(
        trainer__max_steps="${nope.x}",
        sample__shape=[1, "${rows}"],
        model__width="${widht}",
        model__blocks=[{"size": "${oc.env:PERDURE_NOT_SET}"}],
        parallel="${nowhere}",
    )
    assert set(found) == {
        "trainer.max_steps", "sample.shape[1]", "model.width", "model.blocks[0].size", "parallel",
    }  # fmt: skip
    assert "'nope.x' not found" in found["trainer.max_steps"]
    assert "PERDURE_NOT_SET" in found["model.blocks[0].size"]


def test_a_group_with_one_unresolvable_value_is_not_also_said_to_be_empty():
    assert list(problems_of(model__a={"b": "${c}"})) == ["model.a.b"]


def test_a_mandatory_value_inside_an_open_group_is_a_problem():
    assert problems_of(data__dir="???") == {"data.dir": "is not set; give it a value"}


@pytest.mark.parametrize("backslashes", [1, 3, 5])
@pytest.mark.parametrize("place", ["{}", "[{}]", "{{inner: {}}}"])
def test_a_text_that_would_be_resolved_again_is_a_problem_with_its_full_key(backslashes, place):
    text = "\\" * backslashes + "${oc.create:'{_target_: torch.load}'}"
    node = OmegaConf.create({"data": {"_target_": "a.b", "eval": None}})
    node.data.eval = {"{}": text, "[{}]": [text], "{{inner: {}}}": {"inner": text}}[place]
    problems = merge(node)[1]
    (found,) = [problem for problem in problems if problem.key.startswith("data")]
    assert found.key.startswith("data.eval")
    assert "resolved once more" in found.text


def test_interpolations_are_resolved_before_types_are_judged():
    run, problems = merge(composed(trainer__max_epochs="${sample.classes}", sample__classes=7))
    assert problems == []
    assert run.trainer.max_epochs == 7
    found = problems_of(trainer__max_epochs="${name}")
    assert "'a' does not fit" in found["trainer.max_epochs"]


def test_all_problems_come_together():
    found = problems_of(
        modle={}, name="a b", seed=-1, trainer__max_epochs="x", trainer__max_step=3,
        trainer__accumulate=0, sample__shape=5, model__x="${y}", data=None,
    )  # fmt: skip
    assert set(found) == {
        "modle", "name", "seed", "trainer.max_epochs", "trainer.max_step", "trainer.accumulate",
        "sample.shape", "model.x", "data",
    }  # fmt: skip


def test_merge_changes_nothing():
    node = composed(trainer__max_epochs="x", model__x="${name}")
    before = OmegaConf.to_yaml(node, resolve=False)
    merge(node)
    stored(node)
    assert OmegaConf.to_yaml(node, resolve=False) == before


def test_what_was_merged_merges_again_to_the_same():
    run, _ = merge(
        composed(trainer__max_epochs=3, scheduler={"_target_": "x", "interval": "epoch"})
    )
    again, problems = merge(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(run))))
    assert problems == []
    assert again == run


# --- the world ---------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), world_size=st.integers(1, 64), accumulate=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_the_named_batch_sizes_fit_and_no_nearer_one_does(size, world_size, accumulate):
    run = a_run(global_batch_size=size, accumulate=accumulate)
    problems = check_world(run, world_size)

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


def test_the_named_sizes_are_readable():
    (problem,) = check_world(a_run(global_batch_size=10_001), 8)
    assert problem.text == (
        "10,001 samples cannot be divided over 8 ranks x 1 microbatches (nearest: 10,000 or 10,008)"
    )


def test_a_single_process_strategy_cannot_use_two_ranks():
    run = dataclasses.replace(a_run(), parallel=schema.Parallel(strategy="single"))
    assert check_world(run, 1) == []
    assert [problem.key for problem in check_world(run, 2)] == ["parallel.strategy"]


# --- stored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [
    "password", "db_password", "passwd", "passphrase", "secret", "client_secret", "credentials",
    "api_key", "apiKey", "wandb_api_key", "access_key", "aws_secret_access_key", "secret_key",
    "private_key", "token", "hf_token", "auth_token", "HF_TOKEN", "hfToken",
    "accessToken", "pwd", "secrets",
])  # fmt: skip
@pytest.mark.parametrize("value", ["hunter2", 12345, ["hunter2"], {"a": "hunter2"}])
def test_secrets_are_redacted_at_every_depth(key, value):
    node = OmegaConf.create({key: value, "a": [{"b": {key: value}}]})
    assert stored(node) == {key: "<redacted>", "a": [{"b": {key: "<redacted>"}}]}


@pytest.mark.parametrize("key", [
    "max_tokens", "global_batch_tokens", "tokens", "token_count", "num_tokens", "tokenizer",
    "bytes_per_token",
    "pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "pad_token_id", "key",
    "monkey", "secretary", "keep_last", "n_tokens", "dataset_key",
])  # fmt: skip
def test_what_only_sounds_like_a_secret_is_kept(key):
    assert stored(OmegaConf.create({key: 5})) == {key: 5}


def test_a_secret_that_is_not_set_stays_visible_as_not_set():
    assert stored(OmegaConf.create({"hf_token": None})) == {"hf_token": None}


def test_the_environment_stays_unresolved_and_its_value_appears_nowhere(monkeypatch):
    monkeypatch.setenv("PERDURE_TEST", "hunter2")
    node = OmegaConf.create(
        {
            "direct": "${oc.env:PERDURE_TEST}",
            "inside": "x-${oc.env:PERDURE_TEST,default}",
            "reference": "${direct}",
            "part": "before ${direct} after",
            "chain": "${reference}",
            "many": ["${direct}", {"deep": "${..[0]}"}],
            "whole": "${group}",
            "group": {"x": "${oc.env:PERDURE_TEST}"},
            "decoded": "${oc.decode:${oc.env:PERDURE_TEST}}",
            "values": "${oc.dict.values:group}",
            "plain": 3,
            "resolved": "${plain}",
        }
    )
    assert node.part == "before hunter2 after"  # the value is there to leak
    assert node["values"] == ["hunter2"]
    found = stored(node)
    assert "hunter2" not in json.dumps(found)
    assert found["direct"] == found["reference"] == found["chain"] == "${oc.env:PERDURE_TEST}"
    assert found["inside"] == "x-${oc.env:PERDURE_TEST,default}"
    assert found["part"] == "before ${oc.env:PERDURE_TEST} after"
    assert found["whole"] == found["group"] == {"x": "${oc.env:PERDURE_TEST}"}
    assert found["resolved"] == 3


def test_a_value_that_refers_to_a_secret_is_redacted_too():
    node = OmegaConf.create(
        {"model": {"hf_token": "hunter2"}, "data": {"login": "${model.hf_token}"}}
    )
    assert stored(node)["data"] == {"login": "<redacted>"}


def test_a_computation_with_what_the_environment_holds_stays_text(monkeypatch):
    monkeypatch.setenv("PERDURE_TEST", "7")
    OmegaConf.register_new_resolver("perdure_twice", lambda n: 2 * int(n))
    try:
        node = OmegaConf.create({"n": "${oc.env:PERDURE_TEST}", "m": "${perdure_twice:${n}}"})
        assert node.m == 14
        assert stored(node) == {"n": "${oc.env:PERDURE_TEST}", "m": "${perdure_twice:${n}}"}
    finally:
        OmegaConf.clear_resolver("perdure_twice")


def test_what_is_stored_is_plain_json_with_text_keys():
    node = OmegaConf.create({"a": {1: [1.5, None, True, "x"]}, "b": "${a}"})
    found = stored(node)
    assert found == {"a": {"1": [1.5, None, True, "x"]}, "b": {"1": [1.5, None, True, "x"]}}
    assert json.loads(json.dumps(found)) == found


# --- messages ----------------------------------------------------------------------------------


def test_problems_are_listed_with_aligned_keys_and_continued_lines_indented():
    text = problems_text([Problem("a.long.key", "is wrong"), Problem("b", "two\nlines")])
    assert text == (
        "2 problems in the configuration:\n"
        "  a.long.key  is wrong\n"
        "  b           two\n"
        "              lines"
    )
    assert problems_text([Problem("a", "b")]).startswith("1 problem in")


def test_closest_names_a_near_one_or_lists_what_is_valid():
    assert closest("adm", ["adam", "sgd"]) == " (did you mean 'adam'?)"
    assert closest("xyz", ["adam", "sgd"]) == " (valid: adam, sgd)"
    assert closest("xyz", []) == ""
    assert closest("x", map(str, range(100, 113))).endswith("111, …)")


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90.0), ("1.5", 1.5), ("30:00", 1800.0), ("2:00:30", 7230.0), ("1-12:00:00", 129600.0),
    ("", None), ("0", None), ("0:00", None), ("2h", None), ("1-2:3", None), ("-5", None),
    ("1:2:3:4", None),
])  # fmt: skip
def test_times_are_written_as_slurm_writes_them(text, seconds):
    assert schema.seconds(text) == seconds
