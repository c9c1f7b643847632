"""Forks of data workers that cannot hang before their first line.

A fork copies the locks of threads that it does not copy. Before Python 3.11.10 that includes a lock
of the interpreter that a thread of gloo holds for an instant when it frees a tensor
(https://github.com/python/cpython/issues/112275): the child then waits forever, and its rank for
the child. A child that does not run is killed and forked again.
"""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import WorkerLostError

_START_S = 10.0
"""Time for a child to run its first line, in seconds."""
_TRIES = 5
_plain_fork = os.fork


@contextmanager
def verified_forks() -> Iterator[None]:
    """Within this context, `os.fork` returns in the parent when the child runs.

    `os.fork` raises WorkerLostError if several children in a row do not run.
    """
    os.fork = _verified_fork  # multiprocessing calls it by this name
    try:
        yield
    finally:
        os.fork = _plain_fork


def _verified_fork() -> int:
    for _ in range(_TRIES):
        reader, writer = os.pipe()
        try:
            pid = _plain_fork()
        except OSError:
            os.close(reader)
            os.close(writer)
            raise
        if pid == 0:
            os.close(reader)
            os.write(writer, b"1")
            os.close(writer)
            return 0
        os.close(writer)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        runs = poll.poll(_START_S * 1e3)  # also true if the child has ended already
        os.close(reader)
        if runs:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise WorkerLostError(
        f"{_TRIES} data workers in a row did not start within {_START_S:g} s; if this machine is "
        "not overloaded, set trainer.data_workers=0 and report the stacks of gdb"
    )
