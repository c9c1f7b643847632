"""End of an attempt whose start takes longer than the grace time of a stop signal."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.cluster.stop import Stop

_POLL_S = 0.25
_START_SHARE = 0.5
"""Share of the grace time that a start may use up after a signal."""


@contextmanager
def ending_late_start(stop: Stop, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` on a thread if a signaled rank does not reach its first step boundary in time.

    Before that boundary nothing needs to be saved, but building a model or loading a checkpoint
    may take minutes.
    """
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(_POLL_S) and not stop.boundaries:
            remaining_s = stop.remaining_s
            if remaining_s is not None and remaining_s < _START_SHARE * stop.grace_s:
                end()
                return

    threading.Thread(target=watch, name="late-start", daemon=True).start()
    try:
        yield
    finally:
        closed.set()
