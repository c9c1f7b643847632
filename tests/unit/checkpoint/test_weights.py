"""Weights into a model: from any kind of place, under any prefix, exactly or not at all."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from states import brought, net, save_dcp, save_torch
from torch import nn

from trainer import build
from trainer.checkpoint import Content, DamagedError, Writer, lineage, save, tree, weights
from trainer.checkpoint.weights import find_weights
from trainer.config import Init, Run
from trainer.distributed import World
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import open_store

__all__ = ["brought"]


def same(model, other):
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# --- which names are meant ---------------------------------------------------------------------

NAMES = ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("prefix", [
    "", "model.", "state_dict.", "model_state_dict.", "module.", "model.module.",
    "state_dict.model.", "model._orig_mod.", "_orig_mod.", "module._orig_mod.", "ema.net.",
    "model_state_dict.module.", "model._fsdp_wrapped_module.",
])  # fmt: skip
def test_names_are_found_under_any_prefix_among_other_things(prefix):
    names = [prefix + name for name in NAMES]
    others = ["optimizer.fc.weight.exp_avg", "epoch"]
    if prefix in ("", "_orig_mod."):  # nothing but the model stands at the top
        others = []
    assert find_weights([*names, *others], NAMES) == dict(zip(NAMES, names, strict=True))


def test_a_compiled_model_takes_the_names_of_a_plain_one_and_the_other_way_round():
    compiled = [f"_orig_mod.{name}" for name in NAMES]
    assert find_weights(NAMES, compiled) == dict(zip(compiled, NAMES, strict=True))
    wrapped = [f"module.{name}" for name in NAMES]
    assert find_weights(NAMES, wrapped) == dict(zip(wrapped, NAMES, strict=True))


@pytest.mark.parametrize(("first", "second"), [
    ("", "model."), ("model.", "state_dict."), ("state_dict.", "ema."), ("model.", "ema.model."),
])  # fmt: skip
def test_the_usual_prefix_wins(first, second):
    names = [prefix + name for prefix in (second, first) for name in NAMES]
    if first:
        assert find_weights(names, NAMES)["fc.bias"] == first + "fc.bias"
    else:
        with pytest.raises(
            ConfigError, match=r'it holds "model.fc.weight", "model.fc.bias" besides'
        ):
            find_weights(names, NAMES)


@pytest.mark.parametrize(("names", "text"), [
    ([], 'it lacks "fc.weight", "fc.bias"'),
    (["fc.weight"], 'it lacks "fc.bias"'),
    (["model.fc.weight", "model.fc.bias", "model.x"], 'it holds "model.x" besides'),
    (["model.fc.weight", "model.b", "opt.c"], 'it lacks "fc.bias", and it holds "model.b" besides'),
    ([f"fc.{i}" for i in range(7)], 'holds "fc.0", "fc.1", "fc.2", "fc.3" and 3 more besides'),
    (["a.fc.weight", "a.fc.bias", "b.fc.weight", "b.fc.bias"], 'more than once, under "a.", "b."'),
    (["ema.fc.weight", "_orig_mod.ema.fc.weight"], "two tensors would both be called"),
    (["my_fc.weight", "my_fc.bias"], 'it lacks "fc.weight"'),
])  # fmt: skip
def test_names_that_do_not_fit_are_listed(names, text):
    with pytest.raises(ConfigError) as caught:
        find_weights(names, NAMES)
    assert text in str(caught.value)


def test_one_of_two_tied_names_is_enough():
    tied = {"embed": "embed", "head": "embed"}
    assert find_weights(["head", "x"], [*tied, "x"], tied=tied) == {"head": "head", "x": "x"}
    assert find_weights(["m.embed"], tied, tied=tied) == {"embed": "m.embed"}
    with pytest.raises(ConfigError, match='it lacks "embed", "head"'):
        find_weights(["x"], [*tied, "x"], tied=tied)


# --- where they come from ----------------------------------------------------------------------


def a_run(folder, models):
    """Write a checkpoint of each {step: model}; return the run's directory."""
    store = open_store(str(folder))
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    writer = Writer(store, World(), attempt)
    for step, model in models.items():
        content = Content(objects={"run": {}})
        tree.add_model(content, model, with_buffers=True)
        tree.add_optimizers(content, model, [trained(model)])
        save(writer, content, step=step)
    return folder


def trained(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def make_place(kind, folder):
    state = net(1).state_dict()
    if kind == "torch":
        return save_torch(folder / "a.pt", state)
    if kind == "wrapped":
        state = {"epoch": 3, "model_state_dict": under("module.", state), "optimizer": {"x": 1}}
        return save_torch(folder / "a.pt", state)
    if kind == "lightning":
        state = {"state_dict": under("model._orig_mod.", state), "loops": {"a": {"b": []}}}
        return save_torch(folder / "a.ckpt", state, _use_new_zipfile_serialization=False)
    if kind == "dcp":
        optimizer = trained(net(1)).state_dict()
        return save_dcp(folder / "dcp", {"model": state, "optimizer": optimizer})
    if kind == "flat dcp":
        return save_dcp(folder / "dcp", state)
    if kind == "safetensors":
        safetensors.torch.save_model(net(1), str(folder / "a.safetensors"))
        return folder / "a.safetensors"
    (folder / "hf").mkdir()
    names = sorted(state)
    for number, some in enumerate((names[:5], names[5:])):
        part = {name: state[name].clone() for name in some}
        safetensors.torch.save_file(part, folder / "hf" / f"{number}.safetensors")
    return folder / "hf"


KINDS = ["torch", "wrapped", "lightning", "dcp", "flat dcp", "safetensors", "hugging face"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_place_fills_a_model(tmp_path, brought, kind):
    model = net(2)
    assert weights.load(model, brought(make_place(kind, tmp_path))) == ()
    same(model, net(1))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("place", [
    "", "/", "/checkpoints/step-00000003.0001", "/checkpoints/step-00000003.0001/manifest.json",
])  # fmt: skip
def test_a_run_of_ours_and_its_checkpoints_fill_a_model(tmp_path, brought, place):
    run = a_run(tmp_path / "run", {2: net(7), 3: net(1)})
    model = net(2)
    weights.load(model, brought(run) + place)
    same(model, net(1))


def test_a_checkpoint_that_was_copied_to_a_folder_of_any_name_fills_a_model(tmp_path, brought):
    run = a_run(tmp_path / "run", {3: net(1)})
    shutil.move(run / "checkpoints" / "step-00000003.0001", tmp_path / "best one")
    model = net(2)
    weights.load(model, brought(tmp_path / "best one"))
    same(model, net(1))


def test_a_damaged_manifest_is_passed_over_and_told(tmp_path):
    run = a_run(tmp_path / "run", {2: net(1), 3: net(7)})
    manifests = sorted(run.glob("checkpoints/*/manifest.json"))
    manifests[1].write_text("{}")
    model = net(2)
    (text,) = weights.load(model, str(run))
    assert "step-00000003.0001/manifest.json" in text
    same(model, net(1))
    manifests[0].write_text("{}")
    with pytest.raises(CheckpointError, match="has checkpoints and none of them is whole"):
        weights.load(model, str(run))


def test_damaged_bytes_of_ours_are_never_taken(tmp_path):
    run = a_run(tmp_path / "run", {3: net(1)})
    (shard,) = run.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="do not match their checksum"):
        weights.load(net(2), str(run))


@pytest.mark.parametrize("name", ["absent", "text", "folder"])
def test_a_place_without_weights_is_a_mistake_in_the_configuration(tmp_path, name):
    (tmp_path / "text").write_text("weights, honestly")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"init.weights=.*{name} .*no safetensors file or folder"):
        weights.load(net(1), str(tmp_path / name))


def test_a_place_that_is_not_there_is_told_before_anything_runs(tmp_path):
    def problems(place):
        run = Run(name="a", run_dir="runs/a", init=Init(weights=place))
        return [problem.text for problem in build.check(run)]

    (tmp_path / "a").mkdir()
    for place in (str(tmp_path / "a"), f"file://{tmp_path}/a", "s3://bucket/only/asked/later"):
        assert problems(place) == []
    assert problems("absent.pt") == ["'absent.pt' is not a file or folder"]


# --- what fits ---------------------------------------------------------------------------------


def test_nothing_is_changed_where_something_does_not_fit(tmp_path):
    state = nn.Linear(3, 3).state_dict() | {"weight": torch.zeros(4, 3)}
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"size mismatch for weight: \[4, 3\] there, \[3, 3\] in"):
        weights.load(model, save_torch(tmp_path / "a.pt", state))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_many_that_do_not_fit_are_counted(tmp_path):
    wide, narrow = (nn.Sequential(*(nn.Linear(n, n) for _ in range(4))) for n in (4, 3))
    with pytest.raises(ConfigError, match=r"a\.pt does not fit this model: .*; 4 more") as caught:
        weights.load(narrow, save_torch(tmp_path / "a.pt", wide.state_dict()))
    assert str(caught.value).count("size mismatch") == 4


def test_floating_point_numbers_are_converted_and_nothing_else(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    weights.load(target, save_torch(tmp_path / "a.pt", source.bfloat16().state_dict()))
    assert target.weight.dtype == torch.float32
    assert torch.equal(target.weight, source.weight.float())
    state = {"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}
    with pytest.raises(
        ConfigError, match=r"weight is torch.int64 there, torch.float32 in the model"
    ):
        weights.load(target, save_torch(tmp_path / "b.pt", state))


@pytest.mark.parametrize("left_out", ["embed.weight", "head.weight"])
def test_a_tied_name_may_be_left_out(tmp_path, left_out):
    state = net(1).state_dict()
    del state[left_out]
    model = net(2)
    weights.load(model, save_torch(tmp_path / "a.pt", state))
    same(model, net(1))


class Counting(nn.Linear):
    """A module with a state of its own that is no tensor."""

    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_is_taken_where_it_is_there(tmp_path):
    state = Counting(3).state_dict()
    model = Counting(5)
    weights.load(model, save_torch(tmp_path / "a.pt", {"model": state}))
    assert model.extra == 3
    weights.load(model, save_torch(tmp_path / "b.pt", nn.Linear(2, 2).state_dict()))
    assert model.extra == 3
    weights.load(model, str(a_run(tmp_path / "run", {1: Counting({"a": (1, 2)})})))
    assert model.extra == {"a": (1, 2)}
    with pytest.raises(ConfigError, match=r'"_extra_state\.a" is a part of a module'):
        weights.load(model, save_torch(tmp_path / "c.pt", Counting({"a": 1}).state_dict()))


def test_extra_state_that_is_a_tensor_is_needed(tmp_path):
    model = Counting(torch.zeros(2))
    weights.load(model, save_torch(tmp_path / "a.pt", Counting(torch.ones(2)).state_dict()))
    assert torch.equal(model.extra, torch.ones(2))
    with pytest.raises(ConfigError, match='it lacks "_extra_state"'):
        weights.load(model, save_torch(tmp_path / "b.pt", nn.Linear(2, 2).state_dict()))


def test_a_folder_with_an_index_is_meant_as_a_whole(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    for name, value in state.items():
        safetensors.torch.save_file({name: value}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = nn.Linear(2, 2)
    weights.load(model, str(tmp_path))
    assert torch.equal(model.weight, state["weight"])
