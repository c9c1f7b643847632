"""Private temporary folders of this user; those of killed processes are deleted later."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import ConfigError

_SCRATCH = "scratch"
"""Subfolder whose contents may be deleted; logs and files of sweeps are stored next to it."""


def user_folder() -> Path:
    """Return this user's own folder for temporary files; it is not created.

    Two users of one machine get different folders. Only what `scratch_folder` creates is deleted.
    """
    return Path(tempfile.gettempdir(), f"perdure-{os.getuid()}")


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Create a temporary folder that only this user can read; delete it at the end.

    A lock tells folders in use from those of processes that were killed, which are deleted here.

    Args:
        name: first part of the folder's name.

    Raises:
        ConfigError: another user owns the place of this user's folder.
    """
    user = user_folder()
    user.mkdir(mode=0o700, exist_ok=True)
    status = user.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            f"{user} for temporary files belongs to another user; set TMPDIR to a folder of your "
            "own"
        )
    user.chmod(0o700)
    scratch = user / _SCRATCH
    scratch.mkdir(exist_ok=True)
    _delete_abandoned(scratch)
    folder, descriptor = _locked_folder(scratch, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    """Create a folder; return it and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        with suppress(FileNotFoundError):  # another process deleted it before it was locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            with suppress(OSError):  # no locks on this file system: nothing is deleted later
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _delete_abandoned(parent: Path) -> None:
    """Delete folders whose lock is free."""
    for folder in parent.iterdir():
        with suppress(OSError):  # in use, deleted by another process, or not a folder
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
