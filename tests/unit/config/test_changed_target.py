"""Arguments of a `_target_` that differs from the one in the chosen group's file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from trainer.config.changed_target import without_inherited
from trainer.config.compose import compose
from trainer.errors import ConfigError

FILE = """# @package _global_
defaults:
  - override /model: mlp
model: {_target_: mine.Net, classes: 7}
"""


def model(*arguments):
    run, _ = compose([*arguments, "name=a"], "")
    return run.model


def test_changed_target_keeps_only_arguments_written_next_to_it():
    assert model("model._target_=mine.Net") == {"_target_": "mine.Net"}
    assert model("model._target_=mine.Net", "+model.width=3", "model.classes=10") == {
        "_target_": "mine.Net", "width": 3, "classes": 10,
    }  # fmt: skip


def test_deleting_an_argument_of_a_changed_target_is_accepted(tmp_path):
    assert model("model._target_=mine.Net", "~model.classes", "~model.input_shape") == {
        "_target_": "mine.Net"
    }
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(FILE)
    mine = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert model(*mine, "~model.classes") == {"_target_": "mine.Net"}
    with pytest.raises(ConfigError, match="classrooms"):
        model("model._target_=mine.Net", "~model.classrooms")


def test_argument_equal_to_the_shipped_one_is_kept_if_written():
    written = ["model.input_shape='${sample.shape}'", "sample.shape=[1,8,8]"]
    assert model("model._target_=mine.Net", *written)["input_shape"] == [1, 8, 8]


@pytest.mark.parametrize("target", ["models.cnn.CNN", None])
def test_same_target_keeps_the_shipped_arguments(target):
    changes = [f"model._target_={target}"] if target else []
    assert model(*changes, "model.hidden=3").keys() == {
        "_target_", "input_shape", "classes", "hidden",
    }  # fmt: skip


def test_changed_target_in_a_file_of_the_user(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(FILE)
    mine = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert model(*mine) == {"_target_": "mine.Net", "classes": 7}
    assert model(*mine, "model._target_=models.mlp.MLP").keys() >= {"input_shape", "classes"}
    assert model(*mine, "model=cnn") == {"_target_": "mine.Net", "classes": 7}


def test_own_group_file_keeps_its_arguments(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("_target_: mine.Net\nwidth: 3\n")
    mine = ["--config-dir", str(tmp_path), "model=own"]
    assert model(*mine) == {"_target_": "mine.Net", "width": 3}


def test_changed_target_of_other_groups_and_of_one_tracker():
    run, _ = compose(
        ["name=a", "optimizer._target_=torch.optim.SGD", "optimizer.lr=0.5", "data=mnist",
         "data._target_=mine.Data", "tracker.console._target_=mine.Log", "+tracker.x=1"], ""
    )  # fmt: skip
    assert run.optimizer == {"_target_": "torch.optim.SGD", "lr": 0.5}
    assert run.data == {"_target_": "mine.Data"}
    assert run.tracker == {"console": {"_target_": "mine.Log"}, "x": 1}
    assert run.sample.shape == [1, 28, 28]  # set by the file, but not an argument


NODES = st.recursive(
    st.integers(0, 3),
    lambda children: st.dictionaries(st.sampled_from(["_target_", "a", "b"]), children, max_size=3),
    max_leaves=8,
).filter(lambda node: isinstance(node, dict))


@given(NODES, NODES)
def test_without_inherited_equals_the_merge_unless_a_target_differs(user, file):
    merged = OmegaConf.to_container(OmegaConf.merge(file, user))
    result = without_inherited(merged, user, file)
    if user.get("_target_", 9) != file.get("_target_", 9) and {"_target_"} <= user.keys() & file:
        assert result == user
    else:
        assert result.keys() == merged.keys()
    assert without_inherited(merged, user, {}) == merged
