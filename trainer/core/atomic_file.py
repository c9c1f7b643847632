"""Small local files that appear complete or not at all."""

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"
"""Prefix of files that are still being written; listings ignore them."""


@contextmanager
def atomic_file(path: Path, *, durable: bool) -> Iterator[IO[bytes]]:
    """Yield a temporary file in the same folder; rename it to `path` after the block.

    An exception in the block removes it and leaves `path` unchanged. If two processes write the
    same path, the later rename wins.

    Args:
        path: the file to create or replace.
        durable: sync the file before the rename and its folder after it.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def apply_umask(paths: Sequence[Path]) -> None:
    """Give files in one file system the permissions of new files there, by umask and default ACLs.

    Some libraries create files that only their owner can read. The umask itself cannot be read
    without changing it for all threads, so a new file shows what it allows.
    """
    if not paths:
        return
    sample = paths[0].with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
    with open(sample, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    sample.unlink()
    for path in paths:
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
