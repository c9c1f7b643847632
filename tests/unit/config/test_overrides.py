"""Command-line overrides: arguments passed to Hydra, and problems reported instead."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import overrides
from trainer.config.overrides import groups, prepare, quoted


@pytest.fixture
def conf(tmp_path):
    """A configuration folder with two groups, one of them nested."""
    folder = tmp_path / "conf"
    for name in ("config", "model/cnn", "model/mlp", "optimizer/adam", "a/b/deep"):
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x: 1\n")
    (folder / "model" / "README.md").write_text("not a choice")
    return folder


def keys(prepared):
    return [problem.key for problem in prepared.problems]


def test_groups_maps_folders_to_files(conf):
    assert groups([conf]) == {"model": {"cnn", "mlp"}, "optimizer": {"adam"}, "a/b": {"deep"}}


def test_groups_merges_several_folders(conf, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "big.yaml").write_text("")
    assert groups([conf, tmp_path / "mine"])["model"] == {"cnn", "mlp", "big"}


@pytest.mark.parametrize("argument", [
    "trainer.max_epochs=3", "seed=1", "trainer.max_epohcs=3", "model.hidden=[1,2]",
    "model.x={a:1}", "name='a b'", "run_dir=/tmp/x", "a.b.c=null", "x=",
])  # fmt: skip
def test_prepare_forces_plain_values_for_the_strict_merge(conf, argument):
    assert prepare([argument], conf) == overrides.Prepared(["++" + argument], [], [])


@pytest.mark.parametrize("argument", [
    "+model.x=1", "++model.x=1", "~model.x", "~model.x=1",  # explicit prefix
    "model=mlp", "model=cnn.yaml", "~model", "a/b=deep", "+a/b=deep", "model@other=mlp",  # groups
    "hydra.sweep.dir=/tmp", "hydra/launcher=basic", "hydra/launcher=joblib",  # Hydra's own
    "--help", "-m", "--cfg", "job", "--multirun", "-cn=x", "--config-name=other",  # flags
])  # fmt: skip
def test_prepare_passes_other_arguments_unchanged(conf, argument):
    prepared = prepare([argument], conf)
    assert (prepared.arguments, prepared.problems) == ([argument], [])


def test_prepare_reports_unknown_choice_with_the_closest(conf):
    prepared = prepare(["model=mpl", "seed=1"], conf)
    assert prepared.arguments == ["++seed=1"]
    assert keys(prepared) == ["model"]
    assert prepared.problems[0].text == "no such choice: model=mpl (did you mean 'mlp'?)"


def test_prepare_reports_unknown_choice_with_all_if_none_is_close(conf):
    (problem,) = prepare(["model=transformer"], conf).problems
    assert problem.text == "no such choice: model=transformer (valid: cnn, mlp)"


@pytest.mark.parametrize(("argument", "wrong"), [
    ("model=cnn,mpl", "mpl"), ("model=mlp, xyz", "xyz"), ("+model=mpl", "mpl"),
])  # fmt: skip
def test_prepare_checks_every_choice_of_a_sweep(conf, argument, wrong):
    (problem,) = prepare([argument], conf).problems
    assert f"no such choice: model={wrong}" in problem.text


@pytest.mark.parametrize("argument", ["model=null", "model=", "model=[cnn,mlp]", "model=glob(*)"])
def test_prepare_passes_hydra_group_syntax_unchanged(conf, argument):
    assert prepare([argument], conf).arguments == [argument]


@pytest.mark.parametrize(("argument", "passed"), [
    ("seed=1,2,3", "++seed=1,2,3"),
    ("seed=range(3)", "++seed=range(3)"),
    ("optimizer.lr=choice(0.1,0.2)", "++optimizer.lr=choice(0.1,0.2)"),
    ("model=cnn,mlp", "model=cnn,mlp"),
    ("model=choice(cnn,mlp)", "model=choice(cnn,mlp)"),
])  # fmt: skip
def test_prepare_detects_swept_keys(conf, argument, passed):
    prepared = prepare(["-m", argument, "name=x"], conf)
    assert prepared.arguments == ["-m", passed, "++name=x"]
    assert prepared.swept == [argument.partition("=")[0]]


def test_prepare_treats_a_bracketed_list_as_a_value(conf):
    assert prepare(["model.hidden=[1,2]"], conf).swept == []


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_prepare_includes_groups_of_config_dir(conf, tmp_path, flag):
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "big.yaml").write_text("")
    (mine / "extra").mkdir()
    (mine / "extra" / "one.yaml").write_text("")
    flags = [text.format(mine) for text in flag]
    prepared = prepare([*flags, "model=big", "extra=one", "extra=two"], conf)
    assert prepared.arguments == [*flags, "model=big", "extra=one"]
    assert keys(prepared) == ["extra"]


def test_prepare_passes_a_missing_config_dir_to_hydra(conf):
    arguments = ["--config-dir", "/nowhere/at/all"]
    assert prepare(arguments, conf).arguments == arguments


@pytest.mark.parametrize(
    "argument", ["model.hidden=[1,2", "x={a:", "x=rnage(3)", "x=é,b", "x='a", "~x=é", "a b=c"]
)
def test_prepare_reports_syntax_error_with_the_quoted_form_and_parses_the_others(conf, argument):
    prepared = prepare([argument, "seed=1"], conf)
    key, _, value = argument.partition("=")
    assert prepared.arguments == ["++seed=1"]
    assert keys(prepared) == [key.lstrip("~")]
    assert f"{argument!r} cannot be parsed" in prepared.problems[0].text
    assert f"to give it as text: {quoted(key, value)}" in prepared.problems[0].text


@pytest.mark.parametrize("value", [
    "ckpts/epoch=9-step=100.ckpt", "/home/josé/w", "/data (1)/w", "~/w", "a#b", "b=c}", "seed=²",
    "it's", "a!b", "a?b", "f(1", "c'\\",
])  # fmt: skip
def test_prepare_quotes_plain_text(conf, value):
    prepared = prepare([f"init.weights={value}"], conf)
    assert prepared.problems == prepared.swept == []
    assert OverridesParser.create().parse_override(prepared.arguments[0]).value() == value


@given(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"])))
def test_quoted_form_survives_shell_and_grammar(value):
    (argument,) = shlex.split(quoted("key", value))
    assert OverridesParser.create().parse_override(argument).value() == value


def test_prepare_reports_problems_of_all_arguments(conf):
    prepared = prepare(["model=x", "optimizer=y", "a=[", "seed=1"], conf)
    assert keys(prepared) == ["model", "optimizer", "a"]


# --- arguments of which the merge finds all problems ---------------------------------------------


@pytest.mark.parametrize("arguments", [
    [], ["trainer.max_epoch=3"], ["lr=0.1"], ["modle=mlp"], ["modle.hidden=3"], ["data=synthetic"],
    ["experiment=fashion_cnn", "seed=-1"], ["+extra.thing=1"], ["++trainer.max_steps=2"],
    ["run_dir=/tmp/model.x"], ["sample.shape=[1,2]"],
])  # fmt: skip
def test_settings_without_targets_need_none(arguments):
    assert overrides.need_no_target(arguments)


@pytest.mark.parametrize("argument", [
    "model.hidden=3", "+model.hidden=3", "++optimizer.lr=1", "~optimizer.lr", "~model",
    "optimizer={lr:1}", "model@other=mlp", "tracker.mine._target_=mine.Tracker", "model=${x}",
    "init.weights=no.safetensors", "preemption.signals=[SIGKILL]", "checkpoint.mode=max",
    "hydra.searchpath=[conf]", "hydra/launcher=basic", "--config-dir=conf", "--config-dir", "-m",
])  # fmt: skip
def test_settings_of_targets_and_flags_need_a_look_at_the_targets(argument):
    assert not overrides.need_no_target(["seed=1", argument])
