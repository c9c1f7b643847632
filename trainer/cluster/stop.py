"""Turn signals and deadlines into a stop decision that all ranks share.

A signal handler only records the signal number.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

from trainer.cluster import agreement
from trainer.cluster.agreement import Vote
from trainer.cluster.early_stop import early_stop, numbers, watch_arrivals
from trainer.cluster.world import World
from trainer.errors import INTERRUPTED_TWICE

DEADLINE = 1000
"""Stop reason of a deadline; larger than any signal number."""
_POLL_S = 0.02
"""Interval between two checks for missing data, seconds."""


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
    """Signals and deadlines, turned into a stop decision that all ranks share.

    Votes are pipelined by one step: what a rank observes before step k is known to every rank at
    the step boundary after step k. Only the first vote, and votes while some rank waits for data,
    block. The constructor is collective.

    Args:
        world: the ranks.
        grace_s: seconds between a signal and SIGKILL.
        deadline: called on rank 0 at every step boundary with the seconds to reserve for saves;
            returns True when the attempt must end.
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
        """Signal number that the ranks agreed on, `DEADLINE`, or 0."""
        self.waited_s = 0.0
        """Total time that ranks waited until all had their data, seconds."""
        self.boundaries = 0
        """Number of votes so far; it increases as long as training progresses."""
        self._received = 0
        self._received_s: float | None = None
        self._previous: dict[int, Any] = {}
        self._votes = agreement.connect(world)
        self._in_flight = False
        self._has: Callable[[int], bool] | None = None
        self._stop_watching: Callable[[], None] = lambda: None

    # --- signals ----------------------------------------------------------------------------------

    def listen(self, names: Sequence[str], *, interrupts_end: bool = False) -> None:
        """Install the signal handlers. Main thread only.

        Args:
            names: signal names.
            interrupts_end: exit at once on a second Ctrl-C at a terminal. False for ranks, whose
                launcher forwards the first one and kills them on the second.
        """
        exit_on_second = SecondInterrupt() if interrupts_end else lambda number: None

        def receive(number: int) -> None:
            self._record_time(number)
            exit_on_second(number)

        # Not forwarded: the early stop would answer one that it sees after this loop has ended.
        self._stop_watching = watch_arrivals(receive, forwards=False)
        for number in numbers(names):
            self._previous[number] = signal.signal(number, self._record)
        number, received_s = early_stop.adopt()
        if number in self._previous:
            self._received, self._received_s = number, received_s

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _record_time(self, number: int) -> None:
        """Record the arrival time. On a thread, since handlers wait for the main thread."""
        if self._received_s is None and number in self._previous:
            self._received_s = time.monotonic()

    def restore_handlers(self) -> None:
        """Restore the previous handlers."""
        self._stop_watching()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def remaining_s(self) -> float | None:
        """Remaining grace time on this rank, seconds; None: it has received no signal."""
        if self._received_s is None:
            return None
        return self.grace_s - (time.monotonic() - self._received_s)

    # --- votes -----------------------------------------------------------------------------------

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
        result = self._take()
        if result is None or has != self._has:  # the vote in flight was about other data
            self._has = has
            result = self._vote_now(has, saves)
        if not result.ready and not result.reason:
            result = self._wait_for_data(has, saves)
        self.reason = self.reason or result.reason
        if self._votes is not None:
            self._votes.send(self._own_vote(has(2), saves))
            self._in_flight = True
        return result

    def _wait_for_data(self, has: Callable[[int], bool], saves: Saves) -> Vote:
        """Repeat the vote until every rank has its data or the ranks stop."""
        began = time.monotonic()
        result = self._vote_now(has, saves)
        while not result.ready and not result.reason:
            if not has(1):
                time.sleep(_POLL_S)
            result = self._vote_now(has, saves)
        self.waited_s += time.monotonic() - began
        return result

    def _vote_now(self, has: Callable[[int], bool], saves: Saves) -> Vote:
        vote = self._own_vote(has(1), saves)
        if self._votes is None:
            return vote
        self._votes.send(vote)
        return self._votes.receive()

    def _own_vote(self, has_data: bool, saves: Saves) -> Vote:
        is_first = self._world.rank == 0
        reason = self._received
        if is_first and not reason and self._deadline(saves.reserve_s):
            reason = DEADLINE
        return Vote(reason, is_first and saves.due_by_clock(), saves.ended(), has_data)

    def _take(self) -> Vote | None:
        """Return the result of the vote in flight, if any."""
        if self._votes is None or not self._in_flight:
            return None
        self._in_flight = False
        return self._votes.receive()

    def settle(self) -> None:
        """Complete the vote in flight, so that the control group is free. Collective."""
        self._take()


def reason_text(reason: int) -> str:
    """Return how to call a reason to stop: the signal's name, or `deadline`."""
    return "deadline" if reason == DEADLINE else signal.Signals(reason).name


class SecondInterrupt:
    """Immediate exit at a terminal's second Ctrl-C."""

    def __init__(self) -> None:
        self._interrupts = 0

    def __call__(self, number: int) -> None:
        """Count a signal; exit with 130 at the second SIGINT."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2 and sys.stdin is not None and sys.stdin.isatty():
            sys.stderr.write("\nexited at the second Ctrl-C; committed checkpoints are kept\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED_TWICE)


def signal_problems(names: Sequence[str]) -> list[str]:
    """Return the names that are not signals a process can handle."""
    valid = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    return [name for name in names if name not in valid]
