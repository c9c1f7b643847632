"""Geometry of reading: which bytes of which file fill which part of a tensor, piece by piece.

Pure but for tensors: nothing is read here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import Part
from trainer.checkpoint.memory import Bytes, bytes_of
from trainer.checkpoint.plan import Box

_SLAB_BYTES = 16 << 20
"""What does not lie in memory as it lies in the file passes through a copy of this size."""


@dataclass(frozen=True)
class Wanted:
    """Bytes of a chunk, counted from the chunk's start, and where they go."""

    chunk: shard.Chunk
    start: int
    stop: int
    place: Bytes


@dataclass(frozen=True)
class Slab:
    """A part of a target that does not lie in memory as it lies in the file."""

    chunk: shard.Chunk
    first: int
    """Its first element in the chunk."""
    count: int
    """Elements of the chunk from its first to its last."""
    strides: tuple[int, ...]
    """Of the chunk, in elements."""
    dtype: torch.dtype
    """Of the chunk."""
    place: Tensor


@dataclass
class Piece:
    """What one thread reads at a time from a file: parts of chunks that lie together, or a slab."""

    file: str
    wanted: list[Wanted] = field(default_factory=list)
    slab: Slab | None = None


@dataclass(frozen=True)
class Block:
    """A block of a file, and what is wanted of it."""

    number: int
    start: int
    stop: int
    wanted: Wanted


def pieces_for(
    chunk: shard.Chunk, part: Part, dtype: torch.dtype, box: Box, target: Tensor
) -> tuple[Wanted | None, list[Piece]]:
    """Return what of a part of a tensor goes straight into `target`, or slab by slab.

    Args:
        chunk: where the part lies in its file.
        part: of the stored tensor.
        dtype: of the stored tensor.
        box: what `target` is of the stored tensor.
        target: on any device, of any strides; of another dtype: what is stored is converted.
    """
    both = overlap(Box(part.offsets, part.lengths), box)
    if both.elements == 0:
        return None, []
    place = target
    for axis, offset in enumerate(_relative(both, box.offsets)):
        place = place.narrow(axis, offset, both.lengths[axis])
    strides = tuple(prod(part.lengths[axis + 1 :]) for axis in range(target.ndim))
    first, count = _span(strides, _relative(both, part.offsets), both.lengths)
    is_run = count == both.elements and place.is_contiguous() and place.dtype == dtype
    if is_run and place.device.type == "cpu":
        start, stop = first * dtype.itemsize, (first + count) * dtype.itemsize
        return Wanted(chunk, start, stop, bytes_of(place)), []
    slabs = _slabs(chunk, first, strides, dtype, place)
    return None, [Piece(part.file, slab=slab) for slab in slabs]


def joined(wanted: Iterable[tuple[str, Wanted]], block_bytes: int, read_bytes: int) -> list[Piece]:
    """Return pieces for what goes straight to its place; neighbours in a file are read at once."""
    pieces: list[Piece] = []
    end = -1
    for file, part in sorted(wanted, key=lambda w: (w[0], w[1].chunk.start + w[1].start)):
        step = max(read_bytes // block_bytes, 1) * block_bytes
        for start in range(part.start // block_bytes * block_bytes, part.stop, step):
            begin, stop = max(start, part.start), min(start + step, part.stop)
            place = part.place[begin - part.start : stop - part.start]
            one = Wanted(part.chunk, begin, stop, place)
            fits = pieces and pieces[-1].file == file and end == part.chunk.start + begin
            if fits and sum(w.stop - w.start for w in pieces[-1].wanted) + stop - begin <= step:
                pieces[-1].wanted.append(one)
            else:
                pieces.append(Piece(file, [one]))
            end = part.chunk.start + stop
    return pieces


def runs(wanted: Sequence[Wanted], block_bytes: int, read_bytes: int) -> Iterator[list[Block]]:
    """Yield runs of consecutive blocks that together fit into a slot."""
    run: list[Block] = []
    for part in wanted:
        first = part.start // block_bytes
        for index in range(first, -(-part.stop // block_bytes)):
            start = part.chunk.start + index * block_bytes
            stop = min(start + block_bytes, part.chunk.stop)
            if run and (start != run[-1].stop or stop - run[0].start > read_bytes + block_bytes):
                yield run
                run = []
            run.append(Block(part.chunk.block + index, start, stop, part))
    if run:
        yield run


def place_of(run: Sequence[Block]) -> Bytes | None:
    """Return where whole blocks go one after another, if all of them go to one place."""
    wanted = run[0].wanted
    start, stop = run[0].start - wanted.chunk.start, run[-1].stop - wanted.chunk.start
    is_one = all(block.wanted is wanted for block in run) and len(wanted.place)
    if not is_one or start < wanted.start or stop > wanted.stop:
        return None
    return wanted.place[start - wanted.start : stop - wanted.start]


def overlap(one: Box, other: Box) -> Box:
    """Return what two boxes have in common; perhaps no element."""
    offsets = tuple(map(max, one.offsets, other.offsets))
    ends = (
        min(a + n, b + m)
        for a, n, b, m in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True)
    )
    return Box(offsets, tuple(max(end - o, 0) for end, o in zip(ends, offsets, strict=True)))


def _relative(box: Box, origin: Sequence[int]) -> tuple[int, ...]:
    return tuple(offset - start for offset, start in zip(box.offsets, origin, strict=True))


def _span(
    strides: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
) -> tuple[int, int]:
    """Return the first element of a box in memory, and how many there are up to its last."""
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    reach = sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
    return first, reach + 1


def _slabs(
    chunk: shard.Chunk, first: int, strides: tuple[int, ...], dtype: torch.dtype, place: Tensor
) -> Iterator[Slab]:
    """Cut what goes to `place` into slabs of bounded size."""
    _, count = _span(strides, (0,) * place.ndim, place.shape)
    rows = max(_SLAB_BYTES // (strides[0] * dtype.itemsize), 1) if place.ndim else 1
    if place.ndim == 0 or (place.shape[0] <= rows and (rows > 1 or place.ndim == 1)):
        yield Slab(chunk, first, count, strides, dtype, place)
    elif rows > 1 or place.ndim == 1:
        for row in range(0, place.shape[0], rows):
            part = place.narrow(0, row, min(rows, place.shape[0] - row))
            yield from _slabs(chunk, first + row * strides[0], strides, dtype, part)
    else:
        for row in range(place.shape[0]):
            yield from _slabs(chunk, first + row * strides[0], strides[1:], dtype, place[row])


def landing(slab: Slab) -> tuple[list[Wanted], Callable[[], object]]:
    """Return where a slab's bytes land, and what copies them from there to their place."""
    memory = torch.empty(slab.count, dtype=slab.dtype)
    view = memory.as_strided(tuple(slab.place.shape), slab.strides)
    item_bytes = slab.dtype.itemsize
    start, stop = slab.first * item_bytes, (slab.first + slab.count) * item_bytes
    wanted = Wanted(slab.chunk, start, stop, bytes_of(memory))
    return [wanted], lambda: slab.place.copy_(view)
