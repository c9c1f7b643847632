"""Data worker processes: startup, signals, and shutdown together with their parent."""

import atexit
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, TypeVar

from torch._utils import ExceptionWrapper

from trainer.core import threads
from trainer.data import damage, limits
from trainer.data.forking import verified_forks
from trainer.errors import ConfigError, DataError, PerdureError, WorkerLostError

T = TypeVar("T")
_NO_DESCRIPTORS = 24
"""Exit code of a worker that has no file descriptor left to hand its tensors over: EMFILE."""
_SPARE_DESCRIPTORS = 4
"""Descriptors kept for the exit of a worker, which deletes its temporary folder."""
_EXIT_S = 1.0
"""Time for a lost worker's exit code to arrive, in seconds."""
_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
_closers: set[Callable[[], None]] = set()


def start_workers(start: Callable[[], T]) -> T:
    """Call `start`, which starts worker processes, and kill these when this process exits.

    Workers ignore SIGTERM, which multiprocessing would send at exit and then wait forever.
    The SIGCHLD handler that torch installs is removed: it raises between any two lines of the
    training loop. A lost worker is detected within five seconds by the process waiting for it.

    Raises:
        ConfigError: a limit of the machine prevents it.
        WorkerLostError: no worker runs, see `forking`.
    """
    limits.raise_descriptor_limit()
    existing, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    try:
        with verified_forks():
            result = start()
    except OSError as error:
        if explained := limits.explain_start(error):
            raise explained from None
        raise
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
    """Set up a data worker: ignore stop signals, exit with the parent process, report errors.

    Threads of multiprocessing pass items on. They would print an error and lose the item.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threads.die_with_parent()
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    sys.excepthook = _exit_without_descriptors
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(_SPARE_DESCRIPTORS)]
    Finalize(None, lambda: list(map(os.close, spare)), exitpriority=0)


class _ItemError(ExceptionWrapper):
    """An error in place of a loader's item, which the loader raises in the rank."""

    def __init__(self, error: PerdureError) -> None:
        self.error = error

    def reraise(self) -> None:
        raise type(self.error)(*self.error.args)  # a new one, which this object does not refer to


def _send_error(queue: "Queue[Any]", error: Exception, item: Any) -> None:
    """Send the error of an item that cannot be sent; called by the queue's thread."""
    is_item = isinstance(item, tuple) and len(item) == 2 and type(item[0]) is int
    if not is_item or isinstance(item[1], _ItemError):  # a queue of the dataset, a broken pipe
        sys.__excepthook__(type(error), error, error.__traceback__)
        return
    explained: PerdureError = limits.explain(error) or DataError(
        f"a data worker cannot send a batch to its rank: {damage.reason(error)}; return tensors, "
        "arrays, numbers and strings, or set trainer.data_workers=0"
    )
    queue.put((item[0], _ItemError(explained)))


def _exit_without_descriptors(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End this worker if the thread that hands over its tensors cannot; else print the error."""
    if limits.explain(error) is not None:
        os._exit(_NO_DESCRIPTORS)
    sys.__excepthook__(kind, error, trace)


def receive(items: Iterator[T]) -> T:
    """Return the next item of a loader.

    Raises:
        ConfigError: a limit of the machine prevents the workers from passing it on.
    """
    try:
        return next(items)
    except (RuntimeError, OSError, EOFError) as error:
        explained = limits.explain(error) or _ended_by_limit(error)
        if explained is None:
            raise
        try:
            raise explained from None
        finally:
            del explained  # no reference cycle with `items`, see `_StreamReader`


def _ended_by_limit(error: Exception) -> ConfigError | None:
    """Return the error of a worker that a limit has ended, by its exit code."""
    if not damage.is_lost_worker(error) and not isinstance(error, (ConnectionError, EOFError)):
        return None
    workers = [worker for worker in list(_workers) if not worker._closed]  # type: ignore[attr-defined]
    running: dict[Any, BaseProcess] = {
        worker.sentinel: worker for worker in workers if worker.exitcode is None
    }
    for sentinel in connection.wait(list(running), _EXIT_S):
        running[sentinel].join()  # it is ready shortly before the exit code
    codes = [worker.exitcode for worker in workers]
    if _NO_DESCRIPTORS in codes:
        return limits.too_few_descriptors()
    return limits.too_little_memory() if -signal.SIGBUS in codes else None


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
