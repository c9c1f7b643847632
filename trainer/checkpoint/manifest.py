"""`manifest.json` as dataclasses, with its serialization and validation. Pure: no I/O, no torch.

Input is treated as hostile: a manifest passes all checks here or raises CheckpointError.
docs/checkpoint-format.md describes the format.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from trainer.checkpoint.box import Box, any_overlap
from trainer.checkpoint.dtypes import DTYPES
from trainer.checkpoint.shard import element_count, is_key, part_key
from trainer.checkpoint.values import decode, dump, encode
from trainer.errors import CheckpointError

FORMAT = "perdure-checkpoint"
VERSION = 2
"""The version that is written. Version 1 is read too."""
ALGORITHM = "xxh3_64"
MAX_MANIFEST_BYTES = 1 << 28
DCP_OBJECT = "dcp"
"""Key in `objects` of the data that only torch.distributed.checkpoint states need."""

_SHARD_NAME = re.compile(r"r\d{5,}-of-\d{5,}-[0-9a-f]{8}-\d+\.safetensors")
_FOLDER_NAME = re.compile(r"step-(\d{8,})\.(\d{4,})")


class VersionError(CheckpointError):
    """An intact manifest of a format version that this program does not read."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the XXH3 64-bit checksum (seed 0) of `data` as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def folder_name(step: int, attempt: int) -> str:
    """Return the folder name of the checkpoint that `attempt` saved at `step`."""
    return f"step-{step:08d}.{attempt:04d}"


def parse_folder(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) from a checkpoint folder's name, or None for other names."""
    match = _FOLDER_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def shard_name(*, rank: int, world_size: int, token: str, save: int) -> str:
    """Return a shard's file name. The attempt's random token makes it unique among attempts."""
    return f"r{rank:05d}-of-{world_size:05d}-{token}-{save}.safetensors"


def is_shard_name(name: str) -> bool:
    """Return whether `name` is a valid shard name. Other files are never read or deleted."""
    return _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardFile:
    """Sizes and checksums of a shard. Through the block checksums they cover every byte."""

    bytes: int
    header_bytes: int
    """Bytes before the first tensor: eight for the length, then space-padded JSON."""
    header_checksum: str
    checksums_checksum: str = ""
    """Checksum of the tensor of block checksums. Empty in version 1, whose header holds these."""


@dataclass(frozen=True)
class TensorEntry:
    """Dtype and shape of a stored tensor, and its distribution over the files.

    Exactly one of these is set: `file` (index of the file that holds all of it), `grid` (even
    sharding: number of pieces along each axis, each of ceil(n / pieces)), `columns` (any other
    sharding, a row for each piece), `alias` (name of the tensor that shares its storage). Pieces
    without elements are not stored.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    file: int | None = None
    grid: tuple[int, ...] | None = None
    file_list: tuple[int, ...] | None = None
    """Indexes of the files of the grid's pieces, in C order. None: piece k is in file k."""
    columns: Mapping[str, list[Any]] | None = None
    alias: str | None = None

    def boxes(self, files: Sequence[str], box: Box) -> Iterator[tuple[str, Box]]:
        """Yield the stored parts of the tensor that overlap `box`, each with its file."""
        if 0 in self.shape:
            return
        if self.file is not None:
            yield files[self.file], Box.full(self.shape)
        elif self.grid is not None:
            axes = zip(box.offsets, box.lengths, self._cell_lengths(), strict=True)
            ranges = [range(o // step, -(-(o + n) // step)) for o, n, step in axes]
            for position in itertools.product(*ranges):
                number = 0
                for index, pieces in zip(position, self.grid, strict=True):
                    number = number * pieces + index
                index = number if self.file_list is None else self.file_list[number]
                yield files[index], self.cell(number)
        elif self.columns is not None:
            for index, stored in self._rows(self.columns):
                if stored.overlaps(box):
                    yield files[index], stored

    def boxes_in(self, index: int, cells: Sequence[int]) -> Iterator[Box]:
        """Yield the stored parts of the tensor that are in file `index`.

        Args:
            index: index of the file.
            cells: numbers of the pieces that `file_list` has in this file.
        """
        if 0 in self.shape:
            return
        if self.file == index:
            yield Box.full(self.shape)
        elif self.grid is not None:
            if self.file_list is None:
                cells = [index] if index < math.prod(self.grid) else []
            yield from map(self.cell, cells)
        elif self.columns is not None:
            table = self.columns
            for row, file in enumerate(table["file"]):
                if file == index:
                    yield Box(tuple(table["offsets"][row]), tuple(table["lengths"][row]))

    def _rows(self, columns: Mapping[str, list[Any]]) -> Iterator[tuple[int, Box]]:
        """Yield each part in `columns` with the number of its file."""
        rows = zip(columns["file"], columns["offsets"], columns["lengths"], strict=True)
        for index, offsets, lengths in rows:
            yield index, Box(tuple(offsets), tuple(lengths))

    def cell(self, number: int) -> Box:
        """Return a cell of the grid, numbered in C order."""
        position: list[int] = []
        for pieces in reversed(self.grid or ()):
            number, index = divmod(number, pieces)
            position.insert(0, index)
        steps = self._cell_lengths()
        offsets = tuple(min(p * s, n) for p, s, n in zip(position, steps, self.shape, strict=True))
        lengths = tuple(min(s, n - o) for s, n, o in zip(steps, self.shape, offsets, strict=True))
        return Box(offsets, lengths)

    def _cell_lengths(self) -> list[int]:
        grid = self.grid or ()
        return [max(-(-n // pieces), 1) for n, pieces in zip(self.shape, grid, strict=True)]

    def to_json(self, file_lists: dict[tuple[int, ...], int]) -> dict[str, Any]:
        """Return the entry's JSON form; add its list of files to `file_lists`, with a number."""
        if self.alias is not None:
            return {"alias": self.alias}
        files = self.file_list
        number = None if files is None else file_lists.setdefault(files, len(file_lists))
        forms = {"file": self.file, "grid": self.grid, "file_list": number, "columns": self.columns}
        form = {key: value for key, value in forms.items() if value is not None}
        return {"dtype": self.dtype, "shape": list(self.shape), **form}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The commit record of one checkpoint."""

    step: int
    epoch: int
    samples: int
    attempt: int
    token: str
    save: int
    """Number of the save within its attempt, counted from 1."""
    world_size: int
    versions: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, ShardFile]
    objects: Mapping[str, Any]
    """Values of the state that are not tensors, decoded."""
    config: Mapping[str, Any] = field(default_factory=dict)
    block_bytes: int = 1 << 20
    version: int = VERSION
    """Version of the format."""

    @property
    def folder(self) -> str:
        """Folder name of the checkpoint."""
        return folder_name(self.step, self.attempt)

    def resolve(self, name: str) -> TensorEntry:
        """Return the entry of `name`, following an alias."""
        entry = self.tensors[name]
        return self.tensors[entry.alias] if entry.alias is not None else entry

    def key(self, name: str, box: Box) -> str:
        """Return the key of a stored part in its shard."""
        entry = self.tensors[name]
        is_complete = entry.file is not None
        if self.version == 1:
            is_complete = box.lengths == entry.shape
        return part_key(name, None if is_complete else box.offsets)


def pieces(manifest: Manifest, index: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield key, dtype and shape of everything that file `index` of the checkpoint holds.

    Version 2 only: there the shard's layout follows from these.
    """
    cells: dict[int, list[int]] = {}  # by identity of the list, as entries share few of them
    for name, entry in manifest.tensors.items():
        numbers: Sequence[int] = ()
        if (files := entry.file_list) is not None:
            if id(files) not in cells:
                cells[id(files)] = [cell for cell, file in enumerate(files) if file == index]
            numbers = cells[id(files)]
        if entry.alias is None:
            for box in entry.boxes_in(index, numbers):
                yield manifest.key(name, box), entry.dtype, box.lengths


def to_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`: one top-level field per line, checksum last."""
    file_lists: dict[tuple[int, ...], int] = {}
    tensors = {name: entry.to_json(file_lists) for name, entry in manifest.tensors.items()}
    top = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "samples": manifest.samples,
        "attempt": manifest.attempt,
        "token": manifest.token,
        "save": manifest.save,
        "world_size": manifest.world_size,
        "versions": dict(manifest.versions),
        "algorithm": ALGORITHM,
        "block_bytes": manifest.block_bytes,
        "files": {name: vars(file) for name, file in manifest.files.items()},
        "file_lists": list(file_lists),
        "tensors": tensors,
        "objects": encode(dict(manifest.objects), "objects"),
        "config": encode(dict(manifest.config), "config"),
    }
    lines = [f"{json.dumps(key)}:{dump(value)}" for key, value in top.items()]
    # surrogatepass, like json.loads: for paths that are not UTF-8
    body = ("{\n" + ",\n".join(lines)).encode("utf-8", "surrogatepass")
    return body + _tail(body)


def _tail(body: bytes) -> bytes:
    """Return the bytes after `body`: its checksum and the closing brace."""
    return f',\n"checksum":"{checksum(body)}"\n}}\n'.encode()


def void_bytes(attempt: int) -> bytes:
    """Return the void manifest, which prevents a folder's writer from committing it."""
    return dump({"void": attempt}).encode()


def is_void(data: bytes) -> bool:
    """Return whether `data` is a void manifest."""
    return len(data) < 64 and re.fullmatch(rb'\{"void":\d+\}', data.strip()) is not None


def from_bytes(data: bytes, where: str) -> Manifest:
    """Parse and validate a manifest; `where` is its location, for errors.

    Raises:
        VersionError: it is intact, and of another version.
        CheckpointError: it is void, altered, of another format, or inconsistent.
    """

    def invalid(reason: str) -> CheckpointError:
        return CheckpointError(f"{where}: {reason}")

    if is_void(data):
        raise invalid("a later attempt marked this folder abandoned; it holds no checkpoint")
    if len(data) > MAX_MANIFEST_BYTES:
        raise invalid(f"{len(data):,} bytes exceed the maximum of {MAX_MANIFEST_BYTES:,}")
    top = _parse_object(data, invalid)
    if top.get("format") != FORMAT:
        raise invalid(f"not a checkpoint manifest (format {top.get('format')!r})")
    body = data[: -len(_tail(b""))]
    is_intact = data == body + _tail(body)
    if type(top.get("version")) is not int or not 1 <= top["version"] <= VERSION:
        kind = VersionError if is_intact else CheckpointError
        raise kind(
            f"{where}: format version {top.get('version')!r} is not supported; this program reads "
            f"versions 1 to {VERSION}. Use the version of Perdure that wrote it, or a newer one"
        )
    if not is_intact:
        raise invalid("checksum mismatch; the file was altered or truncated")
    try:
        return _validated(top)
    except CheckpointError as error:
        raise invalid(str(error)) from None
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise invalid(f"malformed: {type(error).__name__}: {error}") from None


def _parse_object(data: bytes, invalid: Callable[[str], CheckpointError]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("duplicate key")
        return values

    def no_constant(text: str) -> float:
        raise ValueError(f"{text} is not valid JSON")

    try:
        top = json.loads(data, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"not valid JSON ({error}); the file was altered or truncated") from None
    if not isinstance(top, dict):
        raise invalid("not a JSON object")
    return top


def _validated(top: Mapping[str, Any]) -> Manifest:
    if top["algorithm"] != ALGORITHM:
        raise CheckpointError(
            f"unsupported checksum algorithm {top['algorithm']!r}; expected {ALGORITHM}"
        )
    if not 1 <= _natural(top["block_bytes"]) <= 1 << 20:
        raise CheckpointError(f"block_bytes={top['block_bytes']} is not between 1 and 1,048,576")
    version = top["version"]
    files = {}
    for name, file in _mapping(top["files"]).items():
        if not is_shard_name(name):
            raise CheckpointError(f"{name!r} is not a valid shard name")
        files[name] = ShardFile(
            _natural(file["bytes"]),
            _natural(file["header_bytes"]),
            _digest(file["header_checksum"]),
            _digest(file["checksums_checksum"]) if version > 1 else "",
        )
    stored_lists = top["file_lists"] if version > 1 else []
    file_lists = [_file_list(items, len(files)) for items in stored_lists]
    tensors = {
        str(name): _entry(value, file_lists) for name, value in _mapping(top["tensors"]).items()
    }
    total_bytes = sum(file.bytes for file in files.values())
    for name, entry in tensors.items():
        if version > 1 and not is_key(name):
            raise CheckpointError(f"{name!r} is not a valid name of a tensor")
        _check_entry(name, entry, tensors, len(files), total_bytes)
        if version > 1 and entry.grid is not None and not _is_full(entry):
            raise CheckpointError(f"tensor {name!r} has empty pieces in its grid {entry.grid}")
    numbers = ("step", "epoch", "samples", "attempt", "save", "world_size")
    return Manifest(
        **{key: _natural(top[key]) for key in numbers},
        token=str(top["token"]),
        versions=dict(top["versions"]),
        tensors=tensors,
        files=files,
        objects=_mapping(decode(top["objects"])),
        config=_mapping(decode(top["config"])),
        block_bytes=top["block_bytes"],
        version=version,
    )


def _digest(value: Any) -> str:
    if re.fullmatch(r"[0-9a-f]{16}", str(value)) is None:
        raise CheckpointError(f"{value!r} is not a checksum of 16 hexadecimal digits")
    return str(value)


def _file_list(items: Sequence[Any], file_count: int) -> tuple[int, ...]:
    if any(_natural(index) >= file_count for index in items):
        raise CheckpointError(f"a list of files refers to other files than the {file_count}")
    return tuple(items)


def _is_full(entry: TensorEntry) -> bool:
    """Return whether every piece of the grid has elements."""
    return all(
        pieces == -(-n // -(-n // pieces)) if n else True
        for n, pieces in zip(entry.shape, entry.grid or (), strict=True)
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got a {type(value).__name__}")
    return value


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise CheckpointError(f"{value!r} is not an integer between 0 and 2**63 - 1")
    return value


def _entry(value: Any, file_lists: Sequence[tuple[int, ...]]) -> TensorEntry:
    if "alias" in _mapping(value):
        return TensorEntry(alias=str(value["alias"]))
    grid, columns, number = value.get("grid"), value.get("columns"), value.get("file_list")
    return TensorEntry(
        dtype=str(value["dtype"]),
        shape=tuple(_natural(n) for n in value["shape"]),
        file=None if value.get("file") is None else _natural(value["file"]),
        grid=None if grid is None else tuple(_natural(n) for n in grid),
        file_list=None if number is None else file_lists[_natural(number)],
        columns=columns,
    )


def _check_entry(
    name: str,
    entry: TensorEntry,
    tensors: Mapping[str, TensorEntry],
    file_count: int,
    total_bytes: int,
) -> None:
    if entry.alias is not None:
        if entry.alias not in tensors or tensors[entry.alias].alias is not None:
            raise CheckpointError(
                f"tensor {name!r} is an alias of {entry.alias!r}, which is not a stored tensor"
            )
        return
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r} has the unsupported dtype {entry.dtype!r}")
    if element_count(entry.shape) * DTYPES[entry.dtype] > total_bytes:
        raise CheckpointError(f"tensor {name!r} is larger than all files together")
    if sum(form is not None for form in (entry.file, entry.grid, entry.columns)) != 1:
        raise CheckpointError(f"tensor {name!r} needs exactly one of file, grid, columns")
    if entry.file is not None and entry.file >= file_count:
        raise CheckpointError(f"tensor {name!r} refers to file {entry.file} of {file_count}")
    if entry.grid is not None:
        pieces = math.prod(entry.grid)
        listed = entry.file_list
        fits = pieces <= file_count if listed is None else pieces == len(listed)
        if len(entry.grid) != len(entry.shape) or 0 in entry.grid or not fits:
            raise CheckpointError(f"tensor {name!r} has the invalid grid {list(entry.grid)}")
    if entry.columns is not None:
        _check_columns(name, entry, file_count)


def _check_columns(name: str, entry: TensorEntry, file_count: int) -> None:
    boxes = []
    for index, box in entry._rows(entry.columns or {}):
        is_inside = len(box.offsets) == len(box.lengths) == len(entry.shape) and all(
            _natural(offset) + _natural(length) <= size
            for offset, length, size in zip(box.offsets, box.lengths, entry.shape, strict=True)
        )
        if not is_inside or _natural(index) >= file_count:
            raise CheckpointError(f"tensor {name!r} has a part outside its shape or its files")
        boxes.append(box)
    if any_overlap(boxes):
        raise CheckpointError(f"tensor {name!r} has two parts for the same elements")
    covered = sum(box.elements for box in boxes)
    if covered != element_count(entry.shape):
        raise CheckpointError(
            f"tensor {name!r} has {element_count(entry.shape):,} elements, its parts {covered:,}"
        )
