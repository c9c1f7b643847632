"""Save plan: the part of the state that each rank writes, computed once per layout.

torch's DCP planner reports which box of each tensor a rank holds. Every rank then computes which of
several holders writes a box, from information that all ranks have. Nothing is gathered about
evenly sharded tensors, so 512 ranks plan as fast as two.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import TensorEntry
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.errors import CheckpointError

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.complex128: "C128",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TORCH_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_SLACK = 1 / 128
"""Imbalance a rank may accept, as a fraction of its bytes, to avoid splitting a tensor."""
_SLACK_BYTES = 1 << 12
"""Minimum of that imbalance, in bytes."""


@dataclass(frozen=True)
class LocalTensor:
    """The part of a tensor that one rank holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Global shape."""
    box: Box
    """This rank's part."""
    holders: tuple[int, ...]
    """Ranks that hold the same box."""
    grid: tuple[int, ...] | None = None
    """Pieces along each axis, if the tensor is sharded evenly over all ranks in rank order."""


@dataclass(frozen=True)
class Plan:
    """A rank's work, valid until names, shapes, dtypes, shardings or world size change.

    Refers to tensors by name, because optimizers replace their state tensors.
    """

    signature: list[Any]
    """This rank's names, dtypes, shapes and shardings."""
    layout: shard.Layout
    """Layout of this rank's shard."""
    sources: Mapping[str, tuple[str, Box]]
    """By key in the shard: the tensor's name, and the box within this rank's local tensor."""
    entries: Mapping[str, TensorEntry]
    """All tensors of the checkpoint, by name. File indexes are ranks."""


def make(content: Content, world: World, previous: Plan | None = None) -> Plan:
    """Plan a save, or return `previous` if it is still valid on every rank. Collective.

    Raises:
        CheckpointError: on every rank: a tensor cannot be stored, or the ranks' `content.tensors`
            differ.
    """
    signature = _signature(content)
    if world.all(previous is not None and previous.signature == signature) and previous:
        return previous
    shared, local_items = world.run_on_all(
        lambda: (
            describe(content.tensors, range(world.size)),
            describe(content.rank_local, [world.rank]),
        )
    )
    _check_same_tensors(shared, world)
    all_local = world.gather([(item.name, item.dtype, item.shape) for item in local_items])
    local_bytes = [sum(_nbytes(dtype, shape) for _, dtype, shape in items) for items in all_local]
    entries = {
        name: TensorEntry(dtype=dtype, shape=shape, file=rank)
        for rank, items in enumerate(all_local)
        for name, dtype, shape in items
    }
    mine = [(item, item.box) for item in local_items]
    uneven: dict[str, list[Box]] = {}  # boxes that other ranks cannot compute
    for holders, items in _by_holders(shared).items():
        division = divide(items, [local_bytes[rank] for rank in holders])
        everywhere = len(holders) == world.size
        for item, parts in zip(items, division, strict=True):
            here = [box for rank, box in parts if holders[rank] == world.rank]
            mine += [(item, box) for box in here]
            if everywhere:
                entries[item.name] = _entry(item, parts)
            elif item.grid is not None:
                entries[item.name] = TensorEntry(item.dtype, item.shape, grid=item.grid)
            else:
                entries[item.name] = TensorEntry(item.dtype, item.shape)
                uneven[item.name] = here
    if any(item.grid is None and len(item.holders) < world.size for item in shared):
        gathered = world.gather(uneven)
        for name in uneven:
            parts = [(rank, box) for rank, boxes in enumerate(gathered) for box in boxes[name]]
            entries[name] = columns(entries[name], parts)
    keys = {_key(item, box): (item, box) for item, box in mine}
    return Plan(
        signature,
        shard.lay_out((key, item.dtype, box.lengths) for key, (item, box) in keys.items()),
        {key: (item.name, box.relative_to(item.box)) for key, (item, box) in keys.items()},
        entries,
    )


def _signature(content: Content) -> list[Any]:
    """Return what a plan depends on. Compared at every save, so it must be cheap."""
    return [
        (name, tensor.dtype, tensor.shape, getattr(tensor, "placements", None))
        for tensors in (content.tensors, content.rank_local)
        for name, tensor in tensors.items()
    ]


# --- local parts -------------------------------------------------------------------------------


def describe(tensors: Mapping[str, Tensor], ranks: Iterable[int]) -> list[LocalTensor]:
    """Return this rank's part of each tensor, as reported by torch's DCP planner.

    Args:
        tensors: plain tensors and DTensors, by name.
        ranks: ranks that hold the same plain tensors.
    """
    from torch.distributed.checkpoint.default_planner import (
        DefaultSavePlanner,
    )  # imported at the first save

    for name in tensors:
        _check_storable(name, tensors[name])
        owner, at, offsets = name.rpartition("@")
        if at and re.fullmatch(r"[0-9]+(,[0-9]+)*", offsets) and owner in tensors:
            raise CheckpointError(
                f"tensors {owner!r} and {name!r}: a part of the first could be stored under the "
                "second name. Rename one of them"
            )
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), None, is_coordinator=True)
    everyone = tuple(ranks)
    spreads: dict[Any, tuple[tuple[int, ...], dict[int, int] | None]] = {}
    items = []
    for write_item in planner.create_local_plan().items:
        data = write_item.tensor_data
        assert data is not None  # noqa: S101 (for the type checker)
        name = write_item.index.fqn
        tensor: Any = tensors[name]
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(data.size)
        holders, grid = everyone, None
        if hasattr(tensor, "device_mesh"):
            key = (tensor.device_mesh, tensor.placements)
            if key not in spreads:
                spreads[key] = _spread(tensor, len(everyone))
            holders, pieces = spreads[key]
            grid = _grid(pieces, shape, box, holders[0])
        items.append(LocalTensor(name, dtype, shape, box, holders, grid))
    return items


def _check_storable(name: str, tensor: Tensor) -> None:
    if name == shard.METADATA:
        raise CheckpointError(f"tensor name {name!r} is reserved by safetensors; rename the tensor")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored")
    if tensor.layout != torch.strided:
        raise CheckpointError(
            f"tensor {name!r} has layout {tensor.layout}; only dense tensors can be stored"
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's local tensor of a DTensor, or the plain tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _spread(tensor: Any, world_size: int) -> tuple[tuple[int, ...], dict[int, int] | None]:
    """Return the ranks that hold this rank's box of a DTensor, and the pieces along each axis.

    The pieces are None if the tensor is not sharded evenly over all ranks with piece k on rank k.
    """
    from torch.distributed.tensor import Shard

    mesh, coordinate = tensor.device_mesh.mesh, tensor.device_mesh.get_coordinate()
    pairs = list(zip(tensor.placements, coordinate, strict=True))
    if any(placement.is_partial() for placement, _ in pairs):
        raise CheckpointError(
            f"a DTensor of shape {tuple(tensor.shape)} has a Partial placement; reduce it first"
        )
    index = tuple(slice(None) if p.is_replicate() else at for p, at in pairs)
    holders = tuple(sorted(mesh[index].flatten().tolist()))
    dims = [placement.dim for placement, _ in pairs if type(placement) is Shard]
    in_order = len(dims) == len(pairs) and dims == sorted(set(dims))
    if not in_order or mesh.flatten().tolist() != list(range(world_size)):
        return holders, None
    return holders, dict(zip(dims, mesh.shape, strict=True))


def _grid(
    pieces: Mapping[int, int] | None, shape: tuple[int, ...], box: Box, rank: int
) -> tuple[int, ...] | None:
    """Return the grid in which `box` is the cell of `rank`, or None."""
    if pieces is None:
        return None
    grid = tuple(pieces.get(axis, 1) for axis in range(len(shape)))
    cell = TensorEntry(shape=shape, grid=grid).cell(rank)
    return grid if cell == box else None


def _check_same_tensors(shared: Sequence[LocalTensor], world: World) -> None:
    """Raise if the ranks have different tensors. Collective."""
    mine = [(item.name, item.dtype, item.shape, item.grid) for item in shared]
    digest = hashlib.blake2b(repr(mine).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    names = world.gather([repr(entry) for entry in mine])
    for rank, other in enumerate(names):
        difference = sorted(set(names[0]) ^ set(other))
        if difference:
            raise CheckpointError(
                f"ranks 0 and {rank} have different tensors to save, such as "
                f"{', '.join(difference[:3])}. Put tensors that only some ranks have into "
                "Content.rank_local"
            )
    raise CheckpointError("the ranks list the tensors to save in different orders")


# --- division of the work ----------------------------------------------------------------------


def _by_holders(items: Iterable[LocalTensor]) -> dict[tuple[int, ...], list[LocalTensor]]:
    groups: dict[tuple[int, ...], list[LocalTensor]] = {}
    for item in sorted(items, key=lambda item: (-shard.DTYPES[item.dtype], item.name)):
        groups.setdefault(item.holders, []).append(item)
    return groups


def divide(
    items: Sequence[LocalTensor], already_bytes: Sequence[int]
) -> list[list[tuple[int, Box]]]:
    """Divide tensors among their holders. Each writes a contiguous run; totals are balanced.

    Args:
        items: in file order, all with the same holders.
        already_bytes: bytes that each holder writes in addition.

    Returns:
        Parts of each item, in order: index of the holder, and the box.
    """
    total = sum(_nbytes(item.dtype, item.box.lengths) for item in items)
    ends = list(accumulate(_quotas(total, already_bytes)))
    slack = max(int(_SLACK * total / len(ends)), _SLACK_BYTES)
    holder, done = 0, 0  # current holder, and bytes assigned in total
    division = []
    for item in items:
        parts: list[tuple[int, Box]] = []
        rest, item_bytes = [item.box], shard.DTYPES[item.dtype]
        while rest:
            is_last = holder == len(ends) - 1
            nbytes = total if is_last else ends[holder] - done
            head, tail = _cut(rest[0], nbytes, item_bytes, slack)
            parts += [(holder, box) for box in head]
            done += item_bytes * sum(box.elements for box in head)
            rest = tail + rest[1:]
            if tail:
                holder += 1
        division.append(parts)
    return division


def _quotas(total: int, already: Sequence[int]) -> list[int]:
    """Return each holder's bytes of `total` that make the sums with `already` as equal as possible.

    Like water that fills vessels of different heights.
    """
    heights = sorted(already)
    level, below = 0.0, sum(heights)
    for count in range(len(heights), 0, -1):
        level = (total + below) / count
        if level >= heights[count - 1]:
            break
        below -= heights[count - 1]
    return [max(0, round(level - height)) for height in already]


def _cut(box: Box, front_bytes: int, item_bytes: int, slack: int) -> tuple[list[Box], list[Box]]:
    """Cut about `front_bytes` off the front of a box, in memory order."""
    nbytes = box.elements * item_bytes
    if nbytes <= front_bytes + slack:
        return [box], []
    if front_bytes <= slack:
        return [], [box]
    axis = next(axis for axis, length in enumerate(box.lengths) if length > 1)
    row_bytes = nbytes // box.lengths[axis]
    rows = (front_bytes + slack) // row_bytes
    head, tail = _split(box, axis, rows)
    front = [head] if rows else []
    if front_bytes - rows * row_bytes <= slack:
        return front, [tail]
    row, tail = _split(tail, axis, 1)
    row_front, row_rest = _cut(row, front_bytes - rows * row_bytes, item_bytes, slack)
    return front + row_front, [*row_rest, tail] if tail.elements else row_rest


def _split(box: Box, axis: int, rows: int) -> tuple[Box, Box]:
    return box.shifted(axis, 0, rows), box.shifted(axis, rows, box.lengths[axis] - rows)


# --- manifest entries --------------------------------------------------------------------------


def _entry(item: LocalTensor, parts: Sequence[tuple[int, Box]]) -> TensorEntry:
    entry = TensorEntry(item.dtype, item.shape)
    return columns(entry, [(item.holders[holder], box) for holder, box in parts])


def columns(entry: TensorEntry, parts: Sequence[tuple[int, Box]]) -> TensorEntry:
    """Return the entry with its parts, given as (file index, box)."""
    if len(parts) == 1 and parts[0][1].lengths == entry.shape:
        return TensorEntry(entry.dtype, entry.shape, file=parts[0][0])
    table: dict[str, list[Any]] = {
        "file": [rank for rank, _ in parts],
        "offsets": [list(box.offsets) for _, box in parts],
        "lengths": [list(box.lengths) for _, box in parts],
    }
    return TensorEntry(entry.dtype, entry.shape, columns=table)


def _key(item: LocalTensor, box: Box) -> str:
    return shard.part_key(item.name, None if box.lengths == item.shape else box.offsets)


def _nbytes(dtype: str, lengths: Iterable[int]) -> int:
    return prod(lengths) * shard.DTYPES[dtype]
