"""Shard files, written in file order from a snapshot or from live tensors.

The header follows from the layout and comes first, the checksums of all blocks come last. Each
part is hashed when it is handed to the store, which writes several parts at a time.
"""

import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import ShardFile, checksum
from trainer.checkpoint.memory import Bytes, HostBuffer, as_bits, bytes_of, is_plain
from trainer.checkpoint.shard import Layout
from trainer.storage.store import Store


class ShardBytes(Protocol):
    """The bytes of a shard that is being written."""

    def part(self, start: int, stop: int) -> memoryview:
        """Return the file's bytes from `start` to `stop`, once they are ready.

        Called for one part at a time, in file order. The memory is writable; it stays unchanged
        as long as there is a reference to it. The bytes of header and checksums are undefined.
        """

    def check(self) -> None:
        """Raise if the bytes are not consistent. Called once, before the checksums are written."""

    def close(self) -> None:
        """Free memory; no part is needed any more."""


def write_shard(store: Store, key: str, layout: Layout, content: ShardBytes) -> ShardFile:
    """Write a shard as the new key `key`. Durable on return.

    Raises:
        AlreadyExists, StoreError: as `Store.write`.
        CheckpointError: `content` is not consistent; nothing is left under the key.
    """
    hashes = _BlockHashes(layout)
    checksums = b""

    def parts() -> Iterator[memoryview]:
        nonlocal checksums
        for start in range(0, layout.total_bytes, store.part_bytes):
            stop = min(start + store.part_bytes, layout.total_bytes)
            memory = content.part(start, stop)
            _overlay(memory, start, layout.header, 0)
            hashes.add(memory, start)
            if stop > layout.checksums_start and not checksums:
                content.check()
                checksums = np.array(hashes.digests, "<u8").tobytes()
            _overlay(memory, start, checksums, layout.checksums_start)
            yield memory
            del memory

    try:
        store.write(key, layout.total_bytes, parts())
    finally:
        content.close()
    return ShardFile(
        layout.total_bytes, layout.header_bytes, checksum(layout.header), checksum(checksums)
    )


def _overlay(memory: memoryview, start: int, data: bytes, position: int) -> None:
    """Copy what a part holds of `data`, which begins at `position` of the file."""
    first, last = max(start, position), min(start + len(memory), position + len(data))
    if first < last:
        memory[first - start : last - start] = data[first - position : last - position]


class _BlockHashes:
    """Checksums of the blocks of a shard whose bytes come in file order."""

    def __init__(self, layout: Layout) -> None:
        self.digests: list[int] = []
        self._blocks = list(layout.blocks())
        self._running = xxhash.xxh3_64()

    def add(self, memory: memoryview, start: int) -> None:
        """Take in the file's bytes from `start`."""
        stop = start + len(memory)
        while len(self.digests) < len(self._blocks):
            first, last = self._blocks[len(self.digests)]
            if first >= stop:
                return
            self._running.update(memory[max(first, start) - start : min(last, stop) - start])
            if last > stop:
                return
            self.digests.append(self._running.intdigest())
            self._running.reset()


class LiveTensors:
    """Shard bytes read from tensors that do not change meanwhile; only a few parts are in memory.

    Args:
        layout: positions of the tensors in the file.
        tensor_of: returns the tensor of a key, on any device and with any strides. Called for
            every part that holds some of it, for one at a time.
        check: raises if the tensors have changed.
    """

    def __init__(
        self,
        layout: Layout,
        tensor_of: Callable[[str], Tensor],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._layout, self._tensor_of, self.check = layout, tensor_of, check
        self.closed = threading.Event()
        """Set when the tensors are not read any more."""
        self._chunk_starts = [chunk.start for chunk in layout.chunks]
        self._free: list[HostBuffer] = []

    def part(self, start: int, stop: int) -> memoryview:
        """Copy the file's bytes from `start` to `stop` into a buffer that no part uses."""
        buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) < stop - start:
            buffer = HostBuffer(stop - start, pinned=False)
        memory = buffer.array[: stop - start]
        weakref.finalize(memory, self._free.append, buffer).atexit = False
        self._fill(memory, start)
        return memory.data

    def close(self) -> None:
        """Free all buffers, and allow the tensors to change."""
        self._free.clear()
        self.closed.set()

    def _fill(self, memory: Bytes, begin: int) -> None:
        end = begin + len(memory)
        index = max(bisect_right(self._chunk_starts, begin) - 1, 0)
        for chunk in self._layout.chunks[index:]:
            if chunk.start >= end:
                break
            start, stop = max(chunk.start, begin), min(chunk.stop, end)
            if start < stop:
                target = memory[start - begin : stop - begin]
                if chunk.key == shard.PADDING:
                    target[:] = 0
                    continue
                tensor = self._tensor_of(chunk.key)
                _copy(tensor, start - chunk.start, stop - chunk.start, target)


def _copy(tensor: Tensor, start: int, stop: int, target: Bytes) -> None:
    """Copy a byte range of a tensor, as if it were contiguous."""
    tensor = tensor.detach()
    if is_plain(tensor):
        if tensor.device.type != "cpu":
            item_bytes = tensor.element_size()
            first, last = start // item_bytes, -(-stop // item_bytes)
            tensor = as_bits(tensor).view(-1)[first:last].cpu()
            start, stop = start - first * item_bytes, stop - first * item_bytes
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
    rows = as_bits(tensor[first:last]).cpu()
    rows = rows.contiguous(memory_format=torch.contiguous_format)
    np.copyto(target, bytes_of(rows)[start - offset : stop - offset])
