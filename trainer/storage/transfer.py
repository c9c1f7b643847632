"""Upload and download of files between a store and a local disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.config.schema import ObjectStore
from trainer.errors import StoreError
from trainer.storage import Store, local_path, open_store


def upload(file: Path, store: Store, key: str) -> None:
    """Write a file as the new key `key`, part by part; durable on return.

    Raises:
        StoreError: the key exists, or the store cannot be written.
    """
    with open(file, "rb") as opened:
        total_bytes = os.fstat(opened.fileno()).st_size
        starts = range(0, total_bytes, store.part_bytes)
        sizes = (min(store.part_bytes, total_bytes - start) for start in starts)
        store.write(key, total_bytes, (memoryview(opened.read(size)) for size in sizes))


def download(store: Store, key: str, path: Path) -> None:
    """Copy `key` to `path`, whose folders are created. Not durable.

    Raises:
        FileNotFoundError: the store has no such key.
        StoreError: the store cannot be read, or the local disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        _copy(store, key, file)


def _copy(store: Store, key: str, file: IO[bytes]) -> None:
    total_bytes = store.size(key)
    buffer = memoryview(bytearray(min(store.read_bytes, max(total_bytes, 1))))
    for start in range(0, total_bytes, len(buffer)):
        count = store.read_into(key, start, buffer)
        try:
            file.write(buffer[:count])
            file.flush()
        except OSError as error:
            raise StoreError(
                f"cannot copy {store.url}/{key} ({total_bytes:,} bytes) to {file.name}: "
                f"{error.strerror}; set TMPDIR to a folder with more space"
            ) from None


@contextmanager
def local_file(url: str, settings: ObjectStore) -> Iterator[str]:
    """Return the path of a file; of a remote file, that of a temporary copy.

    The copy is unlinked afterwards; open files and memory maps of it stay valid.
    """
    if (path := local_path(url)) is not None:
        yield str(path)
        return
    parent, _, name = url.rpartition("/")
    with tempfile.NamedTemporaryFile() as file:
        _copy(open_store(parent, settings), name, file)
        yield file.name
