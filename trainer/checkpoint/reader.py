"""Reads from checkpoints into live tensors: parallel ranged reads with every block verified.

Data lands in a small ring of page-aligned buffers, so that a disk can be read with direct I/O. It
is verified there while it is in the processor's cache, and copied to its destination. Only blocks
that hold requested data are read, and no second copy of the state is ever in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import plan, shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.dtypes import TORCH_NAMES, stored_as
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer, empty, to_pages
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
from trainer.checkpoint.shard_reader import Check, ShardReader
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.storage.store import Readable

_THREADS = 8


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
        self._store, self._manifest, self._peers = store, manifest, peers
        self._files = list(manifest.files)
        self._shards = ShardReader(store, folder, manifest)

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
            boxes |= {item.name: item.box for item in plan.describe(sharded)}
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
        in_parallel(self._shards.content, sorted({part[1] for part in parts}), _THREADS)
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
        in_parallel(self._shards.content, sorted({file for file, _ in boxes}), _THREADS)
        for file, box in boxes:
            self._chunk(owner, file, box)  # raises before memory is allocated
        target = empty(entry.shape, TORCH_DTYPES[entry.dtype])
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
        in_parallel(self._shards.content, selected, _THREADS)
        in_parallel(self._shards.check_header, selected, _THREADS)
        for name, entry in self._manifest.tensors.items() if files is None else ():
            for file, box in entry.boxes(self._files, Box.full(entry.shape)):
                self._chunk(name, file, box)
        empty = np.empty(0, np.uint8)
        ranges = [
            (file, ReadRange(chunk, 0, chunk.nbytes, empty))
            for file in selected
            for chunk in self._shards.content(file).chunks.values()
        ]
        stored = sum(self._manifest.files[file].bytes for file in selected)
        progress(stored - sum(part.chunk.nbytes for _, part in ranges))
        self._read(self._merged(ranges), progress=progress)

    # --- requests against the manifest ----------------------------------------------------------

    def _entry(self, name: str) -> tuple[str, TensorEntry]:
        """Return the entry of a tensor, following an alias, with the name it is stored under."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._shards.where} has no tensor {name!r}")
        entry = self._manifest.resolve(name)
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self._shards.where}: tensor {name!r} is {entry.dtype}, "
                f"torch.{TORCH_NAMES[entry.dtype]}, which torch {torch.__version__} does not have; "
                "install the version of torch that wrote it, or a newer one"
            )
        return self._manifest.tensors[name].alias or name, entry

    def _check_target(self, name: str, target: Tensor) -> None:
        _, entry = self._entry(name)
        stored = (entry.dtype, tuple(entry.shape))
        needed = (DTYPE_NAMES.get(target.dtype, str(target.dtype)), tuple(target.shape))
        if stored != needed:
            raise CheckpointError(
                f"{self._shards.where}: tensor {name!r} is {_describe(*stored)}, this model needs "
                f"{_describe(*needed)}"
            )

    def _chunk(self, name: str, file: str, box: Box) -> shard.Chunk:
        """Return the chunk of a stored box, after comparing it with the manifest."""
        chunks = self._shards.content(file).chunks
        entry = self._manifest.tensors[name]
        key = self._manifest.key(name, box)
        expected = (entry.dtype, box.lengths)
        if self._manifest.version == 1:
            expected = stored_as(*expected)
        if key not in chunks or (chunks[key].dtype, chunks[key].shape) != expected:
            raise CheckpointError(
                f"{self._shards.where}: {file} does not hold {key!r} as {_describe(*expected)}, as "
                "its manifest states. Verify the checkpoint and restore it from another copy"
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
        digests = self._shards.content(file).digests
        checks: list[Check] = [(b.range.chunk, b.start, b.stop, digests[b.number]) for b in run]
        direct = direct_destination(run) if is_shared else None  # buffered reads need no pages
        if direct is not None:
            self._shards.read_verified(file, run[0].start, direct.data, checks, is_shared=True)
            return
        begin = run[0].start // PAGE_BYTES * PAGE_BYTES
        memory = slot[: to_pages(run[-1].stop - begin)]
        self._shards.read_verified(file, begin, memory.data, checks, is_shared=is_shared)
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


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
