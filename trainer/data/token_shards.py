"""Token shards: created atomically and identified by a digest of their sources.

The shards of a split have its documents sorted by name, each followed by an end token.
`index.json`, written last, describes them.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.atomic_file import TEMPORARY, atomic_file
from trainer.data.corpus import Document
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """Finished token file."""

    file: str
    """Name in the folder."""
    tokens: int
    """Number of tokens, end tokens included."""
    documents: int
    bytes: int
    """Bytes of the documents' files."""


@dataclass(frozen=True)
class Part:
    """Shards of one split, in order, and their totals."""

    shards: list[Shard]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """Folder of shards, as described by its `index.json`."""

    folder: Path
    tokenizer: str
    vocabulary: int
    dtype: str
    """`uint16` or `uint32`, both little-endian."""
    parts: dict[str, Part]


@dataclass(frozen=True)
class ShardMaker:
    """Creates the shards of a split, reusing existing ones."""

    folder: Path
    digest: str
    tokenizer: Tokenizer
    dtype: str
    shard_tokens: int
    read: Callable[[Document], bytes]
    advance: Callable[[int], object]

    def part(self, name: str, documents: Sequence[Document], log: Callable[[str], None]) -> Part:
        """Return the shards of a split; create missing ones."""
        shards: list[Shard] = []
        documents_done = 0
        while documents_done < len(documents):
            file = f"{name}-{len(shards):05d}.bin"
            shard = self._finished(file, documents_done)
            if shard is None:
                shard = self._write(file, documents, documents_done)
                log(f"{file}: {shard.documents:,} documents, {shard.tokens:,} tokens")
            else:
                self.advance(shard.bytes)
                log(f"{file}: already complete")
            shards.append(shard)
            documents_done += shard.documents
        tokens, count_bytes = sum(s.tokens for s in shards), sum(s.bytes for s in shards)
        return Part(shards, len(documents), tokens, count_bytes)

    def _finished(self, file: str, first: int) -> Shard | None:
        """Return the record of an existing complete shard that starts with document `first`."""
        record = _read_json(self._record_path(file))
        if record.get("digest") != self.digest or record.get("first") != first:
            return None
        shard = Shard(**record["shard"])
        return shard if _is_complete(self.folder, shard, self.dtype) else None

    def _write(self, file: str, documents: Sequence[Document], first: int) -> Shard:
        dtype = np.dtype(self.dtype).newbyteorder("<")
        end = np.array([self.tokenizer.end], dtype).tobytes()
        count = tokens = count_bytes = 0
        with atomic_file(self.folder / file, durable=True) as out:
            while tokens < self.shard_tokens and first + count < len(documents):
                document = documents[first + count]
                data = self.read(document)
                if len(data) != document.size_bytes:
                    raise DataError(
                        f"{document.path} has {len(data):,} bytes but had "
                        f"{document.size_bytes:,} when the files were listed; run again when "
                        "it is no longer written to"
                    )
                encoded = self.tokenizer.encode(data)
                out.write(encoded.astype(dtype).tobytes())
                out.write(end)
                tokens += len(encoded) + 1
                count_bytes += len(data)
                count += 1
                self.advance(len(data))
        shard = Shard(file, tokens, count, count_bytes)
        # After the shard, so that a record implies a shard.
        record = {"digest": self.digest, "first": first, "shard": asdict(shard)}
        _write_json(self._record_path(file), record)
        return shard

    def _record_path(self, file: str) -> Path:
        return (self.folder / file).with_suffix(".json")


def _is_complete(folder: Path, shard: Shard, dtype: str) -> bool:
    try:
        return (folder / shard.file).stat().st_size == shard.tokens * np.dtype(dtype).itemsize
    except OSError:
        return False


def clear_temporaries(folder: Path) -> None:
    """Remove temporary files of killed processes. The caller must hold the lock."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Let one process at a time prepare, since the ranks of a node would repeat the work.

    Yields whether the file system supports locks. Without locks all prepare, with the same result.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another process is preparing the same text; waiting")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path, durable=True) as file:
        file.write(json.dumps(content, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; empty if it is missing or invalid."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_index(prepared: Prepared, digest: str, end: int) -> None:
    """Write the index that makes the shards valid; durable on return."""
    content = {"version": VERSION, "digest": digest, "end": end, **asdict(prepared)}
    del content["folder"]
    _write_json(prepared.folder / INDEX, content)


def read_index(folder: Path, digest: str) -> Prepared | None:
    """Return the prepared shards; None if unfinished or a shard is missing."""
    content = _read_json(folder / INDEX)
    if content.get("version") != VERSION or content.get("digest") != digest:
        return None
    parts = {
        name: Part(**{**part, "shards": [Shard(**shard) for shard in part["shards"]]})
        for name, part in content["parts"].items()
    }
    dtype = content["dtype"]
    shards = [shard for part in parts.values() for shard in part.shards]
    if not all(_is_complete(folder, shard, dtype) for shard in shards):
        return None
    return Prepared(folder, content["tokenizer"], content["vocabulary"], dtype, parts)


def reject_other_shards(folder: Path, digest: str) -> None:
    """Raise if a folder has shards of other files or settings, which another run may use."""
    content = _read_json(folder / INDEX)
    if content and content.get("digest") != digest:
        raise DataError(
            f"{folder} has shards of other files or file versions, or of another "
            "data.tokenizer, data.eval_share or data.shard_tokens; use another data.dir, or "
            "remove the folder if no run needs it"
        )
