"""Checkpoint bytes into live tensors, every block checked against its checksum."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.checkpoint import shard
from trainer.checkpoint.manifest import Manifest, Part, ShardFile, checksum
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES
from trainer.errors import CheckpointError
from trainer.storage import Store


class Reader:
    """Reads tensors of one committed checkpoint; needs no process group."""

    def __init__(self, store: Store, folder: str, manifest: Manifest) -> None:
        self._store = store
        self._folder = folder
        self._manifest = manifest
        self._files = list(manifest.files)
        self._headers: dict[str, tuple[dict[str, shard.Chunk], list[str]]] = {}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill each tensor of `targets`, in place, with the stored tensor of that name.

        Raises:
            CheckpointError: a name is not there, has another shape or dtype, or its bytes are
                proven wrong: read completely, twice.
        """
        for name, target in targets.items():
            if name not in self._manifest.tensors:
                raise CheckpointError(f"{self._where()} has no tensor {name!r}")
            entry = self._manifest.resolve(name)
            found = (entry.dtype, tuple(entry.shape))
            dtype = DTYPE_NAMES.get(target.dtype, str(target.dtype))
            wanted = (dtype, tuple(target.shape))
            if found != wanted:
                raise CheckpointError(
                    f"{self._where()}: tensor {name!r} is {_describe(*found)}, this model needs "
                    f"{_describe(*wanted)}"
                )
            owner = self._manifest.tensors[name].alias or name
            for part in entry.parts(self._files):
                self._read_part(owner, part, target.detach())

    def fetch(self, name: str) -> Tensor:
        """Return a stored tensor as a new CPU tensor."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self._where()} has no tensor {name!r}")
        entry = self._manifest.resolve(name)
        target = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.read({name: target})
        return target

    def verify(self) -> None:
        """Read and check every byte of every file."""
        for file in self._files:
            chunks, digests = self._header(file)
            for chunk in chunks.values():
                self._read_chunk(file, chunk, memoryview(bytearray(chunk.nbytes)), digests)

    def _read_part(self, name: str, part: Part, target: Tensor) -> None:
        chunks, digests = self._header(part.file)
        whole = tuple(part.lengths) == tuple(target.shape)
        key = shard.part_key(name, None if whole else part.offsets)
        stored = (DTYPE_NAMES[target.dtype], tuple(part.lengths))
        if target.dtype == torch.complex128:
            stored = ("F64", (*part.lengths, 2))
        if key not in chunks or (chunks[key].dtype, chunks[key].shape) != stored:
            raise CheckpointError(
                f"{self._where()}: {part.file} does not hold {key!r} as {_describe(*stored)}, "
                "which the manifest says"
            )
        place = target
        for dim, (offset, length) in enumerate(zip(part.offsets, part.lengths, strict=True)):
            place = place.narrow(dim, offset, length)
        direct = place.device.type == "cpu" and place.is_contiguous()
        landing = place if direct else torch.empty(place.shape, dtype=place.dtype)
        self._read_chunk(part.file, chunks[key], _bytes_of(landing), digests)
        if not direct:
            place.copy_(landing)

    def _header(self, file: str) -> tuple[dict[str, shard.Chunk], list[str]]:
        if file not in self._headers:
            record = self._manifest.files[file]
            self._check_size(file, record)
            for last_try in (False, True):
                data = bytearray(record.header_bytes)
                self._read_range(file, 0, memoryview(data))
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
            raise self._damaged(file, "the file is missing") from None
        if size != record.bytes:
            raise self._damaged(
                file,
                f"it is {size:,} bytes, the manifest says {record.bytes:,}: cut short or replaced",
            )
        if record.header_bytes > min(record.bytes, shard.MAX_HEADER_BYTES):
            raise self._damaged(file, f"a header of {record.header_bytes:,} bytes cannot be")

    def _read_chunk(
        self, file: str, chunk: shard.Chunk, buffer: memoryview, digests: list[str]
    ) -> None:
        for last_try in (False, True):
            self._read_range(file, chunk.start, buffer)
            wrong = next(self._wrong_blocks(chunk, buffer, digests), None)
            if wrong is None:
                return
            if last_try:
                first = wrong * self._manifest.block_bytes
                last = min(first + self._manifest.block_bytes, chunk.nbytes)
                raise self._damaged(
                    file,
                    f"tensor {chunk.key!r}: bytes {first:,} to {last:,} do not match their "
                    "checksum",
                )

    def _wrong_blocks(
        self, chunk: shard.Chunk, buffer: memoryview, digests: list[str]
    ) -> Iterator[int]:
        size = self._manifest.block_bytes
        for index, start in enumerate(range(0, chunk.nbytes, size)):
            if checksum(buffer[start : start + size]) != digests[chunk.block + index]:
                yield index

    def _read_range(self, file: str, start: int, buffer: memoryview) -> None:
        try:
            count = self._store.read_into(f"{self._folder}/{file}", start, buffer)
        except FileNotFoundError:
            raise self._damaged(file, "the file is missing") from None
        if count != len(buffer):
            raise self._damaged(file, f"it ends at byte {start + count:,}: cut short")

    def _where(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def _damaged(self, file: str, what: str) -> CheckpointError:
        return DamagedError(
            f"step {self._manifest.step:,} of {self._store.url} cannot be loaded: shard "
            f"{self._folder}/{file}: {what}"
        )


class DamagedError(CheckpointError):
    """Bytes of a checkpoint were read completely and are proven wrong."""


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # an axis of one may have any stride
    return memoryview(flat.view(torch.uint8).numpy().data)


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
