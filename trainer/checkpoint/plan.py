"""Who writes what: every rank's part of the state, decided once for a layout.

torch's DCP planner says which box of which tensor a rank holds. Who writes a box that several
ranks hold is then a rule that each rank works out alone, from what all of them know; so nothing
that is sharded is ever gathered, and 512 ranks plan as fast as two.
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
"""Share of a rank's bytes that it may have too much of, to spare a tensor a cut."""
_SLACK_BYTES = 1 << 12


@dataclass(frozen=True)
class LocalTensor:
    """A tensor as one rank holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor, over all ranks."""
    box: Box
    """What this rank holds of it."""
    holders: tuple[int, ...]
    """The ranks that hold this same box."""
    grid: tuple[int, ...] | None = None
    """Set where the tensor is cut evenly over all ranks, in the order of the ranks."""


@dataclass(frozen=True)
class Plan:
    """A division of the work that holds until names, shapes, dtypes or world size change.

    Holds names, never tensors: optimizers replace their state tensors.
    """

    signature: list[Any]
    """This rank's names, dtypes, shapes and shardings."""
    layout: shard.Layout
    """This rank's shard."""
    sources: Mapping[str, tuple[str, Box]]
    """Key in the shard: the tensor's name, and the box in this rank's local tensor."""
    entries: Mapping[str, TensorEntry]
    """All tensors of the checkpoint, by name; a file's number is its rank."""


def make(content: Content, world: World, previous: Plan | None = None) -> Plan:
    """Plan who writes what, or return `previous` if it still fits on every rank. Collective.

    Raises:
        CheckpointError: on every rank: a tensor cannot be stored, or the ranks' `content.tensors`
            are not the same tensors.
    """
    signature = _signature(content)
    if world.all(previous is not None and previous.signature == signature) and previous:
        return previous
    shared, own = world.run_on_all(
        lambda: (
            describe(content.tensors, range(world.size)),
            describe(content.rank_local, [world.rank]),
        )
    )
    _refuse_differences(shared, world)
    all_own = world.gather([(item.name, item.dtype, item.shape) for item in own])
    own_bytes = [sum(_nbytes(dtype, shape) for _, dtype, shape in items) for items in all_own]
    entries = {
        name: TensorEntry(dtype=dtype, shape=shape, file=rank)
        for rank, items in enumerate(all_own)
        for name, dtype, shape in items
    }
    mine = [(item, item.box) for item in own]
    loose: dict[str, list[Box]] = {}  # what the others cannot know by themselves
    for holders, items in _by_holders(shared).items():
        division = divide(items, [own_bytes[rank] for rank in holders])
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
                loose[item.name] = here
    if any(item.grid is None and len(item.holders) < world.size for item in shared):
        gathered = world.gather(loose)
        for name in loose:
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
    """Return what a plan depends on; cheap, as it is compared at every save."""
    return [
        (name, tensor.dtype, tensor.shape, getattr(tensor, "placements", None))
        for tensors in (content.tensors, content.rank_local)
        for name, tensor in tensors.items()
    ]


# --- what a rank holds -------------------------------------------------------------------------


def describe(tensors: Mapping[str, Tensor], ranks: Iterable[int]) -> list[LocalTensor]:
    """Return what this rank holds of each tensor, as torch's DCP planner sees it.

    Args:
        tensors: plain tensors and DTensors by name.
        ranks: the ranks that hold the same plain tensors.
    """
    from torch.distributed.checkpoint.default_planner import (
        DefaultSavePlanner,
    )  # imported at the first save

    for name in tensors:
        _refuse_unknown(name, tensors[name])
        owner, at, offsets = name.rpartition("@")
        if at and re.fullmatch(r"[0-9]+(,[0-9]+)*", offsets) and owner in tensors:
            raise CheckpointError(
                f"tensors {owner!r} and {name!r}: a part of the first might be stored under the "
                "name of the second; rename one of them"
            )
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), None, is_coordinator=True)
    everyone = tuple(ranks)
    spreads: dict[Any, tuple[tuple[int, ...], dict[int, int] | None]] = {}
    items = []
    for found in planner.create_local_plan().items:
        data = found.tensor_data
        assert data is not None  # noqa: S101 (for the type checker)
        name = found.index.fqn
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


def _refuse_unknown(name: str, tensor: Tensor) -> None:
    if name == shard.METADATA:
        raise CheckpointError(f"a tensor cannot be called {name!r}; safetensors uses that name")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} has the dtype {tensor.dtype}, not storable")
    if tensor.layout != torch.strided:
        raise CheckpointError(
            f"tensor {name!r} has the layout {tensor.layout}; only dense tensors are stored"
        )


def local(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of a tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def _spread(tensor: Any, world_size: int) -> tuple[tuple[int, ...], dict[int, int] | None]:
    """Return which ranks hold the same box of a DTensor, and how it is cut over all ranks.

    That is the number of pieces along each axis, or None where it is not cut evenly, piece k on
    rank k.
    """
    from torch.distributed.tensor import Shard

    mesh, coordinate = tensor.device_mesh.mesh, tensor.device_mesh.get_coordinate()
    pairs = list(zip(tensor.placements, coordinate, strict=True))
    if any(placement.is_partial() for placement, _ in pairs):
        raise CheckpointError(
            f"a tensor of shape {tuple(tensor.shape)} is a partial sum over ranks; reduce it first"
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
    """Return the grid in which `box` is the cell of `rank`, if there is one."""
    if pieces is None:
        return None
    grid = tuple(pieces.get(axis, 1) for axis in range(len(shape)))
    cell = TensorEntry(shape=shape, grid=grid).cell(rank)
    return grid if cell == box else None


def _refuse_differences(shared: Sequence[LocalTensor], world: World) -> None:
    """Make sure that all ranks bring the same tensors; otherwise say which differ. Collective."""
    mine = [(item.name, item.dtype, item.shape, item.grid) for item in shared]
    digest = hashlib.blake2b(repr(mine).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    names = world.gather([repr(entry) for entry in mine])
    for rank, theirs in enumerate(names):
        difference = sorted(set(names[0]) ^ set(theirs))
        if difference:
            raise CheckpointError(
                f"ranks 0 and {rank} have different tensors to save, such as "
                f"{', '.join(difference[:3])}. Put tensors that only some ranks have into "
                "Content.rank_local"
            )
    raise CheckpointError("the ranks list the tensors to save in different orders")


# --- who writes it -----------------------------------------------------------------------------


def _by_holders(items: Iterable[LocalTensor]) -> dict[tuple[int, ...], list[LocalTensor]]:
    groups: dict[tuple[int, ...], list[LocalTensor]] = {}
    for item in sorted(items, key=lambda item: (-shard.DTYPES[item.dtype], item.name)):
        groups.setdefault(item.holders, []).append(item)
    return groups


def divide(
    items: Sequence[LocalTensor], already_bytes: Sequence[int]
) -> list[list[tuple[int, Box]]]:
    """Divide what all holders hold among them: each writes a run of about the same bytes.

    Args:
        items: in the order of the file.
        already_bytes: what each holder writes besides.

    Returns:
        For every item its parts in order: the number of the holder, and the box.
    """
    total = sum(_nbytes(item.dtype, item.box.lengths) for item in items)
    ends = list(accumulate(_quotas(total, already_bytes)))
    slack = max(int(_SLACK * total / len(ends)), _SLACK_BYTES)
    holder, done = 0, 0  # who is given bytes, and how many have been given
    division = []
    for item in items:
        parts: list[tuple[int, Box]] = []
        rest, item_bytes = [item.box], shard.DTYPES[item.dtype]
        while rest:
            is_last = holder == len(ends) - 1
            wanted = total if is_last else ends[holder] - done
            head, tail = _cut(rest[0], wanted, item_bytes, slack)
            parts += [(holder, box) for box in head]
            done += item_bytes * sum(box.elements for box in head)
            rest = tail + rest[1:]
            if tail:
                holder += 1
        division.append(parts)
    return division


def _quotas(total: int, already: Sequence[int]) -> list[int]:
    """Return who gets how much of `total`, so that with what they have all are as equal as can be.

    As water fills vessels of different heights.
    """
    heights = sorted(already)
    level, below = 0.0, sum(heights)
    for count in range(len(heights), 0, -1):
        level = (total + below) / count
        if level >= heights[count - 1]:
            break
        below -= heights[count - 1]
    return [max(0, round(level - height)) for height in already]


def _cut(box: Box, wanted: int, item_bytes: int, slack: int) -> tuple[list[Box], list[Box]]:
    """Cut about `wanted` bytes off the front of a box, in the order of its memory."""
    nbytes = box.elements * item_bytes
    if nbytes <= wanted + slack:
        return [box], []
    if wanted <= slack:
        return [], [box]
    axis = next(axis for axis, length in enumerate(box.lengths) if length > 1)
    row_bytes = nbytes // box.lengths[axis]
    rows = (wanted + slack) // row_bytes
    head, tail = _split(box, axis, rows)
    front = [head] if rows else []
    if wanted - rows * row_bytes <= slack:
        return front, [tail]
    row, tail = _split(tail, axis, 1)
    inner_front, inner_rest = _cut(row, wanted - rows * row_bytes, item_bytes, slack)
    return front + inner_front, [*inner_rest, tail] if tail.elements else inner_rest


def _split(box: Box, axis: int, rows: int) -> tuple[Box, Box]:
    return box.shifted(axis, 0, rows), box.shifted(axis, rows, box.lengths[axis] - rows)


# --- how the manifest says it ------------------------------------------------------------------


def _entry(item: LocalTensor, parts: Sequence[tuple[int, Box]]) -> TensorEntry:
    entry = TensorEntry(item.dtype, item.shape)
    return columns(entry, [(item.holders[holder], box) for holder, box in parts])


def columns(entry: TensorEntry, parts: Sequence[tuple[int, Box]]) -> TensorEntry:
    """Return the entry with its parts, each with the number of its file."""
    if len(parts) == 1 and parts[0][1].lengths == entry.shape:
        return TensorEntry(entry.dtype, entry.shape, file=parts[0][0])
    cut: dict[str, list[Any]] = {
        "file": [rank for rank, _ in parts],
        "offsets": [list(box.offsets) for _, box in parts],
        "lengths": [list(box.lengths) for _, box in parts],
    }
    return TensorEntry(entry.dtype, entry.shape, columns=cut)


def _key(item: LocalTensor, box: Box) -> str:
    return shard.part_key(item.name, None if box.lengths == item.shape else box.offsets)


def _nbytes(dtype: str, lengths: Iterable[int]) -> int:
    return prod(lengths) * shard.DTYPES[dtype]
