"""Limits of the machine that data workers meet: open files, and shared memory in /dev/shm."""

import errno
import os
import re
import resource
from pathlib import Path

from trainer.core.formatting import size
from trainer.errors import ConfigError, PerdureError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""File system of the batches that workers pass to their rank."""
_MAX_DESCRIPTORS = 65_536
"""Limit of open files that a process sets itself, if the hard limit allows it."""
_DESCRIPTOR_ERRORS = re.compile(r"Too many open files|received \d+ items of ancdata")
_SHARED_MEMORY_ERRORS = re.compile(
    r"(shared memory|/torch_).*(No space left on device|Cannot allocate memory)|"
    r"out of shared memory",
    re.DOTALL,
)


def explain(error: BaseException) -> ConfigError | None:
    """Return the error with advice if `error` is caused by one of these limits, else None."""
    if isinstance(error, PerdureError):
        return None
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or _DESCRIPTOR_ERRORS.search(text):
        return too_few_descriptors()
    if _SHARED_MEMORY_ERRORS.search(text):
        return too_little_memory()
    return None


def explain_start(error: OSError) -> ConfigError | None:
    """Return the error with advice if workers cannot be started because of a limit, else None."""
    if error.errno == errno.ENOSPC:  # their locks are files in /dev/shm
        return too_little_memory()
    return explain(error)


def too_few_descriptors() -> ConfigError:
    """Return the error for exhausted file descriptors."""
    return ConfigError(
        f"too many open files: the limit is {descriptors():,} per process, and each tensor of a "
        "batch that a data worker passes on needs one. Raise the limit before the start (ulimit -n "
        "65536; docker run --ulimit nofile=65536; LimitNOFILE= of systemd), return fewer tensors "
        "per sample, or set trainer.data_workers=0"
    )


def too_little_memory() -> ConfigError:
    """Return the error for exhausted shared memory."""
    free_bytes, total_bytes = shared_memory() or (0, 0)
    return ConfigError(
        f"{SHARED_MEMORY} is full: {size(free_bytes)} of {size(total_bytes)} are free, and data "
        "workers pass their batches through it. Enlarge it (docker run --shm-size=8g or --ipc=host;"
        f" mount -o remount,size=8g {SHARED_MEMORY}), lower trainer.data_workers, or set "
        "trainer.data_workers=0"
    )


def descriptors() -> int:
    """Return the limit of open files that this process reaches: the hard one, up to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (
        _MAX_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)
    )
    return max(soft, min(hard, _MAX_DESCRIPTORS))


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files as far as its user may, up to 65,536."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), hard))


def shared_memory() -> tuple[int, int] | None:
    """Return free and total bytes of /dev/shm; None without it."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
