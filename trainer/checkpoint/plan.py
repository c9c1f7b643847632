"""Save plan: the part of the state that each rank writes, computed once per layout.

torch's DCP planner reports which box of each tensor a rank holds. The ranks exchange one box for
each kind of tensor (shape and sharding), then every rank computes which of several holders writes a
box. 512 ranks plan as fast as two.
"""

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box, any_overlap
from trainer.checkpoint.division import divide
from trainer.checkpoint.dtypes import DTYPES, TORCH_NAMES
from trainer.checkpoint.manifest import TensorEntry
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.errors import CheckpointError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, torch_name in TORCH_NAMES.items()
    if hasattr(torch, torch_name)
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class LocalTensor:
    """The part of a tensor that one rank holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Global shape."""
    box: Box
    """This rank's part."""
    sharding: Any = None
    """Mesh and placements of a DTensor; None: every rank holds the complete tensor."""


@dataclass(frozen=True, eq=False)
class Spread:
    """Positions and holders of the pieces of tensors of one shape and sharding."""

    boxes: tuple[Box, ...]
    """The pieces that have elements, in C order."""
    holders: tuple[tuple[int, ...], ...]
    """Ranks that hold each piece; equally many for each."""

    @cached_property
    def largest(self) -> Box:
        """A box in which each piece fits, counted from the piece's first element."""
        lengths = zip(*(box.lengths for box in self.boxes), strict=True)
        return Box((0,) * len(self.boxes[0].offsets), tuple(map(max, lengths)))

    @cached_property
    def _by_rank(self) -> dict[int, list[tuple[Box, int]]]:
        """By rank: the pieces it holds, and its position among the holders of each."""
        pieces: dict[int, list[tuple[Box, int]]] = {}
        for piece, ranks in zip(self.boxes, self.holders, strict=True):
            for holder, rank in enumerate(ranks):
                pieces.setdefault(rank, []).append((piece, holder))
        return pieces

    def parts_of(self, rank: int, shares: Sequence[tuple[int, Box]]) -> Iterator[Box]:
        """Yield what a rank writes, after `largest` was divided among holders."""
        for piece, position in self._by_rank.get(rank, ()):
            for holder, cut in shares:
                if holder == position:
                    offsets = tuple(map(operator.add, piece.offsets, cut.offsets))
                    box = Box(offsets, cut.lengths).intersection(piece)
                    if box.elements:
                        yield box

    def parts(self, shares: Sequence[tuple[int, Box]]) -> list[tuple[int, Box]]:
        """Return rank and box of everything that is written."""
        return [(rank, box) for rank in self._by_rank for box in self.parts_of(rank, shares)]


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
        lambda: (describe(content.tensors), _describe_local(content.rank_local))
    )
    _check_same_tensors(shared, world)
    all_local = world.gather([(item.name, item.dtype, item.shape) for item in local_items])
    local_bytes = [sum(_nbytes(dtype, shape) for _, dtype, shape in items) for items in all_local]
    entries = {
        name: TensorEntry(dtype=dtype, shape=shape, file=rank)
        for rank, items in enumerate(all_local)
        for name, dtype, shape in items
    }
    _check_names(shared, [name for items in all_local for name, _, _ in items])
    mine = [(item, item.box) for item in local_items if item.box.elements]
    for item, entry, boxes in assign(shared, _spreads(shared, world), local_bytes, world.rank):
        entries[item.name] = entry
        mine += [(item, box) for box in boxes]
    keys = {_key(entries[item.name], item, box): (item, box) for item, box in mine}
    return Plan(
        signature,
        shard.lay_out((key, item.dtype, box.lengths) for key, (item, box) in keys.items()),
        {key: (item.name, box.relative_to(item.box)) for key, (item, box) in keys.items()},
        entries,
    )


def assign(
    items: Sequence[LocalTensor],
    spreads: Mapping[Any, Spread],
    local_bytes: Sequence[int],
    rank: int,
) -> Iterator[tuple[LocalTensor, TensorEntry, list[Box]]]:
    """Yield each tensor with its entry in the manifest and the boxes that `rank` writes.

    Equal on all ranks but for the boxes.

    Args:
        items: tensors that all ranks have.
        spreads: where their pieces are, by shape and sharding.
        local_bytes: bytes that each rank writes in addition.
        rank: this rank.
    """
    forms: dict[tuple[Spread, int], TensorEntry] = {}  # of tensors whose pieces are not cut
    for group in _by_holders(items, spreads):
        division = divide(
            [(item.dtype, spread.largest) for item, spread in group],
            [local_bytes[holder] for holder in group[0][1].holders[0]],
        )
        for (item, spread), shares in zip(group, division, strict=True):
            form = forms.get((spread, shares[0][0])) if len(shares) == 1 else None
            if form is None:
                form = divided(TensorEntry(item.dtype, item.shape), spread.parts(shares))
            if len(shares) == 1:
                forms[spread, shares[0][0]] = form
            boxes = list(spread.parts_of(rank, shares))
            yield item, replace(form, dtype=item.dtype), boxes
    for item in items:
        if 0 in item.shape:  # nothing of it is stored
            yield item, divided(TensorEntry(item.dtype, item.shape), []), []


def _signature(content: Content) -> list[Any]:
    """Return what a plan depends on. Compared at every save, so it must be cheap."""
    return [
        (name, tensor.dtype, tensor.shape, getattr(tensor, "placements", None))
        for tensors in (content.tensors, content.rank_local)
        for name, tensor in tensors.items()
    ]


# --- local parts -------------------------------------------------------------------------------


def describe(tensors: Mapping[str, Tensor]) -> list[LocalTensor]:
    """Return this rank's part of each tensor, as reported by torch's DCP planner.

    Args:
        tensors: plain tensors and DTensors, by name.
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
    items = []
    for write_item in planner.create_local_plan().items:
        data = write_item.tensor_data
        assert data is not None  # noqa: S101 (for the type checker)
        name = write_item.index.fqn
        tensor: Any = tensors[name]
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        sharding = None
        if hasattr(tensor, "device_mesh"):
            sharding = (tensor.device_mesh, tensor.placements)
            if any(placement.is_partial() for placement in tensor.placements):
                raise CheckpointError(
                    f"tensor {name!r} has a Partial placement, a sum that is not computed yet; "
                    "reduce it first"
                )
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(data.size)
        items.append(LocalTensor(name, dtype, shape, box, sharding))
    return items


def _describe_local(tensors: Mapping[str, Tensor]) -> list[LocalTensor]:
    items = describe(tensors)
    for item in items:
        if item.box.lengths != item.shape:
            raise CheckpointError(
                f"tensor {item.name!r} belongs to one rank but is sharded over several; put it "
                "into Content.tensors"
            )
    return items


def _check_names(shared: Sequence[LocalTensor], local_names: Sequence[str]) -> None:
    names = Counter([item.name for item in shared] + list(local_names))
    if repeated := [name for name, count in names.items() if count > 1]:
        raise CheckpointError(
            f"tensor {repeated[0]!r} of one rank has the name of another tensor; rename it"
        )


def _check_storable(name: str, tensor: Tensor) -> None:
    if not shard.is_key(name):
        raise CheckpointError(
            f"tensor name {name!r} is reserved by the format or not Unicode; rename the tensor"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"tensor {name!r} has dtype {tensor.dtype}, which cannot be stored; dequantize it, or "
            "store its int_repr() with its scales"
        )
    if tensor.layout != torch.strided:
        raise CheckpointError(
            f"tensor {name!r} has layout {tensor.layout}; only dense tensors can be stored"
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's local tensor of a DTensor, or the plain tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def held_part(tensor: Tensor, box: Box) -> Tensor:
    """Return a box of this rank's local tensor, as a view."""
    part = local(tensor)
    for axis, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        if length != part.shape[axis]:
            part = part.narrow(axis, offset, length)
    return part


def _spreads(shared: Sequence[LocalTensor], world: World) -> dict[Any, Spread]:
    """Return where the pieces of every kind of tensor are, by shape and sharding. Collective.

    A model has few kinds, so that little is gathered, however many tensors and ranks there are.
    """
    kinds = {(item.shape, item.sharding): item.box for item in shared if item.sharding is not None}
    boxes = world.gather(list(kinds.values())) if kinds else []
    spreads: dict[Any, Spread] = {}
    for number, (shape, sharding) in enumerate(kinds):
        holders: dict[Box, list[int]] = {}
        for rank, pieces in enumerate(boxes):
            if pieces[number].elements:
                holders.setdefault(pieces[number], []).append(rank)
        _check_complete(shape, holders)
        count = min(map(len, holders.values()), default=0)
        spreads[shape, sharding] = Spread(
            tuple(sorted(holders)), tuple(tuple(holders[box][:count]) for box in sorted(holders))
        )
    everyone = tuple(range(world.size))
    for item in shared:
        if item.sharding is None:
            spreads[item.shape, None] = Spread((item.box,), (everyone,))
    return spreads


def _check_complete(shape: tuple[int, ...], boxes: Collection[Box]) -> None:
    if any_overlap(boxes) or sum(box.elements for box in boxes) != prod(shape):
        raise CheckpointError(
            f"the shards of a DTensor of shape {shape} overlap or leave elements out, so it "
            "cannot be stored; distribute it with Shard or Replicate placements"
        )


def _check_same_tensors(shared: Sequence[LocalTensor], world: World) -> None:
    """Raise if the ranks have different tensors. Collective."""
    mine = [(item.name, item.dtype, item.shape, _placements(item)) for item in shared]
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


def _placements(item: LocalTensor) -> str:
    return "" if item.sharding is None else str(item.sharding[1])


# --- division of the work ----------------------------------------------------------------------


def _by_holders(
    items: Iterable[LocalTensor], spreads: Mapping[Any, Spread]
) -> list[list[tuple[LocalTensor, Spread]]]:
    """Return groups of tensors whose pieces the same ranks hold, each in file order."""
    groups: dict[Any, list[tuple[LocalTensor, Spread]]] = {}
    group_of = {
        spread: groups.setdefault(spread.holders, []) for spread in spreads.values() if spread.boxes
    }
    for item in sorted(items, key=lambda item: (-DTYPES[item.dtype], item.name)):
        spread = spreads[item.shape, item.sharding]
        if 0 not in item.shape:
            group_of[spread].append((item, spread))
    return [group for group in groups.values() if group]


# --- manifest entries --------------------------------------------------------------------------


def divided(entry: TensorEntry, parts: Sequence[tuple[int, Box]]) -> TensorEntry:
    """Return the entry with its parts, given as (file index, box), in the shortest form."""
    stored = sorted((part for part in parts if part[1].elements), key=lambda part: part[1])
    if len(stored) == 1 and stored[0][1].lengths == entry.shape:
        return replace(entry, file=stored[0][0])
    offsets = [{box.offsets[axis] for _, box in stored} for axis in range(len(entry.shape))]
    even = replace(entry, grid=tuple(map(len, offsets)))
    is_grid = len(stored) > 1 and prod(map(len, offsets)) == len(stored)
    if is_grid and all(even.cell(number) == box for number, (_, box) in enumerate(stored)):
        files = tuple(file for file, _ in stored)
        return replace(even, file_list=None if files == tuple(range(len(files))) else files)
    table: dict[str, list[Any]] = {
        "file": [file for file, _ in stored],
        "offsets": [list(box.offsets) for _, box in stored],
        "lengths": [list(box.lengths) for _, box in stored],
    }
    return replace(entry, columns=table)


def _key(entry: TensorEntry, item: LocalTensor, box: Box) -> str:
    return shard.part_key(item.name, None if entry.file is not None else box.offsets)


def _nbytes(dtype: str, lengths: Iterable[int]) -> int:
    return prod(lengths) * DTYPES[dtype]
