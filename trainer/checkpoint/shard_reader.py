"""Verified reads of shards: the position of every chunk, the checksum of every block."""

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.checkpoint import shard, shard_v1
from trainer.checkpoint.manifest import Manifest, ShardFile, pieces
from trainer.checkpoint.memory import PAGE_BYTES, HostBuffer, to_pages
from trainer.core.threads import map_ahead
from trainer.errors import CheckpointError
from trainer.storage.store import Readable

_READS_AHEAD = 8

Check = tuple[shard.Chunk | str, int, int, int]
"""A block to verify: its tensor (or `header`, `checksums`), first and last byte, checksum."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint were read completely and fail verification."""


class MissingError(DamagedError):
    """A file of a checkpoint does not exist."""


@dataclass(frozen=True)
class Content:
    """Content of a shard."""

    chunks: Mapping[str, shard.Chunk]
    """By key, in file order."""
    digests: Sequence[int]
    """Checksums of all blocks, in file order."""
    checksums_start: int
    """First byte of the block checksums; the size of the file in version 1."""
    layout: shard.Layout | None = None
    """Layout that follows from the manifest; None in version 1."""


class ShardReader:
    """Reads shards of one committed checkpoint.

    Args:
        store: the run's store.
        folder: key of the checkpoint's folder.
        manifest: the checkpoint's manifest.
    """

    def __init__(self, store: Readable, folder: str, manifest: Manifest) -> None:
        self._store, self._folder, self._manifest = store, folder, manifest
        self._files = list(manifest.files)
        self._contents: dict[str, Content] = {}

    @property
    def where(self) -> str:
        """Location of the checkpoint, for errors."""
        return f"{self._store.url}/{self._folder}"

    def content(self, file: str) -> Content:
        """Return what a shard holds; read and verified once.

        In version 1 this is in the header. Since version 2 the chunks follow from the manifest,
        and the checksums are at the end of the file.

        Raises:
            CheckpointError: the file cannot be what the manifest states.
            DamagedError: its checksums fail verification.
        """
        if file not in self._contents:
            record = self._manifest.files[file]
            self._check_size(file, record)
            read = self._content_v1 if self._manifest.version == 1 else self._content_v2
            self._contents[file] = read(file, record)
        return self._contents[file]

    def _content_v1(self, file: str, record: ShardFile) -> Content:
        data = bytearray(record.header_bytes)
        self.read_verified(file, 0, memoryview(data), [_header_check(record)])
        chunks, digests = shard_v1.parse_header(
            bytes(data),
            total_bytes=record.bytes,
            where=f"{self.where}/{file}",
            block_bytes=self._manifest.block_bytes,
        )
        return Content(chunks, digests, record.bytes)

    def _content_v2(self, file: str, record: ShardFile) -> Content:
        layout = self._layout(file, record)
        data = np.empty(record.bytes - layout.checksums_start, np.uint8)
        if len(data):
            check = _checksums_check(record, layout.checksums_start)
            self.read_verified(file, layout.checksums_start, data.data, [check])
        chunks = {chunk.key: chunk for chunk in layout.chunks}
        return Content(chunks, data.view("<u8").tolist(), layout.checksums_start, layout)

    def _layout(self, file: str, record: ShardFile) -> shard.Layout:
        """Return the layout of a shard of version 2, which follows from the manifest."""
        layout = shard.lay_out(
            pieces(self._manifest, self._files.index(file)),
            block_bytes=self._manifest.block_bytes,
            header_bytes=record.header_bytes,
        )
        if layout.total_bytes != record.bytes:
            raise CheckpointError(
                f"{self.where}: the tensors of {file} need {layout.total_bytes:,} bytes, but its "
                f"manifest records {record.bytes:,}; the program that wrote it broke the format"
            )
        return layout

    def check_header(self, file: str) -> None:
        """Verify the header of a shard, and that it describes the tensors of the manifest.

        Raises:
            DamagedError: it does not.
        """
        record = self._manifest.files[file]
        layout = self.content(file).layout
        data = memoryview(bytearray(record.header_bytes))
        self.read_verified(file, 0, data, [_header_check(record)])
        if layout is not None and data != layout.header:
            raise self._damaged(file, "its header describes other tensors than its manifest")

    def parts(self, file: str, part_bytes: int) -> Generator[memoryview, None, None]:
        """Yield the bytes of one shard in parts, in order, with every block verified.

        Up to eight parts are read ahead.

        Raises:
            DamagedError: the first mismatch.
        """
        self.check_header(file)
        record, content = self._manifest.files[file], self.content(file)
        step = self._manifest.block_bytes
        checks = [_header_check(record)]
        for chunk in content.chunks.values():
            for number, start in enumerate(range(chunk.start, chunk.stop, step), chunk.block):
                stop = min(start + step, chunk.stop)
                checks.append((chunk, start, stop, content.digests[number]))
        if content.checksums_start < record.bytes:
            checks.append(_checksums_check(record, content.checksums_start))
        starts = [start for _, start, _, _ in checks]

        def read(part: int) -> memoryview:
            part_stop = min(part + part_bytes, record.bytes)
            inside = checks[bisect_right(starts, part) - 1 : bisect_left(starts, part_stop)]
            begin, end = inside[0][1] // PAGE_BYTES * PAGE_BYTES, inside[-1][2]
            memory = HostBuffer(to_pages(end - begin), pinned=False).view
            self.read_verified(file, begin, memory, inside)
            return memory[part - begin : part_stop - begin]

        return map_ahead(read, range(0, record.bytes, part_bytes), _READS_AHEAD)

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

    def read_verified(
        self,
        file: str,
        begin: int,
        memory: memoryview,
        checks: Sequence[Check],
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
                if shard.digest(memory[start - begin : stop - begin]) != digest
            ]
            if not damaged:
                return
        chunk, start, stop = damaged[0]
        label, origin = f"its {chunk}", 0
        if isinstance(chunk, shard.Chunk):
            label, origin = f"tensor {chunk.key!r}", chunk.start
        span = f"bytes {start - origin:,} to {stop - origin:,}"
        raise self._damaged(file, f"checksum mismatch in {label}: {span}")

    def _damaged(
        self, file: str, reason: str, error: type[DamagedError] = DamagedError
    ) -> CheckpointError:
        return error(
            f"step {self._manifest.step:,} of {self._store.url} cannot be loaded: shard "
            f"{self._folder}/{file}: {reason}"
        )


def _header_check(record: ShardFile) -> Check:
    return "header", 0, record.header_bytes, int(record.header_checksum, 16)


def _checksums_check(record: ShardFile, start: int) -> Check:
    return "checksums", start, record.bytes, int(record.checksums_checksum, 16)
