"""A shard written from tensors that are asked for part by part: a few parts are in memory, no more.

For those who have no snapshot, as their tensors do not change meanwhile.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import ShardFile, checksum
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer, bytes_of
from trainer.checkpoint.shard import BLOCK_BYTES, Layout
from trainer.core.threads import in_parallel
from trainer.storage.store import NewFile

_WRITERS = 8


@dataclass(frozen=True)
class _Part:
    """A part of the file in memory, behind what the first block that ends in it began with."""

    start: int
    stop: int
    begin: int
    """Of the memory, in the file; a multiple of a page before `start`."""
    memory: Bytes

    def bytes(self, start: int, stop: int) -> memoryview:
        """Return the bytes of the file from `start` to `stop`."""
        return self.memory[start - self.begin : stop - self.begin].data


def write_stream(
    file: NewFile,
    layout: Layout,
    tensor_of: Callable[[str], Tensor],
    *,
    threads: int = _WRITERS,
) -> ShardFile:
    """Write a shard; durable on return. The header, which has all checksums, goes last.

    Args:
        file: to write to; finished, or aborted where this raises.
        layout: of the shard.
        tensor_of: gives the tensor of a key, of any device and strides; asked again for every
            part that holds some of it, from up to `threads` threads.
        threads: parts in memory, and on their way, at a time.
    """
    blocks = layout.blocks()
    stops = [stop for _, stop in blocks]
    digests = [""] * len(blocks)

    def load(start: int, buffer: HostBuffer) -> _Part:
        stop = min(start + file.part_bytes, layout.total_bytes)
        ending = range(bisect_right(stops, start), bisect_right(stops, stop))
        begin = min(start, blocks[ending[0]][0]) if ending else start
        part = _Part(start, stop, begin // PAGE_BYTES * PAGE_BYTES, buffer.array)
        _fill(part, layout, tensor_of)
        for index in ending:
            digests[index] = checksum(part.bytes(*blocks[index]))
        return part

    slot_bytes = file.part_bytes + BLOCK_BYTES + PAGE_BYTES
    starts = range(0, layout.total_bytes, file.part_bytes)
    in_header = sum(start < layout.header_bytes for start in starts)
    free: list[HostBuffer] = []

    def put(start: int) -> None:
        buffer = free.pop() if free else HostBuffer(slot_bytes, pinned=False)
        part = load(start, buffer)
        file.put(start, part.bytes(start, part.stop))
        free.append(buffer)

    try:
        in_parallel(put, starts[in_header:], threads)
        first = [load(start, HostBuffer(slot_bytes, pinned=False)) for start in starts[:in_header]]
        header = shard.header(layout, digests)
        for part in first:
            piece = np.frombuffer(header[part.start : part.stop], np.uint8)
            part.memory[part.start - part.begin :][: len(piece)] = piece
            file.put(part.start, part.bytes(part.start, part.stop))
        file.finish()
    except BaseException:
        file.abort()
        raise
    return ShardFile(layout.total_bytes, len(header), checksum(header))


def _fill(part: _Part, layout: Layout, tensor_of: Callable[[str], Tensor]) -> None:
    chunks = layout.chunks
    index = max(bisect_right([chunk.start for chunk in chunks], part.begin) - 1, 0)
    for chunk in chunks[index:]:
        if chunk.start >= part.stop:
            break
        start, stop = max(chunk.start, part.begin), min(chunk.stop, part.stop)
        if start < stop:
            place = part.memory[start - part.begin : stop - part.begin]
            _copy(tensor_of(chunk.key), start - chunk.start, stop - chunk.start, place)


def _copy(tensor: Tensor, start: int, stop: int, place: Bytes) -> None:
    """Copy bytes of a tensor, counted as if it were contiguous."""
    tensor = tensor.detach()
    is_plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if is_plain and tensor.device.type == "cpu":
        np.copyto(place, bytes_of(tensor)[start:stop])
        return
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    row_bytes = tensor.nbytes // len(tensor)  # of the first axis; whole ones are copied
    first, last = start // row_bytes, -(-stop // row_bytes)
    if last - first == 1 and tensor.ndim > 1:
        _copy(tensor[first], start - first * row_bytes, stop - first * row_bytes, place)
        return
    some = tensor[first:last].resolve_conj().resolve_neg().cpu()
    found = bytes_of(some.contiguous(memory_format=torch.contiguous_format))
    np.copyto(place, found[start - first * row_bytes : stop - first * row_bytes])
