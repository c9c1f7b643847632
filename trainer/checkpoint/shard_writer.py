"""Shard files, written part by part from a snapshot or from live tensors.

Several threads each take a part of the file, compute the checksums of the blocks that end in it,
and write it. The header holds all checksums, so its part comes last. It waits for the checksums,
not for the other parts to be written.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import ShardFile, checksum
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer, bytes_of, is_plain
from trainer.checkpoint.shard import BLOCK_BYTES, Layout
from trainer.core.threads import in_parallel
from trainer.storage.store import NewFile

THREADS = 8
"""Parts in flight: a queue depth that saturates disks and object stores."""


class ShardBytes(Protocol):
    """The bytes of a shard that is being written."""

    def part(self, start: int, stop: int) -> AbstractContextManager[memoryview]:
        """Return the file's bytes from `start`, a multiple of a page, to `stop`.

        Blocks until they are ready. Called from several threads. The memory is page-aligned,
        writable, and valid until the context exits. The header's bytes are undefined.
        """

    def check(self) -> None:
        """Raise if the bytes are not consistent. Called once, after the last part."""


def write_shard(
    file: NewFile, layout: Layout, content: ShardBytes, *, threads: int = THREADS
) -> ShardFile:
    """Write a shard. Durable on return.

    Args:
        file: destination; finished on return, aborted if this raises.
        layout: positions of the tensors in the file.
        content: the bytes to write.
        threads: maximum number of parts in memory.
    """
    blocks = layout.blocks()
    ends = [stop for _, stop in blocks]
    digests = [""] * len(blocks)
    starts = range(0, layout.total_bytes, file.part_bytes)
    header_parts = [start for start in starts if start < layout.header_bytes]
    data_parts = {start for start in starts if start + file.part_bytes > layout.header_bytes}
    unhashed, changed = len(data_parts), threading.Condition()
    header = cache(lambda: shard.header(layout, digests))

    def put(start: int) -> None:
        stop = min(start + file.part_bytes, layout.total_bytes)
        ending = range(bisect_right(ends, start), bisect_right(ends, stop))
        begin = min(start, blocks[ending[0]][0]) if ending else start
        begin = begin // PAGE_BYTES * PAGE_BYTES
        with ExitStack() as stack:
            try:
                memory = stack.enter_context(content.part(begin, stop))
                for index in ending:
                    first, last = blocks[index]
                    digests[index] = checksum(memory[first - begin : last - begin])
            finally:
                if start in data_parts:  # also after an error, or the header's thread would hang
                    count_hashed()
            if start < layout.header_bytes:
                head = wait_for_header()[start:stop]
                memory[start - begin :][: len(head)] = head
            file.put(start, memory[start - begin :])

    def count_hashed() -> None:
        nonlocal unhashed
        with changed:
            unhashed -= 1
            changed.notify_all()

    def wait_for_header() -> bytes:
        with changed:
            changed.wait_for(lambda: unhashed == 0)
            return header()

    try:
        # The last header part may hold data too; it precedes the others, which wait for it.
        in_parallel(put, [*starts[len(header_parts) :], *reversed(header_parts)], threads)
        content.check()
        file.finish()
    except BaseException:
        file.abort()
        raise
    return ShardFile(layout.total_bytes, layout.header_bytes, checksum(header()))


class LiveTensors:
    """Shard bytes read from tensors that do not change meanwhile; only a few parts are in memory.

    Args:
        layout: positions of the tensors in the file.
        tensor_of: returns the tensor of a key, on any device and with any strides. Called for
            every part that holds some of it, from several threads.
    """

    def __init__(self, layout: Layout, tensor_of: Callable[[str], Tensor]) -> None:
        self._layout, self._tensor_of = layout, tensor_of
        self._chunk_starts = [chunk.start for chunk in layout.chunks]
        self._free: list[HostBuffer] = []

    @contextmanager
    def part(self, start: int, stop: int) -> Iterator[memoryview]:
        """Copy the file's bytes from `start` to `stop` into a buffer."""
        buffer = self._free.pop() if self._free else HostBuffer(0, pinned=False)
        if len(buffer) < stop - start:  # with room for the start of a block that ends in the part
            buffer = HostBuffer(stop - start + BLOCK_BYTES + PAGE_BYTES, pinned=False)
        self._fill(buffer.array[: stop - start], start)
        yield buffer.view[: stop - start]
        self._free.append(buffer)

    def check(self) -> None:
        """Nothing to check: the caller guarantees that the tensors do not change."""

    def _fill(self, memory: Bytes, begin: int) -> None:
        end = begin + len(memory)
        index = max(bisect_right(self._chunk_starts, begin) - 1, 0)
        for chunk in self._layout.chunks[index:]:
            if chunk.start >= end:
                break
            start, stop = max(chunk.start, begin), min(chunk.stop, end)
            if start < stop:
                target = memory[start - begin : stop - begin]
                _copy(self._tensor_of(chunk.key), start - chunk.start, stop - chunk.start, target)


def _copy(tensor: Tensor, start: int, stop: int, target: Bytes) -> None:
    """Copy a byte range of a tensor, as if it were contiguous."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and is_plain(tensor):
        np.copyto(target, bytes_of(tensor)[start:stop])
        return
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    row_bytes = tensor.nbytes // len(tensor)  # complete rows of the first axis are copied
    first, last = start // row_bytes, -(-stop // row_bytes)
    offset = first * row_bytes
    if last - first == 1 and tensor.ndim > 1:
        _copy(tensor[first], start - offset, stop - offset, target)
        return
    rows = tensor[first:last].resolve_conj().resolve_neg().cpu()
    rows = rows.contiguous(memory_format=torch.contiguous_format)
    np.copyto(target, bytes_of(rows)[start - offset : stop - offset])
