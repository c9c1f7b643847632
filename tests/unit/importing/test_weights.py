"""Loading weights into a model: any source, any prefix, exact or rejected."""

import json
import pickle
import shutil
import sys
import types
import warnings

import pytest
import safetensors.torch
import torch
from support.state_dicts import Bomb, brought, net, oneflow_folder, save_dcp, save_torch
from torch import nn

from trainer.checkpoint import Content, DamagedError, Writer, lineage, save, state_tree
from trainer.cluster.world import World
from trainer.config.schema import Init, Run
from trainer.errors import CheckpointError, ConfigError
from trainer.importing import weights
from trainer.storage import open_store
from trainer.training import build

__all__ = ["brought"]


def load(model, source, **how):
    return weights.load(model, Init(weights=str(source), **how))


def same(model, other):
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# --- where they come from ----------------------------------------------------------------------


def a_run(folder, models):
    """Write a checkpoint of each {step: model}; return the run's directory."""
    store = open_store(str(folder))
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    writer = Writer(store, World(), attempt)
    for step, model in models.items():
        content = Content(objects={"run": {}})
        state_tree.add_model(content, model, with_buffers=True)
        state_tree.add_optimizers(content, model, [trained(model)])
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
    if kind == "oneflow":
        return oneflow_folder(folder / "of", state)
    (folder / "hf").mkdir()
    names = sorted(state)
    for number, some in enumerate((names[:5], names[5:])):
        part = {name: state[name].clone() for name in some}
        safetensors.torch.save_file(part, folder / "hf" / f"{number}.safetensors")
    return folder / "hf"


KINDS = ["torch", "wrapped", "lightning", "dcp", "flat dcp", "safetensors", "hugging face",
         "oneflow"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_place_fills_a_model(tmp_path, brought, kind):
    model = net(2)
    assert load(model, brought(make_place(kind, tmp_path))).skipped == ()
    same(model, net(1))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("source", [
    "", "/", "/checkpoints/step-00000003.0001", "/checkpoints/step-00000003.0001/manifest.json",
])  # fmt: skip
def test_run_and_its_checkpoints_fill_a_model(tmp_path, brought, source):
    run = a_run(tmp_path / "run", {2: net(7), 3: net(1)})
    model = net(2)
    load(model, brought(run) + source)
    same(model, net(1))


def test_copied_checkpoint_folder_fills_a_model(tmp_path, brought):
    run = a_run(tmp_path / "run", {3: net(1)})
    shutil.move(run / "checkpoints" / "step-00000003.0001", tmp_path / "best one")
    model = net(2)
    load(model, brought(tmp_path / "best one"))
    same(model, net(1))


def test_damaged_manifest_is_skipped_and_reported(tmp_path):
    run = a_run(tmp_path / "run", {2: net(1), 3: net(7)})
    manifests = sorted(run.glob("checkpoints/*/manifest.json"))
    manifests[1].write_text("{}")
    model = net(2)
    (text,) = load(model, run).skipped
    assert "step-00000003.0001/manifest.json" in text
    same(model, net(1))
    manifests[0].write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        load(model, str(run))


def test_damaged_checkpoint_bytes_are_never_loaded(tmp_path):
    run = a_run(tmp_path / "run", {3: net(1)})
    (shard,) = run.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum mismatch"):
        load(net(2), str(run))


@pytest.mark.parametrize("name", ["absent", "text", "folder"])
def test_path_without_weights_is_a_configuration_error(tmp_path, name):
    (tmp_path / "text").write_text("weights, honestly")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"init.weights=.*{name}.*no safetensors file or folder"):
        load(net(1), str(tmp_path / name))


def test_missing_path_is_reported_before_the_run_starts(tmp_path):
    def problems(source):
        run = Run(name="a", run_dir="runs/a", init=Init(weights=source))
        return [problem.text for problem in build.check(run)]

    (tmp_path / "a").mkdir()
    for source in (str(tmp_path / "a"), f"file://{tmp_path}/a", "s3://bucket/only/asked/later"):
        assert problems(source) == []
    assert problems("absent.pt") == ["'absent.pt' is not a file or folder"]


# --- what fits ---------------------------------------------------------------------------------


def test_nothing_is_changed_where_something_does_not_fit(tmp_path):
    state = nn.Linear(3, 3).state_dict() | {"weight": torch.zeros(4, 3)}
    model = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"weight  shape \[4, 3\] in the file, \[3, 3\] in"):
        load(model, save_torch(tmp_path / "a.pt", state))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_many_that_do_not_fit_are_counted(tmp_path):
    wide, narrow = (nn.Sequential(*(nn.Linear(n, n) for _ in range(6))) for n in (4, 3))
    with pytest.raises(ConfigError, match=r"a\.pt does not fit this model: no tensor") as caught:
        load(narrow, save_torch(tmp_path / "a.pt", wide.state_dict()))
    assert str(caught.value).count("in the model") == 8
    assert "misfit       12 tensors" in str(caught.value)
    assert "and 4 more" in str(caught.value)


def test_floating_point_numbers_are_converted_and_nothing_else(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load(target, save_torch(tmp_path / "a.pt", source.bfloat16().state_dict()))
    assert target.weight.dtype == torch.float32
    assert torch.equal(target.weight, source.weight.float())
    state = {"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}
    with pytest.raises(ConfigError, match=r"weight  torch.int64 in the file, torch.float32 in"):
        load(target, save_torch(tmp_path / "b.pt", state))


@pytest.mark.parametrize("left_out", ["embed.weight", "head.weight"])
def test_tied_name_may_be_absent(tmp_path, left_out):
    state = net(1).state_dict()
    del state[left_out]
    model = net(2)
    load(model, save_torch(tmp_path / "a.pt", state))
    same(model, net(1))


class Counting(nn.Linear):
    """Module with extra state that is not a tensor."""

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
    load(model, save_torch(tmp_path / "a.pt", {"model": state}))
    assert model.extra == 3
    load(model, save_torch(tmp_path / "b.pt", nn.Linear(2, 2).state_dict()))
    assert model.extra == 3
    load(model, str(a_run(tmp_path / "run", {1: Counting({"a": (1, 2)})})))
    assert model.extra == {"a": (1, 2)}
    with pytest.raises(ConfigError, match=r'"_extra_state\.a" is part of a module'):
        load(model, save_torch(tmp_path / "c.pt", Counting({"a": 1}).state_dict()))


def test_extra_state_that_is_a_tensor_is_needed(tmp_path):
    model = Counting(torch.zeros(2))
    load(model, save_torch(tmp_path / "a.pt", Counting(torch.ones(2)).state_dict()))
    assert torch.equal(model.extra, torch.ones(2))
    with pytest.raises(ConfigError, match=r"missing      1 tensor not in the file\n *_extra_state"):
        load(model, save_torch(tmp_path / "b.pt", nn.Linear(2, 2).state_dict()))


def test_folder_with_an_index_is_loaded_completely(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    for name, value in state.items():
        safetensors.torch.save_file({name: value}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = nn.Linear(2, 2)
    load(model, str(tmp_path))
    assert torch.equal(model.weight, state["weight"])


# --- skipped tensors and partial matches -----------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, classes, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.fc = nn.Linear(3, classes)


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_skipped_head_keeps_its_initial_values(tmp_path):
    source, model = Classifier(1000, seed=1), Classifier(10, seed=2)
    before = values(model)
    lines = load(model, save_torch(tmp_path / "a.pt", source.state_dict()), skip=["fc.*"]).lines
    for name, value in model.state_dict().items():
        expected = before if name.startswith("fc.") else source.state_dict()
        assert torch.equal(value, expected[name]), name
    assert (
        "\n".join(lines)
        == f"""\
init.weights={tmp_path}/a.pt, a torch.save file:
  loaded       7 of 9 tensors, 28 elements
  skipped      2 tensors (init.skip)
                 fc.weight
                 fc.bias"""
    )


def test_matching_tensors_are_loaded_and_others_listed(tmp_path):
    source, model = Classifier(1000, seed=1), Classifier(10, seed=2)
    state = source.state_dict()
    state["fcs.bias"] = state.pop("fc.bias")
    del state["body.0.bias"]
    source, before = save_torch(tmp_path / "a.ckpt", {"state_dict": state}), values(model)
    with pytest.raises(ConfigError) as caught:
        load(model, source)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    table = f"""\
init.weights={source}, a torch.save file, prefix "state_dict.":
  loaded       6 of 9 tensors, 25 elements
  missing      2 tensors not in the file
                 body.0.bias  nearest: body.1.bias
                 fc.bias      nearest: fcs.bias
  unexpected   1 tensor not in the model
                 fcs.bias  nearest: fc.bias
  misfit       1 tensor
                 fc.weight  shape [1000, 3] in the file, [10, 3] in the model"""
    assert table in str(caught.value)
    for way in ("init.skip=[fc.*]", "init.rename={old.*:new.*}", "init.strict=false"):
        assert way in str(caught.value)
    assert "\n".join(load(model, source, strict=False).lines) == table
    for name, value in model.state_dict().items():
        is_loaded = name.startswith("body") and name != "body.0.bias"
        assert torch.equal(value, (state if is_loaded else before)[name]), name


def test_weights_without_any_match_are_rejected_even_if_not_strict(tmp_path):
    source = save_torch(tmp_path / "a.pt", {"x.weight": torch.ones(2), "fc.weight": torch.ones(1)})
    with pytest.raises(
        ConfigError, match=r"does not fit this model: no tensor in the file matches\n"
    ):
        load(Classifier(10), source, strict=False)


def test_two_halves_that_are_as_good_are_not_chosen_between(tmp_path):
    state = Classifier(1000, seed=1).state_dict()
    del state["body.0.bias"]
    both = {**under("student.", state), **under("teacher.", Classifier(1000, seed=3).state_dict())}
    del both["teacher.body.0.bias"]
    source, model = save_torch(tmp_path / "a.pt", both), Classifier(10)
    with pytest.raises(ConfigError, match=r'prefix "teacher\." matches as many'):
        load(model, source, strict=False, skip=["fc.*"])
    load(model, source, strict=False, skip=["fc.*"], rename={"teacher.*": ""})
    assert torch.equal(model.body[0].weight, state["body.0.weight"])


def test_long_lists_are_folded(tmp_path):
    source = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(200)))
    with pytest.raises(ConfigError) as caught:
        load(source[:3], save_torch(tmp_path / "a.pt", source.state_dict()))
    assert "unexpected   197 tensors not in the model" in str(caught.value)
    assert "and 189 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 14


def test_names_of_others_are_made_the_models(tmp_path):
    source, model = Classifier(10, seed=1), Classifier(10, seed=2)
    state = {n.replace("body", "trunk").replace("fc", "head"): v
             for n, v in source.state_dict().items()}  # fmt: skip
    state |= {"decoder.weight": torch.ones(2)}
    rename = {"trunk.*": "body.*", "head.*": "fc.*", "decoder.*": ""}
    load(model, save_torch(tmp_path / "a.pt", {"model": state}), rename=rename)
    same(model, source)


# --- pickles -----------------------------------------------------------------------------------


def test_pickle_runs_only_with_allow_pickle_and_a_warning(tmp_path):
    state = {"state_dict": Classifier(10, seed=1).state_dict(), "x": Bomb(tmp_path / "bomb")}
    source, model = save_torch(tmp_path / "a.ckpt", state), Classifier(10, seed=2)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"posix\.system.*init\.allow_pickle=true executes"):
        load(model, source, strict=False)
    assert not (tmp_path / "bomb").exists()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    warnings_given = []

    def warn(text):
        assert not (tmp_path / "bomb").exists()
        warnings_given.append(text)

    weights.load(model, Init(weights=source, allow_pickle=True), warn=warn)
    assert (tmp_path / "bomb").exists()
    assert len(warnings_given) == 1
    assert "executes any code in it" in warnings_given[0]
    same(model, Classifier(10, seed=1))


def test_pickle_in_a_folder_is_never_run(tmp_path):
    folder = save_dcp(tmp_path / "dcp", Classifier(10).state_dict())
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    with pytest.raises(CheckpointError, match=r"posix\.system, which no DCP") as caught:
        load(Classifier(10), folder, allow_pickle=True)
    assert "allow_pickle" not in str(caught.value)
    assert not (tmp_path / "bomb").exists()


def test_file_without_pickle_gives_no_warning(tmp_path):
    source = save_torch(tmp_path / "a.pt", Classifier(10).state_dict())
    warnings_given = []
    weights.load(
        Classifier(10), Init(weights=source, allow_pickle=True), warn=warnings_given.append
    )
    assert warnings_given == []


@pytest.mark.parametrize(
    "container", [lambda module: module, lambda module: {"ema": {"m": module}}]
)
def test_pickled_module_is_rejected_unless_allow_pickle(tmp_path, container):
    source = save_torch(tmp_path / "a.pt", container(Classifier(10, seed=1)))
    model = Classifier(10, seed=2)
    beginning = "a pickled" if not isinstance(container(0), dict) else "needs"
    with pytest.raises(
        CheckpointError,
        match=rf"{beginning} (tests\.unit\.importing\.)?test_weights\.Classifier.*allow_pickle",
    ):
        load(model, source)
    load(model, source, allow_pickle=True)
    same(model, Classifier(10, seed=1))


def test_exported_program_is_rejected_with_a_message(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(exported, tmp_path / "exported.pt2")
    for name in ("script.pt", "exported.pt2"):
        with pytest.raises(
            CheckpointError, match=rf"{name} is a program .*only weights are supported"
        ):
            load(nn.Linear(2, 2), tmp_path / name, allow_pickle=True)


def test_pickle_without_its_code_gives_a_single_message(tmp_path):
    module = types.ModuleType("gone")
    exec("class Gone: pass", module.__dict__)
    sys.modules["gone"] = module
    try:
        source = save_torch(tmp_path / "a.pt", {"x": module.Gone()})
    finally:
        del sys.modules["gone"]
    with pytest.raises(CheckpointError, match=r"No module named 'gone'.*Python's path"):
        load(nn.Linear(2, 2), source, allow_pickle=True)
