"""Models and optimizers as checkpoint content: tied weights, buffers, optimizer state."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saved_tensors import assert_equal, fetch_optimizer, raw_bytes, writer_on
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import state_tree
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.state_tree import Content
from trainer.errors import CheckpointError
from trainer.storage import LocalStore


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_under_two_names(tmp_path):
    store = LocalStore(tmp_path)
    model, content = Tied(), Content()
    state_tree.add_model(content, model, with_buffers=True)
    manifest = checkpoint.save(writer_on(store), content, step=1)
    assert manifest.tensors["model.head.weight"].alias == "model.embedding.weight"
    (name,) = manifest.files
    folder = f"checkpoints/{manifest.folder}"
    stored = Path(store.url, folder, name).read_bytes()
    assert stored.count(raw_bytes(model.embedding.weight)) == 1
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    assert_equal({key: Reader(store, folder, manifest).fetch(key) for key in expected}, expected)

    other = Tied()
    checkpoint.load(store, manifest, state_tree.model_targets(other))
    assert other.head.weight is other.embedding.weight
    assert_equal({f"model.{key}": value for key, value in other.state_dict().items()}, expected)


def test_buffers_are_omitted_on_other_ranks():
    content = Content()
    state_tree.add_model(content, Tied(), with_buffers=False)
    assert not [name for name in content.tensors if "running" in name or "tracked" in name]
    assert "model.layers.1.weight" in content.tensors


class Remembering(nn.Linear):
    """A module with extra state in addition to its parameters."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


def test_extra_state_with_tensors_is_restored(tmp_path):
    store = LocalStore(tmp_path)
    model, content = nn.Sequential(Remembering()), Content()
    model[0].memory = {"scale": [torch.tensor(2.5), (1, "a")], "count": {3: 4}}
    state_tree.add_model(content, model, with_buffers=True)
    manifest = checkpoint.save(writer_on(store), content, step=1)
    other = nn.Sequential(Remembering())
    reader = Reader(store, f"checkpoints/{manifest.folder}", manifest)
    reader.read(state_tree.model_targets(other))
    state_tree.load_model(other, manifest.objects, manifest.tensors, reader.fetch)
    assert other[0].memory == model[0].memory
    assert torch.equal(other[0].weight, model[0].weight)


class Averaging(nn.BatchNorm1d):
    """A module whose `state_dict` has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__(2)
        self.hidden = torch.zeros(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}hidden"] = self.hidden + 1

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.hidden = state.pop(f"{prefix}hidden") - 1
        super()._load_from_state_dict(state, prefix, *args)


def restored_from(folder: Path, model: nn.Module, other: nn.Module) -> None:
    """Save `model`, and load its checkpoint into `other`."""
    store, content = LocalStore(folder), Content()
    state_tree.add_model(content, model, with_buffers=True)
    checkpoint.save(writer_on(store), content, step=1)
    manifest = checkpoint.latest(store)
    reader = Reader(store, f"checkpoints/{manifest.folder}", manifest)
    reader.read(state_tree.model_targets(other))
    state_tree.load_model(other, manifest.objects, manifest.tensors, reader.fetch)


@pytest.mark.parametrize("memory", [torch.tensor([3.0, 4.0]), torch.tensor(5)])
def test_extra_state_that_is_a_new_tensor_is_handed_back(tmp_path, memory):
    class Fresh(Remembering):
        def get_extra_state(self) -> Any:
            return None if self.memory is None else self.memory.clone()

    model, other = (
        nn.Sequential(Fresh(), nn.BatchNorm1d(2)),
        nn.Sequential(Fresh(), nn.BatchNorm1d(2)),
    )
    model[0].memory = memory
    model(torch.randn(4, 2))
    restored_from(tmp_path / "absent-before", model, other)
    assert torch.equal(other[0].memory, memory)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))

    model[0].memory = torch.arange(7)
    restored_from(tmp_path / "other-shape", model, other)
    assert torch.equal(other[0].memory, torch.arange(7))


def test_extra_state_as_binary_stream_is_handed_back_at_its_start(tmp_path):
    model, other = nn.Sequential(Remembering()), nn.Sequential(Remembering())
    model[0].memory = {"quantizer": io.BytesIO(b"\x00abc")}
    model[0].memory["quantizer"].read()
    restored_from(tmp_path, model, other)
    assert other[0].memory["quantizer"].read() == b"\x00abc"


def test_tensor_computed_for_a_state_dict_is_loaded_by_its_module(tmp_path):
    model, other = nn.Sequential(Averaging()), nn.Sequential(Averaging())
    model[0].hidden += torch.tensor([1.0, 2.0])
    model(torch.randn(4, 2))
    restored_from(tmp_path, model, other)
    assert torch.equal(other[0].hidden, torch.tensor([1.0, 2.0]))
    assert torch.equal(other[0].running_mean, model[0].running_mean)


def test_stored_extra_state_without_a_module_is_rejected_by_name(tmp_path):
    model, other = nn.Sequential(Remembering()), nn.Sequential(nn.Linear(2, 2))
    model[0].memory = 3
    with pytest.raises(CheckpointError, match=r"0\._extra_state"):
        restored_from(tmp_path, model, other)


def test_save_of_new_optimizer_takes_no_step(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = {name: raw_bytes(value) for name, value in model.named_parameters()}
    content = Content()
    state_tree.add_model(content, model, with_buffers=True)
    state_tree.add_optimizers(content, model, [optimizer])
    checkpoint.save(writer_on(store), content, step=1)
    assert {name: raw_bytes(value) for name, value in model.named_parameters()} == before
    assert len(optimizer.state) == 0
    assert model.weight.grad is not None

    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    restored = checkpoint.latest(store)
    checkpoint.load(store, restored, state_tree.model_targets(other))
    fetch_optimizer(store, restored, other, fresh)
    assert len(fresh.state) == 0
    assert fresh.param_groups[0]["lr"] == 0.5
    assert {name: raw_bytes(value) for name, value in other.named_parameters()} == before


def test_optimizer_with_two_groups_is_restored_exactly(tmp_path):
    store = LocalStore(tmp_path)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.1, "betas": (0.8, 0.9)},
            {"params": [model[1].weight], "weight_decay": 0.5},
        ]
        return model, torch.optim.AdamW(groups)

    model, optimizer = make()
    for _ in range(2):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    content = Content()
    state_tree.add_optimizers(content, model, [optimizer])
    checkpoint.save(writer_on(store), content, step=1)
    other, fresh = make()
    fetch_optimizer(store, checkpoint.latest(store), other, fresh)
    expected, restored = optimizer.state_dict(), fresh.state_dict()
    assert restored["param_groups"] == expected["param_groups"]
    assert type(restored["param_groups"][0]["betas"]) is tuple
    assert set(restored["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        assert_equal(restored["state"][index], state)


def test_load_rejects_optimizer_with_other_groups(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    content = Content()
    state_tree.add_optimizers(content, model, [torch.optim.SGD(model.parameters())])
    manifest = checkpoint.save(writer_on(store), content, step=1)
    other = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(CheckpointError, match="2 groups"):
        fetch_optimizer(store, manifest, model, other)


def test_save_rejects_optimizer_parameter_outside_model():
    stray = nn.Parameter(torch.ones(2, 7))
    with pytest.raises(CheckpointError, match=r"\(2, 7\)"):
        state_tree.add_optimizers(Content(), nn.Linear(3, 2), [torch.optim.SGD([stray])])
