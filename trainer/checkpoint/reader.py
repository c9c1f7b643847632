"""Checkpoint bytes into live tensors: parallel ranged reads, every block checked on the way.

Bytes land in a small ring of page-aligned memory, so that a disk can be read past its cache, are
checked there while they are in the processor's cache, and are copied to where they belong. Only
blocks that hold something wanted are read. No second copy of the state is ever in memory.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import plan, shard
from trainer.checkpoint.manifest import Manifest, Part, ShardFile, checksum
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES, Box
from trainer.checkpoint.read_plan import (
    Block,
    Piece,
    Wanted,
    joined,
    landing,
    pieces_for,
    place_of,
    runs,
)
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.storage.store import NewFile, Readable

_READERS = 8


class DamagedError(CheckpointError):
    """Bytes of a checkpoint were read completely and are proven wrong."""


class MissingError(DamagedError):
    """A file of a checkpoint is not there."""


class Reader:
    """Reads tensors of one committed checkpoint; needs no process group.

    Args:
        store: the run's store.
        folder: key of the checkpoint's folder.
        manifest: of this checkpoint.
        peers: how many processes of this machine read the same checkpoint at the same time; what
            several need is read from the disk once.
    """

    def __init__(self, store: Readable, folder: str, manifest: Manifest, *, peers: int = 1) -> None:
        self._peers = peers
        self._store = store
        self._read_bytes = store.read_bytes
        self._folder = folder
        self._manifest = manifest
        self._files = list(manifest.files)
        self._headers: dict[str, tuple[dict[str, shard.Chunk], list[str]]] = {}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill each tensor of `targets`, in place, with the stored tensor of that name.

        Of a DTensor each rank reads what it holds. No collectives.

        Raises:
            CheckpointError: a name is not there, has another shape or dtype, or its bytes are
                proven wrong: read completely, twice.
        """
        for name, target in targets.items():
            self._check(name, target)
        whole = {name: t for name, t in targets.items() if not hasattr(t, "device_mesh")}
        boxes = {name: Box((0,) * t.ndim, tuple(t.shape)) for name, t in whole.items()}
        sharded = {name: t for name, t in targets.items() if name not in whole}
        if sharded:
            boxes |= {item.name: item.box for item in plan.describe(sharded, [0])}
        wanted = [
            (name, boxes[name], plan.local(target.detach()))
            for name, target in targets.items()
            if name in boxes  # else its mesh is without this rank
        ]
        self.read_boxes(wanted, is_shared=self._peers > 1 and not sharded)

    def read_boxes(
        self, wanted: Iterable[tuple[str, Box, Tensor]], *, is_shared: bool = False
    ) -> None:
        """Fill each tensor with a box of the stored tensor of that name. No collectives.

        What is stored in another dtype is converted.

        Raises:
            CheckpointError: as `read`.
        """
        parts = []
        for name, box, target in wanted:
            if name not in self._manifest.tensors:
                raise CheckpointError(f"{self._where()} has no tensor {name!r}")
            owner = self._manifest.tensors[name].alias or name
            found = self._manifest.tensors[owner].parts(self._files, box.offsets, box.lengths)
            parts += [(owner, part, box, target) for part in found if box.elements]
        files = sorted({part.file for _, part, _, _ in parts} - self._headers.keys())
        in_parallel(self._header, files, _READERS)
        direct: list[tuple[str, Wanted]] = []
        pieces: list[Piece] = []
        for owner, part, box, target in parts:
            dtype = TORCH_DTYPES[self._manifest.tensors[owner].dtype]
            chunk = self._chunk(owner, part, dtype)
            straight, slabs = pieces_for(chunk, part, dtype, box, target)
            direct += [(part.file, straight)] if straight is not None else []
            pieces += slabs
        pieces = joined(direct, self._manifest.block_bytes, self._read_bytes) + pieces
        self._read(pieces, is_shared=is_shared)

    def fetch(self, name: str) -> Tensor:
        """Return a stored tensor as a new CPU tensor."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._where()} has no tensor {name!r}")
        entry = self._manifest.resolve(name)
        dtype = TORCH_DTYPES[entry.dtype]
        owner = self._manifest.tensors[name].alias or name
        parts = list(entry.parts(self._files, (0,) * len(entry.shape), entry.shape))
        in_parallel(self._header, sorted({part.file for part in parts}), _READERS)
        for part in parts:
            self._chunk(owner, part, dtype)  # it is there, before memory is asked for
        target = torch.empty(entry.shape, dtype=dtype)
        self.read({name: target})
        return target

    def verify(
        self,
        files: Sequence[str] | None = None,
        progress: Callable[[int], object] = lambda checked_bytes: None,
    ) -> None:
        """Read and check every byte. Only the blocks that are being checked are in memory.

        Args:
            files: of the checkpoint; None: all of them.
            progress: told, from several threads, how many more bytes were found right.

        Raises:
            DamagedError: the first that was found; names the file and the tensor.
        """
        is_whole, files = files is None, self._files if files is None else files
        in_parallel(self._header, files, _READERS)
        for name, entry in self._manifest.tensors.items() if is_whole else ():
            for part in entry.parts(self._files, (0,) * len(entry.shape), entry.shape):
                self._chunk(name, part, TORCH_DTYPES[entry.dtype])  # where the manifest says
        nowhere = np.empty(0, np.uint8)
        wanted = [
            (file, Wanted(chunk, 0, chunk.nbytes, nowhere))
            for file in files
            for chunk in self._header(file)[0].values()
        ]
        progress(sum(self._manifest.files[file].header_bytes for file in files))
        pieces = joined(wanted, self._manifest.block_bytes, self._read_bytes)
        self._read(pieces, progress=progress)

    def copy_file(self, file: str, new: NewFile) -> None:
        """Write one file into `new`, part by part, every block checked on the way.

        The caller finishes or aborts `new`. Several parts are in memory at a time, never more.
        """
        record = self._manifest.files[file]
        chunks, digests = self._header(file)
        step = self._manifest.block_bytes
        blocks = [("its header", 0, record.header_bytes, record.header_checksum)]
        for chunk in chunks.values():
            for number, start in enumerate(range(chunk.start, chunk.stop, step), chunk.block):
                stop = min(start + step, chunk.stop)
                blocks.append((f"tensor {chunk.key!r}", start, stop, digests[number]))
        starts = [start for _, start, _, _ in blocks]

        def copy(part: int) -> None:
            part_stop = min(part + new.part_bytes, record.bytes)
            inside = blocks[bisect_right(starts, part) - 1 : bisect_left(starts, part_stop)]
            begin, end = inside[0][1] // PAGE_BYTES * PAGE_BYTES, inside[-1][2]
            buffer = HostBuffer(-(-(end - begin) // PAGE_BYTES) * PAGE_BYTES, pinned=False).array
            for last_try in (False, True):
                self._read_range(file, begin, buffer.data, needed=end - begin)
                wrong = [
                    (what, start, stop)
                    for what, start, stop, digest in inside
                    if checksum(buffer[start - begin : stop - begin].data) != digest
                ]
                if not wrong:
                    break
                if last_try:
                    what, start, stop = wrong[0]
                    where = f"{what}: bytes {start:,} to {stop:,} of the file"
                    raise self._damaged(file, f"{where} do not match their checksum")
            new.put(part, buffer[part - begin : part_stop - begin].data)

        in_parallel(copy, range(0, record.bytes, new.part_bytes), _READERS)

    # --- what is wanted, and where it lies ------------------------------------------------------

    def _check(self, name: str, target: Tensor) -> None:
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._where()} has no tensor {name!r}")
        entry = self._manifest.resolve(name)
        found = (entry.dtype, tuple(entry.shape))
        wanted = (DTYPE_NAMES.get(target.dtype, str(target.dtype)), tuple(target.shape))
        if found != wanted:
            raise CheckpointError(
                f"{self._where()}: tensor {name!r} is {_describe(*found)}, this model needs "
                f"{_describe(*wanted)}"
            )

    def _chunk(self, name: str, part: Part, dtype: torch.dtype) -> shard.Chunk:
        chunks, _ = self._header(part.file)
        whole = tuple(part.lengths) == tuple(self._manifest.tensors[name].shape)
        key = shard.part_key(name, None if whole else part.offsets)
        stored = (DTYPE_NAMES[dtype], tuple(part.lengths))
        if dtype == torch.complex128:
            stored = ("F64", (*part.lengths, 2))
        if key not in chunks or (chunks[key].dtype, chunks[key].shape) != stored:
            raise CheckpointError(
                f"{self._where()}: {part.file} does not hold {key!r} as {_describe(*stored)}, "
                "which the manifest says"
            )
        return chunks[key]

    # --- reading and checking -------------------------------------------------------------------

    def _read(
        self,
        pieces: Sequence[Piece],
        *,
        is_shared: bool = False,
        progress: Callable[[int], object] = lambda read_bytes: None,
    ) -> None:
        """Read all pieces, several at a time."""
        slot_bytes = self._read_bytes + self._manifest.block_bytes + 2 * PAGE_BYTES
        slot_bytes = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
        count = min(_READERS, len(pieces))
        ring = HostBuffer(count * slot_bytes, pinned=False)
        free = [slice(i * slot_bytes, (i + 1) * slot_bytes) for i in range(count)]

        def read(piece: Piece) -> None:
            slot = free.pop()  # atomic; there are as many slots as threads
            try:
                wanted = piece.wanted
                if piece.slab is not None:
                    wanted, copy = landing(piece.slab)
                for run in runs(wanted, self._manifest.block_bytes, self._read_bytes):
                    self._read_run(piece.file, run, ring.array[slot], is_shared=is_shared)
                if piece.slab is not None:
                    copy()
                progress(sum(part.stop - part.start for part in wanted))
            finally:
                free.append(slot)

        in_parallel(read, pieces, count)

    def _read_run(self, file: str, run: list[Block], slot: Bytes, *, is_shared: bool) -> None:
        """Read consecutive blocks at once, check each, copy what is wanted of them."""
        begin, end = run[0].start // PAGE_BYTES * PAGE_BYTES, run[-1].stop
        whole = -(-(end - begin) // PAGE_BYTES) * PAGE_BYTES
        in_place = place_of(run) if is_shared else None  # the page cache needs no whole pages
        if in_place is not None:
            begin, whole, slot = run[0].start, len(in_place), in_place
        _, digests = self._header(file)
        for last_try in (False, True):
            self._read_range(
                file, begin, slot[:whole].data, needed=end - begin, is_shared=is_shared
            )
            wrong = [
                block
                for block in run
                if checksum(slot[block.start - begin : block.stop - begin].data)
                != digests[block.number]
            ]
            if not wrong:
                break
            if last_try:
                chunk = wrong[0].wanted.chunk
                first, last = wrong[0].start - chunk.start, wrong[0].stop - chunk.start
                raise self._damaged(
                    file,
                    f"tensor {chunk.key!r}: bytes {first:,} to {last:,} do not match their "
                    "checksum",
                )
        for block in run if in_place is None else ():
            wanted = block.wanted
            start = max(block.start - wanted.chunk.start, wanted.start)
            stop = min(block.stop - wanted.chunk.start, wanted.stop)
            if len(wanted.place) and stop > start:
                source = wanted.chunk.start - begin
                np.copyto(
                    wanted.place[start - wanted.start : stop - wanted.start],
                    slot[source + start : source + stop],
                )

    def _header(self, file: str) -> tuple[dict[str, shard.Chunk], list[str]]:
        if file not in self._headers:
            record = self._manifest.files[file]
            self._check_size(file, record)
            data = bytearray(record.header_bytes)
            for last_try in (False, True):
                self._read_range(file, 0, memoryview(data), needed=len(data))
                if checksum(data) == record.header_checksum:
                    break
                if last_try:
                    raise self._damaged(file, "its header does not match its checksum")
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
                f"it is {size:,} bytes, the manifest says {record.bytes:,}: cut short or replaced",
            )
        if record.header_bytes > min(record.bytes, shard.MAX_HEADER_BYTES):
            raise self._damaged(file, f"a header of {record.header_bytes:,} bytes cannot be")

    def _read_range(
        self, file: str, start: int, buffer: memoryview, *, needed: int, is_shared: bool = False
    ) -> None:
        key = f"{self._folder}/{file}"
        try:
            count = self._store.read_into(key, start, buffer, is_shared=is_shared)
        except FileNotFoundError:
            raise self._damaged(file, "the file is missing", MissingError) from None
        if count < needed:
            raise self._damaged(file, f"it ends at byte {start + count:,}: cut short")

    def _where(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def _damaged(
        self, file: str, what: str, kind: type[DamagedError] = DamagedError
    ) -> CheckpointError:
        return kind(
            f"step {self._manifest.step:,} of {self._store.url} cannot be loaded: shard "
            f"{self._folder}/{file}: {what}"
        )


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
