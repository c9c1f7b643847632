"""Parallel calls on daemon threads, and child processes that end with their parent.

The threads are daemons, unlike those of concurrent.futures, so that one that hangs in an
unresponsive file system cannot block the exit of the process.
"""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from itertools import islice
from operator import length_hint
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_PR_SET_PDEATHSIG = 1


def in_parallel(do: Callable[[T], object], items: Iterable[T], count: int) -> None:
    """Call `do` on every item, from `count` threads; raise the first error of `do` or `items`.

    Items are batch one at a time, in order, when a thread is free, and no reference is kept.
    Returns when every call has returned; after an error no further call is started.
    """
    errors: list[BaseException] = []
    remaining, lock = iter(items), threading.Lock()

    def work() -> None:
        try:
            while not errors:
                with lock:
                    batch = list(islice(remaining, 1))
                if not batch:
                    return
                do(batch.pop())
        except BaseException as error:  # raised below, on the caller's thread
            errors.append(error)

    count = min(count, length_hint(items, count))
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # no more threads in this container
        if not threads:
            raise
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def map_ahead(do: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R, None, None]:
    """Yield `do(item)` in the order of the items, with up to `count` calls ahead in threads.

    When the iterator is closed, calls in progress are waited for.
    """
    pending: deque[Future[R]] = deque()

    def call(future: Future[R], item: T) -> None:
        try:
            future.set_result(do(item))
        except BaseException as error:  # raised below, on the caller's thread
            future.set_exception(error)

    try:
        for item in items:
            if len(pending) == count:
                yield pending.popleft().result()
            future: Future[R] = Future()
            threading.Thread(target=call, args=(future, item), daemon=True).start()
            pending.append(future)
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.exception()


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), Linux).

    Otherwise ranks would outlive a killed launcher and act as a second job on the same run.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
