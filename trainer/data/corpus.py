"""Documents for training: files by pattern, local or remote, or Python's standard library."""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import ConfigError, DataError

_NOT_IN_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
_STORAGE_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs")
"""Libraries whose exceptions come from a server or network rather than from a bug."""


@dataclass(frozen=True)
class Document:
    """Text file."""

    name: str
    """Path below the pattern's fixed folder, independent of its location."""
    path: str
    size_bytes: int
    stamp: str
    """Changes when the file does: its mtime in ns, an object's ETag."""


@dataclass(frozen=True)
class Corpus:
    """Documents and their read function."""

    documents: list[Document]
    """Sorted by name."""
    read: Callable[[Document], bytes]


def _sorted(documents: Sequence[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: document.name)


@contextmanager
def _data_errors(subject: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (
            isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORAGE_LIBRARIES
        ):
            raise
        text = getattr(error, "strerror", None) or error
        raise DataError(
            f"{subject} cannot be read: {text}; check its path and permissions"
        ) from None


def standard_library() -> Corpus:
    """Return the sources of the interpreter's standard library, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if not _NOT_IN_LIBRARY & set(path.relative_to(root).parts[:-1])
    ]
    if not paths:
        raise DataError(f"{root} has no Python sources to train on; set data.files")
    return _local_corpus(root, paths)


def local_files(pattern: str) -> Corpus:
    """Return the files that match a pattern; `**` matches any folders.

    Raises:
        DataError: the pattern is a folder, or a file cannot be read.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise DataError(
            f"data.files={pattern} is a folder; use a pattern of files: '{pattern}/**/*.txt'"
        )
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    return _local_corpus(Path(_fixed_folder(pattern)), [p for p in paths if p.is_file()])


def _local_corpus(root: Path, paths: Sequence[Path]) -> Corpus:
    documents = []
    for path in paths:
        with _data_errors(str(path)):
            entries = path.stat()
        name = path.relative_to(root).as_posix()
        documents.append(Document(name, str(path), entries.st_size, str(entries.st_mtime_ns)))
    return Corpus(_sorted(documents), _read_local)


def _read_local(document: Document) -> bytes:
    with _data_errors(document.path):
        return Path(document.path).read_bytes()


def remote_files(url: str) -> Corpus:
    """Return the objects that match a pattern of an fsspec URL.

    Raises:
        ConfigError: the file system is unknown or not installed.
        DataError: the objects cannot be listed.
    """
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = "; pip install 'perdure[s3-data]'" if url.startswith("s3") else ""
        raise ConfigError(f"data.files={url}: {error}{extra}") from None
    except ValueError as error:
        raise ConfigError(f"data.files={url}: {error}") from None
    with _data_errors(f"data.files={url}"):
        entries = system.glob(pattern, detail=True)
    root = _fixed_folder(pattern)
    documents = []
    for path, info in entries.items():
        if info["type"] == "file":
            name = PurePosixPath(path).relative_to(root).as_posix()
            stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
            documents.append(Document(name, path, int(info["size"]), stamp))
    return Corpus(_sorted(documents), partial(_read_remote, system))


def _read_remote(system: Any, document: Document) -> bytes:
    with _data_errors(document.path):
        data: bytes = system.cat_file(document.path)
    return data


def _fixed_folder(pattern: str) -> str:
    """Return the deepest folder shared by every match of a pattern."""
    folder, _, _ = pattern.rpartition("/")
    while glob.has_magic(folder):
        folder, _, _ = folder.rpartition("/")
    return folder or ("/" if pattern.startswith("/") else "")
