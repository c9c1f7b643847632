"""Exported weights: clean names, complete files, and the requested checkpoint."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from support.state_dicts import net
from torch import nn

from trainer.checkpoint import Content, DamagedError, Writer, lineage, save, state_tree
from trainer.checkpoint.dcp import PerdureStorageWriter
from trainer.cluster.world import World
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.export.__main__ import main
from trainer.export.exporting import export
from trainer.export.loaded_checkpoint import open_checkpoint
from trainer.importing.name_matching import clean_names
from trainer.storage import open_store


def a_run(folder, models, *, accuracy=None):
    """Write a checkpoint of each {step: model}; return the run's directory as text.

    `accuracy` maps steps to accuracies; if given, the run tracks the metric.
    """
    store = open_store(str(folder))
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    writer = Writer(store, World(), attempt)
    for step, model in models.items():
        state = State(step=step)
        if step in (accuracy or {}):
            state.evaluated({"accuracy": accuracy[step]}, metric="accuracy", mode="max")
        content = Content(objects={"run": state.state_dict()})
        state_tree.add_model(content, model, with_buffers=True)
        config = {"checkpoint": {"metric": None if accuracy is None else "accuracy"}}
        save(writer, content, step=step, config=config)
    return str(folder)


def same(model, weights):
    expected = model.state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value), name


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("form", ["safetensors", "state_dict"])
def test_export_loads_strictly_into_the_plain_model(tmp_path, form):
    run = a_run(tmp_path / "run", {3: net(1)})
    done = export(run, form)
    path = done.path
    assert path.parent == tmp_path / "run" / "exports"
    assert path.stem == "step-00000003"
    weights = load(path)
    assert done.tensors == len(weights) == len(net(0).state_dict())
    plain = net(2)
    plain.load_state_dict(weights, strict=True)
    same(net(1), plain.state_dict())


def test_shared_storage_stays_shared_in_a_state_dict(tmp_path):
    path = export(a_run(tmp_path / "run", {3: net(1)}), "state_dict").path
    weights = torch.load(path, weights_only=True)
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


def test_export_bytes_do_not_depend_on_the_file_name(tmp_path):
    run = a_run(tmp_path / "run", {3: net(1)})
    for form in ("safetensors", "state_dict"):
        first = export(run, form, "latest", str(tmp_path / "no_suffix")).path
        second = export(run, form, "latest", str(tmp_path / "other.bin")).path
        assert first.read_bytes() == second.read_bytes()


def test_safetensors_package_opens_the_file(tmp_path):
    path = export(a_run(tmp_path / "run", {3: net(1)}), "safetensors").path
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(net(0).state_dict())


@pytest.mark.parametrize(("step", "seed"), [("latest", 30), ("10", 10), ("best", 20)])
def test_export_writes_the_requested_step(tmp_path, step, seed):
    models = {at: net(at) for at in (10, 20, 30)}
    run = a_run(tmp_path / "run", models, accuracy={10: 0.7, 20: 0.9, 30: 0.9})
    path = export(run, "safetensors", step, "").path
    assert path.name == f"step-{seed:08d}.safetensors"
    same(models[seed], load(path))


@pytest.mark.parametrize(("step", "accuracy", "error", "text"), [
    ("15", None, ConfigError, "no checkpoint of that step in .* available: 10, 20"),
    ("lates", None, ConfigError, "no checkpoint of that step in .* available: 10, 20"),
    ("-1", None, ConfigError, "no checkpoint of that step in .* available: 10, 20"),
    ("best", None, ConfigError, "tracks no metric"),
    ("best", {}, CheckpointError, "no checkpoint in .* has 'accuracy' measured at its own step"),
])  # fmt: skip
def test_missing_step_raises_error_with_existing_steps(tmp_path, step, accuracy, error, text):
    run = a_run(tmp_path / "run", {10: net(1), 20: net(2)}, accuracy=accuracy)
    with pytest.raises(error, match=text):
        open_checkpoint(run, step)


def test_directory_without_checkpoints_raises_config_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_checkpoint(str(tmp_path / "none"), "latest")
    (tmp_path / "empty/attempts").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no committed checkpoint"):
        open_checkpoint(str(tmp_path / "empty"), "latest")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_of_another_loop_is_exported_if_it_has_a_model(tmp_path, capsys):
    model = net(1)
    state = {"model": model.state_dict(), "step": 3}
    dcp.save(state, storage_writer=PerdureStorageWriter(tmp_path / "mine/step-3"))
    assert main([str(tmp_path / "mine"), f"out={tmp_path / 'a.safetensors'}"]) == 0
    same(model, load_file(tmp_path / "a.safetensors"))
    dcp.save({"w": torch.ones(2)}, storage_writer=PerdureStorageWriter(tmp_path / "step-4"))
    assert main([str(tmp_path / "step-4")]) == 2
    assert "so it has no model to export" in capsys.readouterr().err


def test_out_names_the_file_and_replaces_an_existing_one(tmp_path):
    run = a_run(tmp_path / "run", {3: net(1)})
    out = tmp_path / "deep" / "weights.bin"
    out.parent.mkdir()
    out.write_text("old")
    path = export(run, "safetensors", "latest", str(out)).path
    assert path == out
    same(net(1), load_file(out))
    assert sorted(p.name for p in out.parent.iterdir()) == ["weights.bin", "weights.bin.json"]
    assert not (tmp_path / "run" / "exports").exists()


@pytest.mark.parametrize("form", ["safetensors", "state_dict"])
@pytest.mark.parametrize("out", ["file/weights", "folder", "x" * 250])
def test_unwritable_out_raises_config_error_and_leaves_no_files(tmp_path, out, form):
    run = a_run(tmp_path / "run", {3: net(1)})
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        export(run, form, "latest", str(tmp_path / out))
    assert sorted(path.name for path in tmp_path.rglob("*.tmp*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "run"]


def test_damaged_checkpoint_is_not_exported(tmp_path):
    run = a_run(tmp_path / "run", {3: net(1)})
    (shard,) = (tmp_path / "run").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError):
        export(run, "safetensors", "latest", "")
    assert not (tmp_path / "run" / "exports").exists()


# --- the command -------------------------------------------------------------------------------


def test_command_prints_path_tensors_and_bytes(tmp_path, capsys):
    run = a_run(tmp_path / "run", {1200: nn.Linear(300, 5)})
    assert main([run, "format=state_dict"]) == 0
    path = f"{run}/exports/step-00001200.pt"
    size = os.path.getsize(path)
    assert capsys.readouterr().out == f"{path}: 2 tensors, {size:,} bytes\n"


@pytest.mark.parametrize(("arguments", "text"), [
    (["RUN", "fromat=safetensors"], "no option 'fromat' (did you mean 'format'?)"),
    (["RUN", "format=safetensor"], "unknown format 'safetensor' (did you mean 'safetensors'?)"),
    (["RUN", "format="], "unknown format ''"),
    (["step=3"], "1 path needed, 0 given"),
    (["RUN", "OTHER"], "1 path needed, 2 given"),
    (["RUN", "step=7"], "step=7: "),
    (["/nowhere/at/all"], "does not exist"),
])  # fmt: skip
def test_command_with_wrong_argument_exits_2_with_one_message(tmp_path, capsys, arguments, text):
    run = a_run(tmp_path / "run", {3: nn.Linear(2, 2)})
    assert main([run if argument == "RUN" else argument for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert text in captured.err


def test_help_exits_0_and_no_arguments_exit_2(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("usage: python -m trainer.export RUN") == 2


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "cleaned"), [
    (["a.weight", "a.bias"], ["a.weight", "a.bias"]),
    (["module.a", "module.b"], ["a", "b"]),
    (["module.a", "b"], ["module.a", "b"]),  # a submodule that the user named so
    (["a.module.w", "a.b"], ["a.module.w", "a.b"]),
    (["module.a.module.w", "module.b"], ["a.module.w", "b"]),
    (["module.module.a"], ["a"]),
    (["modules.a", "modules.b"], ["modules.a", "modules.b"]),
    (["_orig_mod.a", "b"], ["a", "b"]),
    (["a._orig_mod.w", "b"], ["a.w", "b"]),
    (["_orig_mod._orig_mod.a._orig_mod.w"], ["a.w"]),
    (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
    (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
    (["module._orig_mod.module.a"], ["a"]),
    (["module._orig_mod.module.a", "module.b"], ["module.a", "b"]),
    (["a._fsdp_wrapped_module._checkpoint_wrapped_module.w"], ["a.w"]),
    (["my_orig_mod.a", "_orig_modular.b"], ["my_orig_mod.a", "_orig_modular.b"]),
    (["_orig_mod"], ["_orig_mod"]),
    ([], []),
])  # fmt: skip
def test_clean_names_removes_only_wrapper_prefixes(names, cleaned):
    assert clean_names(names) == dict(zip(names, cleaned, strict=True))


@pytest.mark.parametrize("names", [["_orig_mod.a", "a"], ["a._orig_mod.w", "_orig_mod.a.w"]])
def test_clean_names_with_collision_raises(names):
    with pytest.raises(CheckpointError, match="two tensors have the name 'a"):
        clean_names(names)


def test_export_of_wrapped_model_has_plain_names(tmp_path):
    linear = nn.Linear(2, 3)
    wrapped = nn.Module()
    wrapped.module = torch.compile(
        linear, backend="eager"
    )  # as DDP around a compiled model names it
    path = export(a_run(tmp_path / "run", {1: wrapped}), "state_dict").path
    same(linear, torch.load(path, weights_only=True))
