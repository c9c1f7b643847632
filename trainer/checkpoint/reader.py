"""Reads from checkpoints into live tensors: parallel ranged reads with every block verified.

Data lands in a small ring of page-aligned buffers, so that a disk can be read with direct I/O. It
is verified there while it is in the processor's cache, and copied to its destination. Only blocks
that hold requested data are read, and no second copy of the state is ever in memory.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import plan, shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import Manifest, ShardFile, TensorEntry, checksum
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer, to_pages
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES
from trainer.checkpoint.read_plan import (
    Block,
    ReadRange,
    ReadTask,
    block_runs,
    direct_destination,
    merge_ranges,
    plan_box,
    stage,
)
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.storage.store import NewFile, Readable

_THREADS = 8

_Check = tuple[shard.Chunk | None, int, int, str]
"""A block to verify: its tensor (None: the header), first and last byte in the file, checksum."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint were read completely and fail verification."""


class MissingError(DamagedError):
    """A file of a checkpoint does not exist."""


class Reader:
    """Reads tensors of one committed checkpoint. Needs no process group.

    Args:
        store: the run's store.
        folder: key of the checkpoint's folder.
        manifest: the checkpoint's manifest.
        peers: number of processes on this machine that read the same checkpoint at the same time.
            Data that several of them need is then read from the disk once.
    """

    def __init__(self, store: Readable, folder: str, manifest: Manifest, *, peers: int = 1) -> None:
        self._store, self._folder, self._manifest, self._peers = store, folder, manifest, peers
        self._files = list(manifest.files)
        self._headers: dict[str, tuple[dict[str, shard.Chunk], list[str]]] = {}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill each tensor of `targets`, in place, with the stored tensor of that name.

        For a DTensor each rank reads its local part. No collectives.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its shape or dtype differs.
            DamagedError: bytes failed verification twice; `targets` may be partly overwritten.
        """
        for name, target in targets.items():
            self._check_target(name, target)
        plain = {name: t for name, t in targets.items() if not hasattr(t, "device_mesh")}
        sharded = {name: t for name, t in targets.items() if name not in plain}
        boxes = {name: Box.full(tensor.shape) for name, tensor in plain.items()}
        if sharded:
            boxes |= {item.name: item.box for item in plan.describe(sharded, [0])}
        requests = [
            (name, boxes[name], plan.local(target.detach()))
            for name, target in targets.items()
            if name in boxes  # a DTensor whose mesh excludes this rank has no box
        ]
        self.read_boxes(requests, is_shared=self._peers > 1 and not sharded)

    def read_boxes(
        self, requests: Iterable[tuple[str, Box, Tensor]], *, is_shared: bool = False
    ) -> None:
        """Fill each tensor with a box of the stored tensor of that name. No collectives.

        Data is converted to the target's dtype.

        Args:
            requests: tensor name, box, and target of the box's shape.
            is_shared: other processes on this machine read the same bytes at the same time.

        Raises:
            CheckpointError, DamagedError: as `read`.
        """
        parts = []
        for name, box, target in requests:
            owner, entry = self._entry(name)
            stored = entry.boxes(self._files, box) if box.elements else ()
            parts += [(owner, file, part, box, target) for file, part in stored]
        in_parallel(self._header, sorted({part[1] for part in parts}), _THREADS)
        ranges: list[tuple[str, ReadRange]] = []
        slabs: list[ReadTask] = []
        for owner, file, part, box, target in parts:
            chunk = self._chunk(owner, file, part)
            dtype = TORCH_DTYPES[self._manifest.tensors[owner].dtype]
            direct, staged = plan_box(file, chunk, part, dtype, box, target)
            ranges += [(file, direct)] if direct is not None else []
            slabs += staged
        self._read([*self._merged(ranges), *slabs], is_shared=is_shared)

    def fetch(self, name: str) -> Tensor:
        """Return a stored tensor as a new CPU tensor."""
        owner, entry = self._entry(name)
        boxes = list(entry.boxes(self._files, Box.full(entry.shape)))
        in_parallel(self._header, sorted({file for file, _ in boxes}), _THREADS)
        for file, box in boxes:
            self._chunk(owner, file, box)  # raises before memory is allocated
        target = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.read({name: target})
        return target

    def verify(
        self,
        files: Sequence[str] | None = None,
        progress: Callable[[int], object] = lambda checked_bytes: None,
    ) -> None:
        """Read and verify every byte. Only the blocks being verified are in memory.

        Args:
            files: shards to verify. None: all shards, and that they hold the manifest's tensors.
            progress: called with the number of bytes just verified, from several threads.

        Raises:
            DamagedError: the first mismatch, with file and tensor.
        """
        selected = self._files if files is None else files
        in_parallel(self._header, selected, _THREADS)
        for name, entry in self._manifest.tensors.items() if files is None else ():
            for file, box in entry.boxes(self._files, Box.full(entry.shape)):
                self._chunk(name, file, box)
        empty = np.empty(0, np.uint8)
        ranges = [
            (file, ReadRange(chunk, 0, chunk.nbytes, empty))
            for file in selected
            for chunk in self._header(file)[0].values()
        ]
        progress(sum(self._manifest.files[file].header_bytes for file in selected))
        self._read(self._merged(ranges), progress=progress)

    def copy_file(self, file: str, new: NewFile) -> None:
        """Write one shard into `new`, part by part, with every block verified.

        The caller finishes or aborts `new`. At most eight parts are in memory at a time.
        """
        record = self._manifest.files[file]
        chunks, digests = self._header(file)
        step = self._manifest.block_bytes
        checks: list[_Check] = [(None, 0, record.header_bytes, record.header_checksum)]
        for chunk in chunks.values():
            for number, start in enumerate(range(chunk.start, chunk.stop, step), chunk.block):
                checks.append((chunk, start, min(start + step, chunk.stop), digests[number]))
        starts = [start for _, start, _, _ in checks]

        def copy(part: int) -> None:
            part_stop = min(part + new.part_bytes, record.bytes)
            inside = checks[bisect_right(starts, part) - 1 : bisect_left(starts, part_stop)]
            begin, end = inside[0][1] // PAGE_BYTES * PAGE_BYTES, inside[-1][2]
            memory = HostBuffer(to_pages(end - begin), pinned=False).view
            self._read_verified(file, begin, memory, inside)
            new.put(part, memory[part - begin : part_stop - begin])

        in_parallel(copy, range(0, record.bytes, new.part_bytes), _THREADS)

    # --- requests against the manifest ----------------------------------------------------------

    def _entry(self, name: str) -> tuple[str, TensorEntry]:
        """Return the entry of a tensor, following an alias, with the name it is stored under."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._where()} has no tensor {name!r}")
        return self._manifest.tensors[name].alias or name, self._manifest.resolve(name)

    def _check_target(self, name: str, target: Tensor) -> None:
        _, entry = self._entry(name)
        stored = (entry.dtype, tuple(entry.shape))
        needed = (DTYPE_NAMES.get(target.dtype, str(target.dtype)), tuple(target.shape))
        if stored != needed:
            raise CheckpointError(
                f"{self._where()}: tensor {name!r} is {_describe(*stored)}, this model needs "
                f"{_describe(*needed)}"
            )

    def _chunk(self, name: str, file: str, box: Box) -> shard.Chunk:
        """Return the chunk of a stored box, after comparing it with the manifest."""
        chunks, _ = self._header(file)
        entry = self._manifest.tensors[name]
        is_complete = box.lengths == tuple(entry.shape)
        key = shard.part_key(name, None if is_complete else box.offsets)
        stored = (entry.dtype, box.lengths)
        if entry.dtype == "C128":
            stored = ("F64", (*box.lengths, 2))
        if key not in chunks or (chunks[key].dtype, chunks[key].shape) != stored:
            raise CheckpointError(
                f"{self._where()}: {file} does not hold {key!r} as {_describe(*stored)}, as its "
                "manifest states. Verify the checkpoint and restore it from another copy"
            )
        return chunks[key]

    # --- reads and verification -----------------------------------------------------------------

    def _merged(self, ranges: Iterable[tuple[str, ReadRange]]) -> list[ReadTask]:
        return merge_ranges(ranges, self._manifest.block_bytes, self._store.read_bytes)

    def _read(
        self,
        tasks: Sequence[ReadTask],
        *,
        is_shared: bool = False,
        progress: Callable[[int], object] = lambda read_bytes: None,
    ) -> None:
        """Run all tasks, several at a time."""
        block_bytes, read_bytes = self._manifest.block_bytes, self._store.read_bytes
        slot_bytes = to_pages(read_bytes + block_bytes + 2 * PAGE_BYTES)
        count = min(_THREADS, len(tasks))
        ring = HostBuffer(count * slot_bytes, pinned=False)
        free = [slice(i * slot_bytes, (i + 1) * slot_bytes) for i in range(count)]

        def run(task: ReadTask) -> None:
            slot = free.pop()  # atomic; there are as many slots as threads
            try:
                ranges = task.ranges
                if task.slab is not None:
                    ranges, copy = stage(task.slab)
                for blocks in block_runs(ranges, block_bytes, read_bytes):
                    self._read_blocks(task.file, blocks, ring.array[slot], is_shared=is_shared)
                if task.slab is not None:
                    copy()
                progress(sum(part.stop - part.start for part in ranges))
            finally:
                free.append(slot)

        in_parallel(run, tasks, count)

    def _read_blocks(self, file: str, run: list[Block], slot: Bytes, *, is_shared: bool) -> None:
        """Read consecutive blocks at once, verify them, and copy the requested ranges."""
        _, digests = self._header(file)
        checks = [(b.range.chunk, b.start, b.stop, digests[b.number]) for b in run]
        direct = direct_destination(run) if is_shared else None  # buffered reads need no pages
        if direct is not None:
            self._read_verified(file, run[0].start, direct.data, checks, is_shared=True)
            return
        begin = run[0].start // PAGE_BYTES * PAGE_BYTES
        memory = slot[: to_pages(run[-1].stop - begin)]
        self._read_verified(file, begin, memory.data, checks, is_shared=is_shared)
        for block in run:
            part = block.range
            start = max(block.start - part.chunk.start, part.start)
            stop = min(block.stop - part.chunk.start, part.stop)
            if len(part.destination) and stop > start:
                offset = part.chunk.start - begin
                np.copyto(
                    part.destination[start - part.start : stop - part.start],
                    memory[offset + start : offset + stop],
                )

    def _header(self, file: str) -> tuple[dict[str, shard.Chunk], list[str]]:
        """Return the chunks of a shard by key, and its checksums; the header is read once."""
        if file not in self._headers:
            record = self._manifest.files[file]
            self._check_size(file, record)
            data = bytearray(record.header_bytes)
            check = (None, 0, len(data), record.header_checksum)
            self._read_verified(file, 0, memoryview(data), [check])
            self._headers[file] = shard.parse_header(
                bytes(data),
                total_bytes=record.bytes,
                where=f"{self._where()}/{file}",
                block_bytes=self._manifest.block_bytes,
            )
        return self._headers[file]

    def _check_size(self, file: str, record: ShardFile) -> None:
        try:
            size = self._store.size(f"{self._folder}/{file}")
        except FileNotFoundError:
            raise self._damaged(file, "the file is missing", MissingError) from None
        if size != record.bytes:
            raise self._damaged(
                file,
                f"it has {size:,} bytes but its manifest records {record.bytes:,}: truncated or "
                "replaced",
            )
        if record.header_bytes > min(record.bytes, shard.MAX_HEADER_BYTES):
            raise self._damaged(file, f"a header of {record.header_bytes:,} bytes is impossible")

    def _read_verified(
        self,
        file: str,
        begin: int,
        memory: memoryview,
        checks: Sequence[_Check],
        *,
        is_shared: bool = False,
    ) -> None:
        """Read into `memory` from byte `begin` and verify the blocks; on a mismatch, read again."""
        needed = checks[-1][2] - begin
        for _ in range(2):
            try:
                count = self._store.read_into(
                    f"{self._folder}/{file}", begin, memory, is_shared=is_shared
                )
            except FileNotFoundError:
                raise self._damaged(file, "the file is missing", MissingError) from None
            if count < needed:
                raise self._damaged(file, f"truncated: it ends at byte {begin + count:,}")
            damaged = [
                (chunk, start, stop)
                for chunk, start, stop, digest in checks
                if checksum(memory[start - begin : stop - begin]) != digest
            ]
            if not damaged:
                return
        chunk, start, stop = damaged[0]
        label, origin = "its header", 0
        if chunk is not None:
            label, origin = f"tensor {chunk.key!r}", chunk.start
        span = f"bytes {start - origin:,} to {stop - origin:,}"
        raise self._damaged(file, f"checksum mismatch in {label}: {span}")

    def _where(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def _damaged(
        self, file: str, reason: str, error: type[DamagedError] = DamagedError
    ) -> CheckpointError:
        return error(
            f"step {self._manifest.step:,} of {self._store.url} cannot be loaded: shard "
            f"{self._folder}/{file}: {reason}"
        )


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
