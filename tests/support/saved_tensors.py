"""Checkpoints of named tensors, saved and loaded in one process."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import checkpoint
from trainer.checkpoint import lineage, state_tree
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.storage import Store

MIB = 1 << 20
SMALL = {"w": torch.arange(1000.0), "n": torch.tensor(3)}
VALUES = {
    "a": torch.arange(5 * MIB // 8 + 3, dtype=torch.int64),  # six blocks, the last one small
    "b": torch.arange(700, dtype=torch.float32),
    "c": torch.arange(5, dtype=torch.uint8),
    "d": torch.arange(MIB + 1, dtype=torch.int32).to(torch.uint8),  # a last block of one byte
}


def writer_on(store: Store) -> Writer:
    return Writer(store, World(), lineage.begin(store, {}))


def save(writer: Writer, tensors: dict[str, Tensor], step: int = 1, **more: Any) -> Any:
    return checkpoint.save(writer, Content(tensors=tensors, **more), step=step)


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types as which tensors of any dtype can be created and copied, by size."""


def from_bits(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor with these bytes; torch can create few dtypes directly."""
    if not data:
        return torch.empty(0, dtype=INTEGERS.get(dtype.itemsize, dtype)).view(dtype).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(tuple(shape))


def ones(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor in which every byte is one."""
    return from_bits(b"\1" * (math.prod(shape) * dtype.itemsize), dtype, shape)


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    bits = plain.view(INTEGERS.get(plain.element_size(), plain.dtype))
    return bits.clone(memory_format=torch.contiguous_format).view(plain.dtype)


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(copied(tensor).reshape(-1).view(torch.uint8).numpy())


def restore_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    objects: Mapping[str, Any],
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[Mapping[str, Tensor]], object],
    fetch: Callable[[str], Tensor],
) -> None:
    """Restore optimizers as a resume without changes does.

    Args:
        model: the unwrapped module.
        optimizers: they hold its parameters.
        objects: the stored `optimizer` object.
        stored: dtype and shape of each stored optimizer tensor, by name.
        read: fills tensors by stored name.
        fetch: returns a stored tensor.
    """
    state_tree.check_groups(model, optimizers, objects["groups"])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, saved in zip(groups, objects["groups"], strict=True):
        values = {key: value for key, value in saved.items() if key != "params"}
        group.update(state_tree.join(values, fetch))
    slots = state_tree.optimizer_slots(model, optimizers, stored)
    read({name: slot.tensor for name, slot in slots.items()})
    state_tree.load_optimizer_state(model, optimizers, objects["state"], slots, fetch)


def fetch_optimizer(
    store: Store, manifest: Manifest, model: nn.Module, optimizer: Optimizer
) -> None:
    """Restore an optimizer from a checkpoint."""
    reader = Reader(store, f"checkpoints/{manifest.folder}", manifest)
    stored = {
        name: (TORCH_DTYPES[entry.dtype], entry.shape)
        for name, entry in manifest.tensors.items()
        if name.startswith("optimizer.")
    }
    objects = manifest.objects["optimizer"]
    restore_optimizers(model, [optimizer], objects, stored, reader.read, reader.fetch)


def blank(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype that holds something else."""
    return ones(tensor.shape, tensor.dtype)


def load_all(store: Store, tensors: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
    actual = checkpoint.latest(store)
    assert actual is not None
    targets = {name: blank(tensor) for name, tensor in tensors.items()}
    checkpoint.load(store, actual, targets, **how)
    return targets


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert raw_bytes(actual[name]) == raw_bytes(tensor), name


def keys_on(store: Store, folder: str = "checkpoints") -> set[str]:
    return set(store.list(folder))
