"""Data worker processes: startup, signals, and shutdown together with their parent."""

import atexit
import signal
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import TypeVar

from trainer.core import threads
from trainer.data import damage
from trainer.errors import WorkerLostError

T = TypeVar("T")
_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
_closers: set[Callable[[], None]] = set()


def start_workers(start: Callable[[], T]) -> T:
    """Call `start`, which starts worker processes, and kill these when this process exits.

    Workers ignore SIGTERM, which multiprocessing would send at exit and then wait forever.
    The SIGCHLD handler that torch installs is removed: it raises between any two lines of the
    training loop. A lost worker is detected within five seconds by the process waiting for it.
    """
    existing, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    result = start()
    if signal.getsignal(signal.SIGCHLD) is not handler:  # only the main thread can have set it
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    register_shutdown()
    _workers.update(child for child in active_children() if child not in existing)
    return result


def register_shutdown(close: Callable[[], None] | None = None) -> None:
    """Close readers with `close`, then kill all workers, when this process exits.

    Registered anew each time: the newest handler is first, before multiprocessing's own.
    """
    if close is not None:
        _closers.add(close)
    atexit.unregister(_shut_down)
    atexit.register(_shut_down)


def _shut_down() -> None:
    for close in _closers:
        close()
    for worker in list(_workers):
        with suppress(ValueError):  # already closed
            worker.kill()


def begin_worker(number: int) -> None:
    """Set up a data worker: ignore stop signals, exit with the parent process."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threads.die_with_parent()


def lost_worker(error: BaseException) -> WorkerLostError | None:
    """Return a WorkerLostError if `error` is torch's report of a killed worker, else None."""
    if isinstance(error, WorkerLostError):
        return error
    if not damage.is_lost_worker(error):
        return None
    text = str(error).partition("\n")[0].strip().rstrip(".")
    return WorkerLostError(
        f"{text}. If it was killed for running out of memory, lower trainer.data_workers or the "
        "number of ranks per node"
    )
