"""A folder that torch.distributed.checkpoint wrote: any tensor of it, whole, in one process.

`.metadata` says in which bytes of which file each part of each tensor lies, as torch.save has it.
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
_READERS = 8
_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class _Blob:
    """Bytes of a file, written by one call of torch.save."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Chunk:
    box: Box
    blob: _Blob


class DcpFolder:
    """A formats.Source; reads only what is asked for.

    Args:
        url: of the folder.
        store: of the folder.

    Raises:
        CheckpointError: its `.metadata` is damaged, or not of a kind that can be read.
    """

    kind = "a DCP folder (torch.distributed.checkpoint)"

    def __init__(self, url: str, store: Store) -> None:
        self.url, self._store = url, store
        self.aliases: dict[str, str] = {}  # each name was written with bytes of its own
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.paths: dict[str, _Path] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._blobs: dict[str, _Blob] = {}
        where = f"{url}/{METADATA}"
        found = pickles.metadata(store.read(METADATA), where)
        try:
            self._take(found)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {error}") from None

    def fetch(self, name: str) -> Tensor:
        """Read a tensor part by part; in memory are the tensor and one part, that one twice."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        dtype, shape = self.tensors[name]
        whole: Tensor | None = None
        for chunk in self._chunks[name]:
            part = self._part(name, chunk)
            if chunk.box.lengths == shape:
                return part
            if whole is None:
                whole = torch.empty(shape, dtype=dtype)
            box = zip(chunk.box.offsets, chunk.box.lengths, strict=True)
            whole[tuple(slice(start, start + length) for start, length in box)] = part
        return torch.empty(shape, dtype=dtype) if whole is None else whole

    @cached_property
    def objects(self) -> dict[str, Any]:
        """Values that are no tensors; bytes where torch.save was given more than plain values."""
        found = dict.fromkeys(self._blobs)

        def read(name: str) -> None:
            found[name] = self._object(self._blobs[name])

        in_parallel(read, list(self._blobs), _READERS)
        return found

    # --- what .metadata says ---------------------------------------------------------------------

    def _take(self, metadata: pickles.Record) -> None:
        blobs = {
            (index.fqn, index.offset): self._blob(info)
            for index, info in metadata.storage_data.items()
        }
        planned = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        for name, entry in metadata.state_dict_metadata.items():
            if type(name) is not str:
                raise ValueError(f"{name!r} is no name")
            path = planned.get(name, (name,))
            if type(path) is not tuple or not {type(key) for key in path} <= {str, int}:
                raise ValueError(f"{path!r} is no path of {name!r}")
            self.paths[name] = path
            if entry.chunks is None:
                self._blobs[name] = blobs[name, None]
                continue
            dtype = entry.properties.dtype or entry.properties.state[0]
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{dtype!r} is no dtype of {name!r}")
            shape = _naturals(entry.size)
            self.tensors[name] = (dtype, shape)
            found = [Box(_naturals(c.offsets), _naturals(c.sizes)) for c in entry.chunks]
            boxes = sorted({box for box in found if box.elements}, key=lambda box: box.offsets)
            _check_cover(name, shape, boxes)
            self._chunks[name] = [_Chunk(box, blobs[name, box.offsets]) for box in boxes]

    def _blob(self, info: Any) -> _Blob:
        if info.transform_descriptors:
            raise CheckpointError(
                f"{self.url} was written through extensions of torch "
                f"({', '.join(map(str, info.transform_descriptors))}), which are not known here; "
                "save it without them"
            )
        start, length = _naturals((info.offset, info.length))
        return _Blob(inside(info.relative_path, f"{self.url}/{METADATA}"), start, length)

    # --- what the files hold ---------------------------------------------------------------------

    def _part(self, name: str, chunk: _Chunk) -> Tensor:
        dtype, _ = self.tensors[name]
        where = f"{self.url}/{chunk.blob.file}: tensor {name!r}"
        if chunk.blob.length < chunk.box.elements * dtype.itemsize:
            raise CheckpointError(f"{where} has {chunk.blob.length:,} bytes, fewer than it needs")
        part = pickles.load(self._read(chunk.blob), where)
        pickles.check_plain(part, where)
        if (part.dtype, tuple(part.shape)) != (dtype, chunk.box.lengths):
            raise CheckpointError(
                f"{where} is {part.dtype} {list(part.shape)}, and should be {dtype} "
                f"{list(chunk.box.lengths)} as {METADATA} says; files of two saves were mixed, or "
                "altered"
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
                    f"{where} is {size:,} bytes, {METADATA} says at least "
                    f"{blob.start + blob.length:,}: it was cut short, or replaced"
                )
            stream = io.BytesIO(bytes(blob.length))
            with stream.getbuffer() as memory:
                self._fill(memory, blob, where)
                is_zip = bytes(memory[:4]) == _ZIP
        except FileNotFoundError:
            raise CheckpointError(f"{where} is missing") from None
        if not is_zip:
            raise CheckpointError(
                f"{where}: bytes {blob.start:,} to {blob.start + blob.length:,} are not what "
                "torch.save writes; the file was altered, or saved with "
                "serialization_format=SAFETENSORS, which is not read here"
            )
        return stream

    def _fill(self, memory: memoryview, blob: _Blob, where: str) -> None:
        step = self._store.read_bytes

        def read(start: int) -> None:
            piece = memory[start : start + step]
            if self._store.read_into(blob.file, blob.start + start, piece) < len(piece):
                raise CheckpointError(f"{where} was cut short while it was read")

        in_parallel(read, range(0, blob.length, step), _READERS)


def inside(path: Any, where: str) -> str:
    """Return a path that `where` names, if it stays in its folder.

    Raises:
        CheckpointError: it leaves it, or is none.
    """
    if type(path) is not str or not re.fullmatch(r"[^\\\0]+", path):
        raise CheckpointError(f"{where} names {path!r}, which is no file of its folder")
    if {"", ".", ".."} & set(path.split("/")):
        raise CheckpointError(f"{where} names {path!r}, which would lie outside of its folder")
    return path


def _naturals(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 1 << 63 for n in values):
        raise ValueError(f"{values!r} are not natural numbers")
    return values


def _check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Refuse parts that leave some of a tensor out, or say some of it twice."""
    for box in boxes:
        ends = [o + n for o, n in zip(box.offsets, box.lengths, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"a part of {name!r} lies outside of it")
    covered = sum(box.elements for box in boxes)
    if covered != prod(shape) or any_overlap(boxes):
        raise ValueError(f"the parts of {name!r} are not the whole of it ({covered:,} elements)")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor)
