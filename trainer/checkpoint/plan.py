"""Which rank writes which tensors: torch's DCP planners deduplicate and balance, once a layout."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import TensorEntry
from trainer.distributed import World

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.complex128: "C128",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TORCH_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Plan:
    """A division of the work that holds until names, shapes, dtypes or world size change.

    Holds names, never tensors: optimizers replace their state tensors.
    """

    digest: str
    """Of this rank's names, dtypes and shapes."""
    mine: frozenset[str]
    """Names that this rank writes."""
    layout: shard.Layout
    """This rank's shard."""
    entries: Mapping[str, TensorEntry]
    """All tensors, by name; the file is the rank's number."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, dtypes and shapes, in order."""
    text = repr([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make(tensors: Mapping[str, Tensor], world: World, previous: Plan | None = None) -> Plan:
    """Plan who writes what, or return `previous` if it still fits on every rank. Collective."""
    current = digest(tensors)
    if all(world.gather(previous is not None and previous.digest == current)) and previous:
        return previous
    from torch.distributed.checkpoint.default_planner import (
        DefaultSavePlanner,
    )  # imported at the first save

    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), None, world.rank == 0)
    local = world.gather(planner.create_local_plan())

    def divide() -> list[list[tuple[str, str, tuple[int, ...]]]]:
        plans, _ = planner.create_global_plan(local)
        return [[_describe(item) for item in plan.items] for plan in plans]

    divided = world.from_rank0(divide)
    entries = {
        name: TensorEntry(dtype=dtype, shape=shape, file=rank)
        for rank, items in enumerate(divided)
        for name, dtype, shape in items
    }
    mine = divided[world.rank]
    return Plan(current, frozenset(name for name, _, _ in mine), shard.lay_out(mine), entries)


def _describe(item: Any) -> tuple[str, str, tuple[int, ...]]:
    data = item.tensor_data
    return item.index.fqn, DTYPE_NAMES[data.properties.dtype], tuple(data.size)
