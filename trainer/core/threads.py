"""Parallel calls on daemon threads, and child processes that end with their parent."""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


def in_parallel(do: Callable[[T], object], items: Sequence[T], count: int) -> None:
    """Call `do` on every item, from up to `count` threads; raise the first error.

    Returns when every call has returned; after an error no further call is started. The threads
    are daemons, unlike those of concurrent.futures, so that one that hangs in an unresponsive file
    system cannot block the exit of the process.
    """
    errors: list[BaseException] = []
    remaining, lock = iter(items), threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                item = next(remaining, None)
            if item is None:
                return
            try:
                do(item)
            except BaseException as error:  # raised below, on the caller's thread
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), Linux).

    Otherwise ranks would outlive a killed launcher and act as a second job on the same run.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
