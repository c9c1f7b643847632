"""Shards of tokens: made once, whole or not at all, and known by what they were made of.

The shards of a part are its documents in the order of their names, each followed by a token that
ends it. `index.json`, written last, describes them.
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
    """A finished file of tokens."""

    file: str
    """Name in the folder."""
    tokens: int
    """The ends of the documents among them."""
    documents: int
    bytes: int
    """Of the documents' files."""


@dataclass(frozen=True)
class Part:
    """The shards of one part, in order, and their sums."""

    shards: list[Shard]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """A folder of shards, as its `index.json` describes it."""

    folder: Path
    tokenizer: str
    vocabulary: int
    dtype: str
    """`uint16` or `uint32`, both little-endian."""
    parts: dict[str, Part]


@dataclass(frozen=True)
class Maker:
    """Makes the shards of a part, or finds that they are there."""

    folder: Path
    digest: str
    tokenizer: Tokenizer
    dtype: str
    shard_tokens: int
    read: Callable[[Document], bytes]
    advance: Callable[[int], object]

    def part(self, name: str, documents: Sequence[Document], say: Callable[[str], None]) -> Part:
        """Return the shards of a part, each of them made unless it is there."""
        shards: list[Shard] = []
        done = 0
        while done < len(documents):
            file = f"{name}-{len(shards):05d}.bin"
            shard = self._finished(file, done)
            if shard is None:
                shard = self._write(file, documents, done)
                say(f"{file}: {shard.documents:,} documents, {shard.tokens:,} tokens")
            else:
                self.advance(shard.bytes)
                say(f"{file}: already complete")
            shards.append(shard)
            done += shard.documents
        tokens, count_bytes = sum(s.tokens for s in shards), sum(s.bytes for s in shards)
        return Part(shards, len(documents), tokens, count_bytes)

    def _finished(self, file: str, first: int) -> Shard | None:
        """Return the record of a shard that is there whole and begins with document `first`."""
        record = _read_json(self._record_path(file))
        if record.get("digest") != self.digest or record.get("first") != first:
            return None
        shard = Shard(**record["shard"])
        return shard if _is_whole(self.folder, shard, self.dtype) else None

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
                        f"{document.path} has {len(data):,} bytes, it had "
                        f"{document.size_bytes:,} when the files were listed; run again when "
                        "nobody writes to it"
                    )
                encoded = self.tokenizer.encode(data)
                out.write(encoded.astype(dtype).tobytes())
                out.write(end)
                tokens += len(encoded) + 1
                count_bytes += len(data)
                count += 1
                self.advance(len(data))
        shard = Shard(file, tokens, count, count_bytes)
        # After the shard: a record is there only where the shard is.
        record = {"digest": self.digest, "first": first, "shard": asdict(shard)}
        _write_json(self._record_path(file), record)
        return shard

    def _record_path(self, file: str) -> Path:
        return (self.folder / file).with_suffix(".json")


def _is_whole(folder: Path, shard: Shard, dtype: str) -> bool:
    try:
        return (folder / shard.file).stat().st_size == shard.tokens * np.dtype(dtype).itemsize
    except OSError:
        return False


def clear_temporaries(folder: Path) -> None:
    """Remove what killed processes left; only for who holds the lock, as nobody else writes."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Let one process at a time prepare; the ranks of a node would all do the same work.

    Yields whether the file system has locks. Without them all prepare, which is as right.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        is_alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the same text; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            is_alone = False
        yield is_alone
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path, durable=True) as file:
        file.write(json.dumps(content, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's object; an empty one where it is not there or none of ours."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_index(prepared: Prepared, digest: str, end: int) -> None:
    """Write what makes the shards count; durable on return."""
    content = {"version": VERSION, "digest": digest, "end": end, **asdict(prepared)}
    del content["folder"]
    _write_json(prepared.folder / INDEX, content)


def read_index(folder: Path, digest: str) -> Prepared | None:
    """Return what was prepared; None where it was not finished, or a shard is gone."""
    content = _read_json(folder / INDEX)
    if content.get("version") != VERSION or content.get("digest") != digest:
        return None
    parts = {
        name: Part(**{**part, "shards": [Shard(**shard) for shard in part["shards"]]})
        for name, part in content["parts"].items()
    }
    dtype = content["dtype"]
    shards = [shard for part in parts.values() for shard in part.shards]
    if not all(_is_whole(folder, shard, dtype) for shard in shards):
        return None
    return Prepared(folder, content["tokenizer"], content["vocabulary"], dtype, parts)


def refuse_others(folder: Path, digest: str) -> None:
    """Refuse a folder with shards of other files or settings: another run may be using them."""
    found = _read_json(folder / INDEX)
    if found and found.get("digest") != digest:
        raise DataError(
            f"{folder} has shards of other files, or of other versions of them, or of another "
            "data.tokenizer, data.eval_share or data.shard_tokens; give another data.dir, or "
            "remove the folder if no run needs it"
        )
