"""Checkpoint bytes into live tensors: parallel ranged reads, every block checked on the way.

Bytes land in a small ring of page-aligned memory, so that a disk can be read past its cache, are
checked there while they are in the processor's cache, and are copied to where they belong. Only
blocks that hold something wanted are read. No second copy of the state is ever in memory.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import plan, shard
from trainer.checkpoint.manifest import Manifest, Part, ShardFile, checksum
from trainer.checkpoint.memory import PAGE_BYTES, Bytes, HostBuffer, bytes_of
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES, Box
from trainer.errors import CheckpointError
from trainer.storage.store import NewFile, Readable
from trainer.threads import in_parallel

_READERS = 8
_SLAB_BYTES = 16 << 20
"""What does not lie in memory as it lies in the file passes through a copy of this size."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint were read completely and are proven wrong."""


class MissingError(DamagedError):
    """A file of a checkpoint is not there."""


@dataclass(frozen=True)
class _Wanted:
    """Bytes of a chunk, counted from the chunk's start, and where they go."""

    chunk: shard.Chunk
    start: int
    stop: int
    place: Bytes


@dataclass(frozen=True)
class _Slab:
    """A part of a target that does not lie in memory as it lies in the file."""

    chunk: shard.Chunk
    first: int
    """Its first element in the chunk."""
    count: int
    """Elements of the chunk from its first to its last."""
    strides: tuple[int, ...]
    """Of the chunk, in elements."""
    place: Tensor


@dataclass
class _Piece:
    """What one thread reads at a time from a file: parts of chunks that lie together, or a slab."""

    file: str
    wanted: list[_Wanted] = field(default_factory=list)
    slab: _Slab | None = None


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
        pieces: list[_Piece] = []
        direct: list[tuple[str, _Wanted]] = []
        for name, target in targets.items():
            if name in boxes:  # else its mesh is without this rank
                self._want(name, plan.local(target.detach()), boxes[name], direct, pieces)
        pieces = _joined(direct, self._manifest.block_bytes, self._read_bytes) + pieces
        self._read(pieces, is_shared=self._peers > 1 and not sharded)

    def fetch(self, name: str) -> Tensor:
        """Return a stored tensor as a new CPU tensor."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._where()} has no tensor {name!r}")
        entry = self._manifest.resolve(name)
        dtype = TORCH_DTYPES[entry.dtype]
        owner = self._manifest.tensors[name].alias or name
        for part in entry.parts(self._files, (0,) * len(entry.shape), entry.shape):
            self._chunk(owner, part, dtype)  # it is there, before memory is asked for
        target = torch.empty(entry.shape, dtype=dtype)
        self.read({name: target})
        return target

    def verify(self) -> None:
        """Read and check every byte of every file."""
        for file in self._files:
            self.verify_file(file)

    def verify_file(self, file: str) -> None:
        """Read and check every byte of one file."""
        chunks, _ = self._header(file)
        nowhere = np.empty(0, np.uint8)
        wanted = [(file, _Wanted(c, 0, c.nbytes, nowhere)) for c in chunks.values()]
        self._read(_joined(wanted, self._manifest.block_bytes, self._read_bytes))

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

    def _want(
        self,
        name: str,
        target: Tensor,
        box: Box,
        direct: list[tuple[str, _Wanted]],
        pieces: list[_Piece],
    ) -> None:
        """Add what fills `target`, which is `box` of the stored tensor `name`."""
        entry, owner = self._manifest.resolve(name), self._manifest.tensors[name].alias or name
        if box.elements == 0:
            return
        for part in entry.parts(self._files, box.offsets, box.lengths):
            chunk = self._chunk(owner, part, target.dtype)
            both = _overlap(Box(part.offsets, part.lengths), box)
            if both.elements == 0:
                continue
            in_part = _relative(both, part.offsets)
            place = target
            for axis, offset in enumerate(_relative(both, box.offsets)):
                place = place.narrow(axis, offset, both.lengths[axis])
            item_bytes = target.element_size()
            strides = tuple(prod(part.lengths[axis + 1 :]) for axis in range(target.ndim))
            first, count = _span(strides, in_part, both.lengths)
            is_run = count == both.elements and place.is_contiguous()
            if is_run and place.device.type == "cpu":
                start, stop = first * item_bytes, (first + count) * item_bytes
                direct.append((part.file, _Wanted(chunk, start, stop, bytes_of(place))))
            else:
                slabs = _slabs(chunk, first, strides, place)
                pieces += [_Piece(part.file, slab=slab) for slab in slabs]

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

    def _read(self, pieces: Sequence[_Piece], *, is_shared: bool = False) -> None:
        """Read all pieces, several at a time."""
        slot_bytes = self._read_bytes + self._manifest.block_bytes + 2 * PAGE_BYTES
        slot_bytes = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
        count = min(_READERS, len(pieces))
        ring = HostBuffer(count * slot_bytes, pinned=False)
        free = [slice(i * slot_bytes, (i + 1) * slot_bytes) for i in range(count)]

        def read(piece: _Piece) -> None:
            slot = free.pop()  # atomic; there are as many slots as threads
            try:
                wanted = piece.wanted
                if piece.slab is not None:
                    wanted, copy = _landing(piece.slab)
                for run in _runs(wanted, self._manifest.block_bytes, self._read_bytes):
                    self._read_run(piece.file, run, ring.array[slot], is_shared=is_shared)
                if piece.slab is not None:
                    copy()
            finally:
                free.append(slot)

        in_parallel(read, pieces, count)

    def _read_run(self, file: str, run: "list[_Block]", slot: Bytes, *, is_shared: bool) -> None:
        """Read consecutive blocks at once, check each, copy what is wanted of them."""
        begin, end = run[0].start // PAGE_BYTES * PAGE_BYTES, run[-1].stop
        whole = -(-(end - begin) // PAGE_BYTES) * PAGE_BYTES
        in_place = _place_of(run) if is_shared else None  # the page cache needs no whole pages
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


# --- geometry ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A block of a file, and what is wanted of it."""

    number: int
    start: int
    stop: int
    wanted: _Wanted


def _joined(
    wanted: Iterable[tuple[str, _Wanted]], block_bytes: int, read_bytes: int
) -> list[_Piece]:
    """Return pieces for what goes straight to its place; neighbours in a file are read at once."""
    pieces: list[_Piece] = []
    end = -1
    for file, part in sorted(wanted, key=lambda w: (w[0], w[1].chunk.start + w[1].start)):
        step = max(read_bytes // block_bytes, 1) * block_bytes
        for start in range(part.start // block_bytes * block_bytes, part.stop, step):
            begin, stop = max(start, part.start), min(start + step, part.stop)
            place = part.place[begin - part.start : stop - part.start]
            one = _Wanted(part.chunk, begin, stop, place)
            fits = pieces and pieces[-1].file == file and end == part.chunk.start + begin
            if fits and sum(w.stop - w.start for w in pieces[-1].wanted) + stop - begin <= step:
                pieces[-1].wanted.append(one)
            else:
                pieces.append(_Piece(file, [one]))
            end = part.chunk.start + stop
    return pieces


def _runs(wanted: Sequence[_Wanted], block_bytes: int, read_bytes: int) -> Iterator[list[_Block]]:
    """Yield runs of consecutive blocks that together fit into a slot."""
    run: list[_Block] = []
    for part in wanted:
        first = part.start // block_bytes
        for index in range(first, -(-part.stop // block_bytes)):
            start = part.chunk.start + index * block_bytes
            stop = min(start + block_bytes, part.chunk.stop)
            if run and (start != run[-1].stop or stop - run[0].start > read_bytes + block_bytes):
                yield run
                run = []
            run.append(_Block(part.chunk.block + index, start, stop, part))
    if run:
        yield run


def _place_of(run: Sequence[_Block]) -> Bytes | None:
    """Return where whole blocks go one after another, if all of them go to one place."""
    wanted = run[0].wanted
    start, stop = run[0].start - wanted.chunk.start, run[-1].stop - wanted.chunk.start
    is_one = all(block.wanted is wanted for block in run) and len(wanted.place)
    if not is_one or start < wanted.start or stop > wanted.stop:
        return None
    return wanted.place[start - wanted.start : stop - wanted.start]


def _overlap(one: Box, other: Box) -> Box:
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
    chunk: shard.Chunk, first: int, strides: tuple[int, ...], place: Tensor
) -> Iterator[_Slab]:
    """Cut what goes to `place` into slabs of bounded size."""
    _, count = _span(strides, (0,) * place.ndim, place.shape)
    rows = max(_SLAB_BYTES // (strides[0] * place.element_size()), 1) if place.ndim else 1
    if place.ndim == 0 or (place.shape[0] <= rows and (rows > 1 or place.ndim == 1)):
        yield _Slab(chunk, first, count, strides, place)
    elif rows > 1 or place.ndim == 1:
        for row in range(0, place.shape[0], rows):
            part = place.narrow(0, row, min(rows, place.shape[0] - row))
            yield from _slabs(chunk, first + row * strides[0], strides, part)
    else:
        for row in range(place.shape[0]):
            yield from _slabs(chunk, first + row * strides[0], strides[1:], place[row])


def _landing(slab: _Slab) -> tuple[list[_Wanted], Callable[[], object]]:
    """Return where a slab's bytes land, and what copies them from there to their place."""
    memory = torch.empty(slab.count, dtype=slab.place.dtype)
    view = memory.as_strided(tuple(slab.place.shape), slab.strides)
    item_bytes = memory.element_size()
    start, stop = slab.first * item_bytes, (slab.first + slab.count) * item_bytes
    wanted = _Wanted(slab.chunk, start, stop, bytes_of(memory))
    return [wanted], lambda: slab.place.copy_(view)


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
