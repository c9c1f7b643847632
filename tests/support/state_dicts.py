"""State dicts as other programs save them, and what compares them with what was read."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from trainer.importing import oneflow
from trainer.storage import open_store


class Net(nn.Module):
    """Parameters, buffers of several dtypes, and two names for one storage."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.half = nn.Linear(4, 4).bfloat16()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))


def net(seed):
    """Make a Net whose weights and counter are functions of the seed."""
    torch.manual_seed(seed)
    model = Net()
    model.norm.num_batches_tracked += seed
    return model


def a_state():
    torch.manual_seed(0)
    return {
        "model": {
            "w": torch.randn(5, 3),
            "half": torch.randn(4).bfloat16(),
            "scalar": torch.tensor(7),
            "empty": torch.empty(0, 4),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {
            "state": {"w": {"exp_avg": torch.ones(5, 3), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}],
        },
        "epoch": 3, "name": "a", "none": None, "numbers": [1, 2],
    }  # fmt: skip


def save_dcp(folder, state, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing process group
        writer = dcp.FileSystemWriter(str(folder), **options)
        dcp.save(state, storage_writer=writer, no_dist=True)
    return str(folder)


def save_torch(path, state, **options):
    torch.save(state, path, **options)
    return str(path)


def oneflow_folder(folder, tensors):
    """Write tensors as OneFlow does."""
    kinds = {dtype: name for name, (_, dtype) in oneflow.KINDS.items()}
    for name, tensor in tensors.items():
        (folder / name).mkdir(parents=True)
        flat = tensor.detach().contiguous().reshape(-1)
        (folder / name / "out").write_bytes(flat.view(torch.uint8).numpy().tobytes())
        dims = " ".join(f"dim: {dim}" for dim in tensor.shape)
        meta = f"shape {{ {dims} }} data_type: {kinds[tensor.dtype]}"
        (folder / name / "meta").write_text(meta)
    (folder / "snapshot_done").touch()
    return folder


def to_memory(path):
    """Copy a file or folder into fsspec's memory; return its URL there."""
    path = Path(path)
    store = open_store(f"memory:/{path.parent}")
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        store.replace(file.relative_to(path.parent).as_posix(), file.read_bytes())
    return f"{store.url}/{path.name}"


def nested(source):
    """Return the nested state of a source; missing list items are None."""
    top = {}
    for name, path in source.paths.items():
        is_tensor = name in source.tensors or name in source.aliases
        node = top
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = source.fetch(name) if is_tensor else source.objects[name]
    return top


def same(actual, expected):
    """Compare two nests; lists that hold tensors or dicts come back as dicts of their indexes."""
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict) and expected:
        assert list(actual) == list(map(str, expected))
        for key, value in expected.items():
            same(actual[str(key)], value)
    elif isinstance(actual, dict) and isinstance(expected, (list, tuple)):
        assert list(actual) == list(range(len(expected)))
        for index, value in enumerate(expected):
            same(actual[index], value)
    else:
        assert (type(actual), actual) == (type(expected), expected)


class Bomb:
    """Pickled, it is a program that writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture(params=["local", "memory"])
def brought(request):
    """A function that brings a local path to where the test reads it; returns its URL."""
    return to_memory if request.param == "memory" else str
