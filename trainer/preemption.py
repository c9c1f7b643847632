"""Signals become a fact; the ranks agree on it. A handler stores a number and nothing else."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import World


@dataclass(frozen=True)
class Vote:
    """What all ranks know of each other at a boundary."""

    signal: int = 0
    """Number of a signal that some rank received, or 0."""
    save_due: bool = False
    """Whether rank 0 says that it is time to save."""
    saves_ended: int = 0
    """How many saves have ended on every rank."""


class Stop:
    """Whether the ranks have agreed to stop, and what else they agree on at every boundary.

    The vote is an asynchronous all-reduce on the control group that has a whole step to complete:
    what one rank saw before step k is known to all at the boundary after step k, at the same step
    on every rank.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.save_due: Callable[[], bool] = lambda: False
        """Asked on rank 0 at every boundary."""
        self.saves_ended: Callable[[], int] = lambda: 0
        """Asked on every rank at every boundary."""
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._vote: tuple[Any, torch.Tensor] | None = None
        self.signal = 0
        """Number of the signal that the ranks agreed on, or 0."""

    def listen(self, names: Sequence[str]) -> None:
        """Install the handlers; main thread only."""
        for name in names:
            number = getattr(signal, name)
            self._previous[number] = signal.signal(number, self._store)

    def _store(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def restore_handlers(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def agree(self) -> Vote:
        """Return what the ranks agree on; sets `signal`. Collective, once a boundary."""
        is_first = self._world.rank == 0
        mine = Vote(self._received, is_first and self.save_due(), self.saves_ended())
        if self._world.size == 1:
            self.signal = mine.signal
            return mine
        agreed = self._take()
        self.signal = self.signal or agreed.signal
        votes = torch.tensor([mine.signal, int(mine.save_due), -mine.saves_ended])
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._vote = (work, votes)
        return agreed

    def _take(self) -> Vote:
        if self._vote is None:
            return Vote()
        work, votes = self._vote
        self._vote = None
        work.wait()
        number, save_due, saves_running = votes.tolist()
        return Vote(number, bool(save_due), -saves_running)

    def settle(self) -> None:
        """Complete the vote in flight, so that the control group is free. Collective."""
        self._take()


def signal_problems(names: Sequence[str]) -> list[str]:
    """Return those names that are not signals which a process can handle."""
    valid = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    return [name for name in names if name not in valid]
