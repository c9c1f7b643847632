"""Files that only this user can read or change, in $XDG_STATE_HOME/perdure.

Without XDG_STATE_HOME: in ~/.local/state/perdure. What other users could have written there is
never read, so the folder and its files have to belong to this user, without rights for others.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_BYTES = 256 * 1024
"""Size at which the older half of a file's lines is dropped."""


def state_folder() -> Path:
    """Return the folder; it may be missing.

    Raises:
        FileNotFoundError: this user has no home directory.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # invalid, by the XDG specification
        base = os.path.expanduser("~/.local/state")
    if not os.path.isabs(base):
        raise FileNotFoundError("this user has no home directory")
    return Path(base, "perdure")


def read_lines(name: str) -> list[str]:
    """Return a file's lines, oldest first.

    Raises:
        OSError: the file is missing, or it or its folder is not private.
    """
    with _folder() as folder, _private_file(name, os.O_RDONLY, folder) as file:
        return _lines(file)


def append_line(name: str, line: str) -> None:
    """Append a line unless the file has it; of a file that grows too large, keep the newer half.

    A line that two processes write at the same time may be lost.

    Raises:
        OSError: the folder cannot be created or written, or it or the file is not private.
    """
    _create_folder()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    with _folder() as folder, _private_file(name, flags, folder) as file:
        lines = _lines(file)
        if line in lines:
            return
        if os.fstat(file).st_size + len(line) >= MAX_BYTES:
            os.ftruncate(file, 0)
            line = "\n".join([*lines[len(lines) // 2 :], line])
        os.write(file, f"{line}\n".encode())


def _create_folder() -> None:
    """Create the folder, but never in that of another user (root with a user's HOME)."""
    folder = state_folder()
    above = next(parent for parent in folder.parents if parent.exists())
    if above.stat().st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{above} belongs to another user")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _folder() -> Iterator[int]:
    """Yield a descriptor of the folder."""
    with _opened(state_folder(), os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        yield descriptor


@contextmanager
def _private_file(name: str, flags: int, folder: int) -> Iterator[int]:
    """Yield a descriptor of a file in the folder."""
    with _opened(name, flags | os.O_NONBLOCK, folder) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PermissionError(f"{name} is not a file")
        yield descriptor


@contextmanager
def _opened(path: str | Path, flags: int, folder: int | None = None) -> Iterator[int]:
    """Open without following a symbolic link, and check the owner and the rights."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode=0o600, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{path} belongs to another user, or others have rights to it")
        yield descriptor
    finally:
        os.close(descriptor)


def _lines(descriptor: int) -> list[str]:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("ascii", "replace").splitlines()
