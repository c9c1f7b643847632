"""Signals and deadlines become a fact; the ranks agree on it. A handler stores a number only."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from trainer.cluster import agreement
from trainer.cluster.agreement import Vote
from trainer.cluster.world import World
from trainer.errors import INTERRUPTED_TWICE

DEADLINE = 1000
"""The reason to stop that is no signal's number."""
_POLL_S = 0.02


class Saves(Protocol):
    """Save state that a rank contributes to each vote."""

    @property
    def reserve_s(self) -> float:
        """Seconds to reserve before a deadline for the last saves."""

    def due_by_clock(self) -> bool:
        """Return whether a save is due by rank 0's clock."""

    def ended(self) -> int:
        """Return the number of saves that have ended on this rank."""


class _NoSaves:
    """The save state of a rank that saves nothing."""

    reserve_s = 0.0

    def due_by_clock(self) -> bool:
        return False

    def ended(self) -> int:
        return 0


NO_SAVES: Saves = _NoSaves()
"""The save state outside a training run, in an evaluation for example."""


class Stop:
    """Whether the ranks have agreed to stop, and what else they agree on at every boundary.

    A vote has a whole step to travel: what one rank saw before step k is known to all at the
    boundary after step k, at the same step on every rank. Only the first vote, and those while some
    rank waits for data, are waited for. Making one is collective.

    Args:
        world: the ranks.
        grace_s: seconds between a signal and SIGKILL.
        deadline: called on rank 0 at every boundary with the seconds to reserve for saves; returns
            True when the attempt must end.
    """

    def __init__(
        self,
        world: World,
        *,
        grace_s: float = 30.0,
        deadline: Callable[[float], bool] = lambda reserve_s: False,
    ) -> None:
        self._world, self._deadline = world, deadline
        self.grace_s = grace_s
        """Seconds between a signal and SIGKILL."""
        self.reason = 0
        """Number of the signal that the ranks agreed on, `DEADLINE`, or 0."""
        self.waited_s = 0.0
        """Seconds in which some rank had not got the data that was asked for."""
        self.boundaries = 0
        """How often the ranks have agreed: what moves as long as the training does."""
        self._received = 0
        self._received_s: float | None = None
        self._previous: dict[int, Any] = {}
        self._votes = agreement.between(world)
        self._in_flight = False
        self._asked: Callable[[int], bool] | None = None
        self._stop_watching: Callable[[], None] = lambda: None

    # --- what arrives ----------------------------------------------------------------------------

    def listen(self, names: Sequence[str], *, interrupts_end: bool = False) -> None:
        """Install the handlers; main thread only.

        Args:
            names: of the signals.
            interrupts_end: whether a second Ctrl-C at a terminal ends the process at once. Not for
                ranks: of their launcher's second one they die with it, and it passes on the first.
        """
        second = SecondInterrupt() if interrupts_end else lambda number: None

        def arrived(number: int) -> None:
            self._note_time(number)
            second(number)

        self._stop_watching = watch_arrivals(arrived)
        for name in names:
            number = getattr(signal, name)
            self._previous[number] = signal.signal(number, self._store)

    def _store(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _note_time(self, number: int) -> None:
        """Take the time at once, on a thread; the handler waits for the main thread's next line."""
        if self._received_s is None and number in self._previous:
            self._received_s = time.monotonic()

    def restore_handlers(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._stop_watching()

    @property
    def left_s(self) -> float | None:
        """Seconds of the grace time that are left on this rank; None: no signal came here."""
        if self._received_s is None:
            return None
        return self.grace_s - (time.monotonic() - self._received_s)

    # --- what is agreed --------------------------------------------------------------------------

    def agree(
        self, has: Callable[[int], bool] = lambda count: True, saves: Saves = NO_SAVES
    ) -> Vote:
        """Agree on this boundary's vote; set `reason`. Collective, once per boundary.

        Args:
            has: returns True if this rank has the data for that many steps. The call blocks until
                every rank has the data for the next step, or the ranks stop.
            saves: save state of this rank.
        """
        self.boundaries += 1
        agreed = self._take()
        if agreed is None or has != self._asked:  # that vote was of other data, if of any
            self._asked = has
            agreed = self._now(has, saves)
        if not agreed.ready and not agreed.reason:
            agreed = self._wait(has, saves)
        self.reason = self.reason or agreed.reason
        if self._votes is not None:
            self._votes.send(self._mine(has(2), saves))
            self._in_flight = True
        return agreed

    def _wait(self, has: Callable[[int], bool], saves: Saves) -> Vote:
        """Agree again and again, until every rank has its data or the ranks stop."""
        began = time.monotonic()
        agreed = self._now(has, saves)
        while not agreed.ready and not agreed.reason:
            if not has(1):
                time.sleep(_POLL_S)
            agreed = self._now(has, saves)
        self.waited_s += time.monotonic() - began
        return agreed

    def _now(self, has: Callable[[int], bool], saves: Saves) -> Vote:
        mine = self._mine(has(1), saves)
        if self._votes is None:
            return mine
        self._votes.send(mine)
        return self._votes.take()

    def _mine(self, has_data: bool, saves: Saves) -> Vote:
        is_first = self._world.rank == 0
        reason = self._received
        if is_first and not reason and self._deadline(saves.reserve_s):
            reason = DEADLINE
        return Vote(reason, is_first and saves.due_by_clock(), saves.ended(), has_data)

    def _take(self) -> Vote | None:
        """Return what the ranks said together since the last boundary, if they did."""
        if self._votes is None or not self._in_flight:
            return None
        self._in_flight = False
        return self._votes.take()

    def settle(self) -> None:
        """Complete the vote in flight, so that the control group is free. Collective."""
        self._take()


def reason_text(reason: int) -> str:
    """Return how to call a reason to stop: the signal's name, or `deadline`."""
    return "deadline" if reason == DEADLINE else signal.Signals(reason).name


def watch_arrivals(arrived: Callable[[int], None]) -> Callable[[], None]:
    """Call `arrived` with the number of each handled signal, at once, on a thread of its own.

    Also when the main thread is inside a call that lets no Python handler run. Main thread only.
    Returns what ends it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                arrived(number)
        os.close(reading)

    def end() -> None:
        signal.set_wakeup_fd(previous)
        os.close(writing)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return end


class SecondInterrupt:
    """At a terminal, a second Ctrl-C ends the process at once, whatever it is doing."""

    def __init__(self) -> None:
        self._interrupts = 0

    def __call__(self, number: int) -> None:
        """Take note of a signal; on the second SIGINT, leave with 130."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2 and sys.stdin is not None and sys.stdin.isatty():
            sys.stderr.write("\nleft at the second Ctrl-C; committed checkpoints stand\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED_TWICE)


def signal_problems(names: Sequence[str]) -> list[str]:
    """Return those names that are not signals which a process can handle."""
    valid = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    return [name for name in names if name not in valid]
