"""Names of files and names of models: which of them mean the same tensor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import CheckpointError, ConfigError
from trainer.importing.name_matching import clean_names, find_weights

NAMES = ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("prefix", [
    "", "model.", "state_dict.", "model_state_dict.", "module.", "model.module.",
    "state_dict.model.", "model._orig_mod.", "_orig_mod.", "module._orig_mod.", "ema.net.",
    "model_state_dict.module.", "model._fsdp_wrapped_module.",
])  # fmt: skip
def test_names_are_found_under_any_prefix_among_other_things(prefix):
    names = [prefix + name for name in NAMES]
    others = ["optimizer.fc.weight.exp_avg", "epoch"]
    if prefix in ("", "_orig_mod."):  # only the model has no prefix
        others = []
    assert find_weights([*names, *others], NAMES).sources == dict(zip(NAMES, names, strict=True))


def test_wrapper_names_match_plain_names_in_both_directions():
    compiled = [f"_orig_mod.{name}" for name in NAMES]
    assert find_weights(NAMES, compiled).sources == dict(zip(compiled, NAMES, strict=True))
    wrapped = [f"module.{name}" for name in NAMES]
    assert find_weights(NAMES, wrapped).sources == dict(zip(wrapped, NAMES, strict=True))


@pytest.mark.parametrize(("first", "second"), [
    ("model.", "state_dict."), ("state_dict.", "ema."), ("model.", "ema.model."),
])  # fmt: skip
def test_preferred_prefix_wins(first, second):
    names = [prefix + name for prefix in (second, first) for name in NAMES]
    match = find_weights(names, NAMES)
    assert (match.prefix, match.sources["fc.bias"]) == (first, first + "fc.bias")
    assert (match.missing, match.unexpected) == ([], [])


@pytest.mark.parametrize(("names", "missing", "unexpected"), [
    ([], NAMES, []),
    (["fc.weight"], ["fc.bias"], []),
    (["model.fc.weight", "model.fc.bias", "model.x"], [], ["x"]),
    (["model.fc.weight", "model.b", "opt.c"], ["fc.bias"], ["b"]),
    (["my_fc.weight", "my_fc.bias"], NAMES, ["my_fc.weight", "my_fc.bias"]),
    ([*NAMES, "model.fc.weight", "model.fc.bias"], [], ["model.fc.weight", "model.fc.bias"]),
])  # fmt: skip
def test_names_that_do_not_fit_are_listed(names, missing, unexpected):
    match = find_weights(names, NAMES)
    assert (match.missing, match.unexpected) == (missing, unexpected)


@pytest.mark.parametrize(("names", "text"), [
    (["a.fc.weight", "a.fc.bias", "b.fc.weight", "b.fc.bias"], 'more than once, under "a.", "b."'),
    (["ema.fc.weight", "_orig_mod.ema.fc.weight"], "two tensors have the name"),
    (["fc.weight", "module.fc.weight", "fc.module.bias"], '"module.fc.weight" all match'),
])  # fmt: skip
def test_ambiguous_names_are_rejected(names, text):
    with pytest.raises(ConfigError) as caught:
        find_weights(names, NAMES)
    assert text in str(caught.value)


def test_tied_tensor_needs_only_a_single_name():
    tied = {"embed": "embed", "head": "embed"}
    match = find_weights(["head", "x"], [*tied, "x"], tied=tied)
    assert (match.sources, match.missing) == ({"head": "head", "x": "x"}, [])
    assert find_weights(["m.embed"], tied, tied=tied).sources == {"embed": "m.embed"}
    assert find_weights(["x"], [*tied, "x"], tied=tied).missing == ["embed", "head"]


# --- wrappers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "expected"), [
    ("a.module.w", "a.w"), ("module.a.module.w", "a.w"), ("module.module.a.w", "a.w"),
    ("module.w", "module.w"), ("module.module.w", "module.w"), ("a.module.module.w", "a.module.w"),
    ("_orig_mod.module._orig_mod.a.w", "a.w"), ("a._fsdp_wrapped_module.module.w", "a.w"),
    ("state_dict.net.module.w", "w"), (".".join([*"abcde", *["module"] * 60, "w"]), "a.b.c.d.e.w"),
])  # fmt: skip
def test_module_is_removed_wherever_that_makes_a_name_of_the_model(stored, expected):
    others = ["b.module.own", "b.c"]  # a user's own submodule, and what keeps prefixes apart
    prefix = stored[: stored.index("module.w")] if stored.startswith("state_dict") else ""
    match = find_weights([stored, *(prefix + name for name in others)], [expected, *others])
    assert match.sources[expected] == stored
    assert match.missing == match.unexpected == []


def test_averaged_model_matches_despite_its_counter():
    names = ["n_averaged", *(f"module.{name}" for name in NAMES)]
    match = find_weights(names, NAMES)
    assert (match.prefix, match.missing, match.unexpected) == ("module.", [], [])


parts = st.lists(st.sampled_from(["a", "b", "module", "fc"]), min_size=1, max_size=3)
model_names = st.sets(
    parts.map(lambda segments: ".".join([*segments, "w"])), min_size=1, max_size=5
)
wrappers = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@settings(max_examples=200, deadline=None)
@given(model_names, st.data())
def test_no_wrapper_hides_a_name_and_no_submodule_of_the_user_is_lost(names, data):
    prefix = data.draw(st.sampled_from(["", "model.", "state_dict.", "state_dict.net."]))
    front = "module." * data.draw(st.integers(0, 2))  # DDP around DataParallel, or neither

    def wrapped(name):
        segments = name.split(".")
        for _ in range(data.draw(st.integers(0, 2))):
            segments.insert(data.draw(st.integers(0, len(segments) - 1)), data.draw(wrappers))
        return prefix + front + ".".join(segments)

    stored = {name: wrapped(name) for name in sorted(names)}
    match = find_weights([*stored.values(), *([] if not prefix else ["epoch"])], sorted(names))
    assert match.sources == stored
    assert not match.missing
    assert not match.unexpected


@given(st.sets(parts.map(".".join), min_size=1, max_size=6))
def test_names_made_clean_are_as_many_and_clean_again(names):
    try:
        cleaned = clean_names(sorted(names))
    except CheckpointError:
        return
    assert len(set(cleaned.values())) == len(names)
    assert set(clean_names(cleaned.values()).values()) == set(cleaned.values())


# --- what is left out, and what is called otherwise --------------------------------------------

BODY = ["body.0.weight", "body.0.bias", *NAMES]


def test_skipped_names_are_neither_missing_nor_unexpected():
    there = find_weights(BODY, BODY, skip=["fc.*"])
    absent = find_weights(BODY[:2], BODY, skip=["fc.weight", "*.bias"])
    assert (there.sources, there.skipped) == ({n: n for n in BODY[:2]}, NAMES)
    assert there.missing == there.unexpected == []
    assert (list(absent.sources), absent.missing) == (["body.0.weight"], [])
    assert absent.skipped == ["body.0.bias", *NAMES]


@pytest.mark.parametrize(("skip", "text"), [
    (["fc.weights"], "init.skip: no tensor matches 'fc.weights' (did you mean 'fc.weight'?)"),
    (["fc.*", "head.*"], "no tensor matches 'head.*'"),
    (["*"], "leaves nothing to load"),
])  # fmt: skip
def test_skip_pattern_without_match_is_rejected(skip, text):
    with pytest.raises(ConfigError) as caught:
        find_weights(BODY, BODY, skip=skip)
    assert text in str(caught.value)


def test_tensors_that_are_one_are_skipped_together():
    tied = {"embed": "embed", "head": "embed", "x": "x"}
    with pytest.raises(ConfigError, match='"head" and "embed" are one tensor; skip both'):
        find_weights(["x"], tied, tied=tied, skip=["head"])
    assert find_weights(["x"], tied, tied=tied, skip=["head", "embed"]).sources == {"x": "x"}


@pytest.mark.parametrize(("rename", "stored"), [
    ({"trunk.*": "body.*"}, ["trunk.0.weight", "trunk.0.bias", *NAMES]),
    ({"head.*": "fc.*", "*.gamma": "*.weight"}, ["body.0.gamma", "body.0.bias",
                                                 "head.weight", "head.bias"]),
    ({"layer*.*": "body.*.*"}, ["layer0.weight", "layer0.bias", *NAMES]),
    ({"teacher.*": ""}, [*BODY, *(f"teacher.{name}" for name in BODY)]),
    ({"a+(b)": "fc.bias"}, [*BODY[:3], "a+(b)"]),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.", "state_dict.net._orig_mod."])
def test_names_are_changed_below_any_prefix(rename, stored, prefix):
    match = find_weights([prefix + name for name in stored], BODY, rename=rename)
    assert (match.missing, match.unexpected) == ([], [])
    assert len(set(match.sources.values())) == len(BODY)
    assert not any("teacher" in name for name in match.sources.values())


def test_first_matching_pattern_applies_and_unmatched_pattern_is_rejected():
    rename = {"a.*": "fc.*", "a.bias": "other"}
    assert find_weights(["a.weight", "a.bias"], NAMES, rename=rename).missing == []
    with pytest.raises(ConfigError, match=r"init.rename: no tensor matches 'b\.\*'"):
        find_weights(NAMES, NAMES, rename={"b.*": "fc.*"})
    with pytest.raises(ConfigError, match=r'"fc\.bias", "a\.bias" all match "fc\.bias"'):
        find_weights([*NAMES, "a.bias"], NAMES, rename={"a.*": "fc.*"})
