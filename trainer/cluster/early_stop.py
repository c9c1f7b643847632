"""Stop signals outside of the training loop, from the command's first line to its last.

`record` installs handlers before any slow import; they only record the signal. Once the
configuration is known, `answer` ends the process at a signal, with exit code 75 and the outcome
file, because nothing needs to be saved. A thread does this, so that it also works while the main
thread waits for other ranks. In between, `stop.Stop` receives the signals of the training loop.

Imports little, because signals before `record` have their default action.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")
"""Signals that are recorded before the configuration is known."""
_JOIN_S = 5.0
"""Seconds that a signaled rank has to join the others, to stop together with them."""


def numbers(names: Sequence[str]) -> list[int]:
    """Return the signal numbers of valid names, without a SIGHUP that nohup ignores."""
    valid = [getattr(signal.Signals, name) for name in names if name in signal.Signals.__members__]
    valid = [number for number in valid if number not in (signal.SIGKILL, signal.SIGSTOP)]
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in valid if not (is_nohup and number == signal.SIGHUP)]


def watch_arrivals(receive: Callable[[int], None], *, forwards: bool = True) -> Callable[[], None]:
    """Call `receive` with the number of each handled signal, at once, on a separate thread.

    Works while the main thread is in a call that runs no Python handlers. Main thread only.

    Args:
        receive: called with a signal number.
        forwards: an earlier watch receives the signals too. Its thread may be late, and then sees
            the handlers of that time.

    Returns:
        A function that ends the watch.
    """
    import threading

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while arrived := os.read(reading, 64):
            if forwards and previous >= 0:
                with suppress(OSError):  # full, or closed meanwhile
                    os.write(previous, arrived)
            for number in arrived:
                receive(number)
        os.close(reading)

    def end() -> None:
        signal.set_wakeup_fd(previous)
        os.close(writing)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return end


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Restore all signal handlers at the end: an elastic agent keeps its own. Main thread only."""
    previous = {number: signal.getsignal(number) for number in [*numbers(NAMES), signal.SIGQUIT]}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class EarlyStop:
    """Stop signals of this process while no training loop receives them."""

    def __init__(self) -> None:
        self._received, self._received_s = 0, 0.0
        self._outcome_file: str | None = None
        self._began_s: float | None = None
        self._is_answering = self._is_adopted = False

    def record(self) -> None:
        """Record signals from now on. The first call of a command, on the main thread."""
        self._began_s, self._outcome_file = time.time(), os.environ.get("PERDURE_OUTCOME")
        for number in numbers(NAMES):
            signal.signal(number, self._record)
        os.register_at_fork(after_in_child=self._forget)

    def answer(self, names: Sequence[str]) -> None:
        """End the process at a signal from now on, also at one that has been recorded.

        Without `record`, does nothing: then the process belongs to another program.

        Args:
            names: `preemption.signals`. Other signals get their default action.
        """
        if self._began_s is None:
            return
        configured = numbers(names)
        for number in numbers(NAMES):
            if number not in configured:
                _restore_default(number)
        for number in configured:
            signal.signal(number, self._record)
        if not self._is_answering:
            self._is_answering = True
            watch_arrivals(self._answer)
        if self._received in configured:
            self._answer(self._received)
        elif self._received:
            os.kill(os.getpid(), self._received)

    def adopt(self) -> tuple[int, float]:
        """Return the recorded signal or 0, and its time by `time.monotonic`.

        Call it after another receiver has replaced the handlers.
        """
        self._is_adopted = True
        return self._received, self._received_s

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_s = number, time.monotonic()

    def _answer(self, number: int) -> None:
        """End the process, unless another receiver has the signal. Any thread."""
        if signal.getsignal(number) != self._record:
            return
        self._record(number, None)
        is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not is_one_of_many or self._is_adopted:
            self._leave()
        import threading

        timer = threading.Timer(_JOIN_S, self._leave_unless_adopted)
        timer.daemon = True
        timer.start()

    def _leave_unless_adopted(self) -> None:
        if not self._is_adopted:
            self._leave()

    def _leave(self) -> None:
        from trainer.cluster import outcome

        name = signal.Signals(self._received).name
        outcome.stop_early(name, self._outcome_file, self._began_s or 0.0)

    def _forget(self) -> None:
        """Restore the default actions in a forked child."""
        signal.set_wakeup_fd(-1)
        for number in numbers(NAMES):
            if signal.getsignal(number) == self._record:
                _restore_default(number)


def _restore_default(number: int) -> None:
    is_interrupt = number == signal.SIGINT
    signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


early_stop = EarlyStop()
"""The early stop of this process."""
