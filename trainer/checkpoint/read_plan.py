"""Plan of a read: which bytes of which file fill which part of a tensor. Reads nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.memory import Bytes, as_bits, bytes_of, empty

_SLAB_BYTES = 16 << 20
"""Size of the staging copy for data that is not laid out in memory as in the file."""


@dataclass(frozen=True)
class ReadRange:
    """A byte range of a chunk, counted from the chunk's start, and its destination."""

    chunk: shard.Chunk
    start: int
    stop: int
    destination: Bytes
    """Memory of `stop - start` bytes; empty to check the bytes only."""


@dataclass(frozen=True)
class Slab:
    """Part of a target that is not laid out in memory as in the file."""

    chunk: shard.Chunk
    first: int
    """Index in the chunk of the slab's first element."""
    count: int
    """Elements of the chunk from the slab's first to its last."""
    strides: tuple[int, ...]
    """Strides of the chunk, in elements."""
    dtype: torch.dtype
    """Stored dtype."""
    destination: Tensor


@dataclass
class ReadTask:
    """Work of one thread: adjacent ranges of a file, or a slab."""

    file: str
    ranges: list[ReadRange] = field(default_factory=list)
    slab: Slab | None = None


@dataclass(frozen=True)
class Block:
    """A block of a file, and the range that needs it."""

    number: int
    start: int
    stop: int
    range: ReadRange


def plan_box(
    file: str, chunk: shard.Chunk, stored: Box, dtype: torch.dtype, box: Box, target: Tensor
) -> tuple[ReadRange | None, list[ReadTask]]:
    """Plan how the stored part of a tensor fills `target`: as one range, or slab by slab.

    Args:
        file: name of the shard.
        chunk: the stored part in its shard.
        stored: the stored part within the tensor.
        dtype: stored dtype.
        box: part of the tensor that `target` holds.
        target: on any device, with any strides. Data is converted to its dtype.
    """
    common = stored.intersection(box)
    if common.elements == 0:
        return None, []
    destination = target
    for axis, offset in enumerate(common.relative_to(box).offsets):
        destination = destination.narrow(axis, offset, common.lengths[axis])
    strides = tuple(prod(stored.lengths[axis + 1 :]) for axis in range(target.ndim))
    first, count = _span(strides, common.relative_to(stored))
    is_contiguous = count == common.elements and destination.is_contiguous()
    if is_contiguous and destination.dtype == dtype and destination.device.type == "cpu":
        start, stop = first * dtype.itemsize, (first + count) * dtype.itemsize
        return ReadRange(chunk, start, stop, bytes_of(destination)), []
    slabs = _slabs(chunk, first, strides, dtype, destination)
    return None, [ReadTask(file, slab=slab) for slab in slabs]


def merge_ranges(
    ranges: Iterable[tuple[str, ReadRange]], block_bytes: int, read_bytes: int
) -> list[ReadTask]:
    """Return tasks of about `read_bytes` each; ranges adjacent in a file share a task."""
    tasks: list[ReadTask] = []
    end = -1
    step = max(read_bytes // block_bytes, 1) * block_bytes
    for file, full in sorted(
        ranges, key=lambda item: (item[0], item[1].chunk.start + item[1].start)
    ):
        for start in range(full.start // block_bytes * block_bytes, full.stop, step):
            begin, stop = max(start, full.start), min(start + step, full.stop)
            destination = full.destination[begin - full.start : stop - full.start]
            part = ReadRange(full.chunk, begin, stop, destination)
            is_next = tasks and tasks[-1].file == file and end == full.chunk.start + begin
            if is_next and sum(r.stop - r.start for r in tasks[-1].ranges) + stop - begin <= step:
                tasks[-1].ranges.append(part)
            else:
                tasks.append(ReadTask(file, [part]))
            end = full.chunk.start + stop
    return tasks


def block_runs(
    ranges: Sequence[ReadRange], block_bytes: int, read_bytes: int
) -> Iterator[list[Block]]:
    """Yield runs of consecutive blocks that fit into a read buffer."""
    run: list[Block] = []
    for part in ranges:
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


def direct_destination(run: Sequence[Block]) -> Bytes | None:
    """Return the memory that all blocks of a run fill completely, or None."""
    part = run[0].range
    start, stop = run[0].start - part.chunk.start, run[-1].stop - part.chunk.start
    is_one_range = all(block.range is part for block in run) and len(part.destination)
    if not is_one_range or start < part.start or stop > part.stop:
        return None
    return part.destination[start - part.start : stop - part.start]


def stage(slab: Slab) -> tuple[list[ReadRange], Callable[[], object]]:
    """Return ranges that read a slab into a staging buffer, and the copy to its destination."""
    memory = empty((slab.count,), slab.dtype)
    view = memory.as_strided(tuple(slab.destination.shape), slab.strides)
    item_bytes = slab.dtype.itemsize
    start, stop = slab.first * item_bytes, (slab.first + slab.count) * item_bytes
    part = ReadRange(slab.chunk, start, stop, bytes_of(memory))
    target = slab.destination
    if target.dtype == slab.dtype and not (target.is_conj() or target.is_neg()):
        return [part], lambda: as_bits(target).copy_(as_bits(view))  # not all dtypes have copy_
    return [part], lambda: target.copy_(view)


def _span(strides: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the first element of a box in memory, and the count up to its last."""
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    reach = sum((n - 1) * stride for n, stride in zip(box.lengths, strides, strict=True))
    return first, reach + 1


def _slabs(
    chunk: shard.Chunk, first: int, strides: tuple[int, ...], dtype: torch.dtype, target: Tensor
) -> Iterator[Slab]:
    """Cut `target` into slabs of bounded size."""
    _, count = _span(strides, Box.full(target.shape))
    rows = max(_SLAB_BYTES // (strides[0] * dtype.itemsize), 1) if target.ndim else 1
    if target.ndim == 0 or (target.shape[0] <= rows and (rows > 1 or target.ndim == 1)):
        yield Slab(chunk, first, count, strides, dtype, target)
    elif rows > 1 or target.ndim == 1:
        for row in range(0, target.shape[0], rows):
            part = target.narrow(0, row, min(rows, target.shape[0] - row))
            yield from _slabs(chunk, first + row * strides[0], strides, dtype, part)
    else:
        for row in range(target.shape[0]):
            yield from _slabs(chunk, first + row * strides[0], strides[1:], dtype, target[row])
