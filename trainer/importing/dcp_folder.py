"""Read complete tensors from a torch.distributed.checkpoint folder, in one process.

`.metadata` has the file and byte range of each part of each tensor, in torch.save format.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.box import Box, any_overlap
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.importing import pickles
from trainer.storage import Store

METADATA = ".metadata"
_ZIP = b"PK\x03\x04"
READERS = 8
"""Parallel requests per folder."""
_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class _Blob:
    """Byte range of a file, written by one torch.save call."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Chunk:
    box: Box
    blob: _Blob


class DcpFolder:
    """A formats.Source that reads only the requested tensors.

    Args:
        url: the folder.
        store: store of the folder.

    Raises:
        CheckpointError: `.metadata` is damaged or unsupported.
    """

    kind = "a DCP folder (torch.distributed.checkpoint)"

    def __init__(self, url: str, store: Store) -> None:
        self.url, self._store = url, store
        self.aliases: dict[str, str] = {}  # every name has separate data
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.paths: dict[str, _Path] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._blobs: dict[str, _Blob] = {}
        where = f"{url}/{METADATA}"
        metadata = pickles.metadata(store.read(METADATA), where)
        try:
            self._parse(metadata)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {error}") from None

    def fetch(self, name: str) -> Tensor:
        """Read a tensor part by part; peak memory: the tensor and two copies of a part."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        dtype, shape = self.tensors[name]
        tensor: Tensor | None = None
        for chunk in self._chunks[name]:
            part = self._part(name, chunk)
            if chunk.box.lengths == shape:
                return part
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype)
            box = zip(chunk.box.offsets, chunk.box.lengths, strict=True)
            tensor[tuple(slice(start, start + length) for start, length in box)] = part
        return torch.empty(shape, dtype=dtype) if tensor is None else tensor

    @cached_property
    def objects(self) -> dict[str, Any]:
        """Values other than tensors; bytes for values of other than plain types."""
        values = dict.fromkeys(self._blobs)

        def read(name: str) -> None:
            values[name] = self._object(self._blobs[name])

        in_parallel(read, list(self._blobs), READERS)
        return values

    # --- .metadata -------------------------------------------------------------------------------

    def _parse(self, metadata: pickles.Record) -> None:
        blobs = {
            (index.fqn, index.offset): self._blob(info)
            for index, info in metadata.storage_data.items()
        }
        planned = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        for name, entry in metadata.state_dict_metadata.items():
            if type(name) is not str:
                raise ValueError(f"{name!r} is not a name")
            path = planned.get(name, (name,))
            if type(path) is not tuple or not {type(key) for key in path} <= {str, int}:
                raise ValueError(f"{path!r} is not a path for {name!r}")
            self.paths[name] = path
            if entry.chunks is None:
                self._blobs[name] = blobs[name, None]
                continue
            dtype = entry.properties.dtype or entry.properties.state[0]
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{dtype!r} is not a dtype for {name!r}")
            shape = _naturals(entry.size)
            self.tensors[name] = (dtype, shape)
            chunks = [Box(_naturals(c.offsets), _naturals(c.sizes)) for c in entry.chunks]
            boxes = sorted({box for box in chunks if box.elements}, key=lambda box: box.offsets)
            _check_cover(name, shape, boxes)
            self._chunks[name] = [_Chunk(box, blobs[name, box.offsets]) for box in boxes]

    def _blob(self, info: Any) -> _Blob:
        if info.transform_descriptors:
            raise CheckpointError(
                f"{self.url} was written with unsupported stream extensions "
                f"({', '.join(map(str, info.transform_descriptors))}); save it without them"
            )
        start, length = _naturals((info.offset, info.length))
        return _Blob(relative_path(info.relative_path, f"{self.url}/{METADATA}"), start, length)

    # --- data files ------------------------------------------------------------------------------

    def _part(self, name: str, chunk: _Chunk) -> Tensor:
        dtype, _ = self.tensors[name]
        where = f"{self.url}/{chunk.blob.file}: tensor {name!r}"
        if chunk.blob.length < chunk.box.elements * dtype.itemsize:
            raise CheckpointError(f"{where} has only {chunk.blob.length:,} bytes")
        part = pickles.load(self._read(chunk.blob), where)
        pickles.check_plain(part, where)
        if (part.dtype, tuple(part.shape)) != (dtype, chunk.box.lengths):
            raise CheckpointError(
                f"{where} is {part.dtype} {list(part.shape)}, but {METADATA} has {dtype} "
                f"{list(chunk.box.lengths)}; the files were altered or belong to two saves"
            )
        return pickles.plain(part)

    def _object(self, blob: _Blob) -> Any:
        stream = self._read(blob)
        try:
            value = pickles.load(stream, f"{self.url}/{blob.file}")
        except pickles.UnsafePickleError:
            return stream.getvalue()
        return stream.getvalue() if _has_tensors(value) else value

    def _read(self, blob: _Blob) -> io.BytesIO:
        where = f"{self.url}/{blob.file}"
        try:
            size = self._store.size(blob.file)
            if blob.start + blob.length > size:
                raise CheckpointError(
                    f"{where} has {size:,} bytes, but {METADATA} needs at least "
                    f"{blob.start + blob.length:,}: the file was truncated or replaced"
                )
            stream = io.BytesIO(bytes(blob.length))
            with stream.getbuffer() as memory:
                read_range(self._store, blob.file, blob.start, memory, where)
                is_zip = bytes(memory[:4]) == _ZIP
        except FileNotFoundError:
            raise CheckpointError(f"{where} is missing") from None
        if not is_zip:
            raise CheckpointError(
                f"{where}: bytes {blob.start:,} to {blob.start + blob.length:,} are not in "
                "torch.save format; the file was altered, or saved with the unsupported "
                "serialization_format=SAFETENSORS"
            )
        return stream


def read_range(store: Store, key: str, start: int, memory: memoryview, where: str) -> None:
    """Read a file from byte `start` into `memory`, with parallel requests.

    Raises:
        CheckpointError: the file ends earlier; the message names it as `where`.
    """

    def read(offset: int) -> None:
        piece = memory[offset : offset + store.read_bytes]
        if store.read_into(key, start + offset, piece) < len(piece):
            raise CheckpointError(f"{where} was truncated during the read")

    in_parallel(read, range(0, len(memory), store.read_bytes), READERS)


def relative_path(path: Any, where: str) -> str:
    """Return a path from file `where` if it stays inside of the folder.

    Raises:
        CheckpointError: the path is invalid or leaves the folder.
    """
    if type(path) is not str or not re.fullmatch(r"[^\\\0]+", path):
        raise CheckpointError(f"{where} has the invalid file name {path!r}")
    if {"", ".", ".."} & set(path.split("/")):
        raise CheckpointError(f"{where} has the file name {path!r}, which is outside of the folder")
    return path


def _naturals(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 1 << 63 for n in values):
        raise ValueError(f"{values!r} are not natural numbers")
    return values


def _check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise ValueError if the parts do not cover a tensor exactly once."""
    for box in boxes:
        ends = [o + n for o, n in zip(box.offsets, box.lengths, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"a part of {name!r} is out of bounds")
    covered = sum(box.elements for box in boxes)
    if covered != prod(shape) or any_overlap(boxes):
        raise ValueError(f"the parts of {name!r} do not cover it once ({covered:,} elements)")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor)
