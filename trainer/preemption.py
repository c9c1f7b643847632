"""Signals become a fact; the ranks agree on it. A handler stores a number and nothing else."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import World

_NO_VOTE = (0, 0)


class Stop:
    """Whether the ranks have agreed to stop, and whether a save is due by rank 0's clock.

    The vote is an asynchronous all-reduce on the control group that has a whole step to complete:
    what one rank saw before step k is known to all at the boundary after step k, at the same step
    on every rank.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.save_due: Callable[[], bool] = lambda: False
        """Asked on rank 0 at every boundary."""
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

    def agree(self) -> bool:
        """Return whether a save is due by the clock; sets `signal`. Collective, once a boundary."""
        if self._world.size == 1:
            self.signal = self._received
            return self.save_due()
        signal_number, save_due = self._take()
        self.signal = self.signal or signal_number
        mine = torch.tensor([self._received, int(self._world.rank == 0 and self.save_due())])
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._vote = (work, mine)
        return bool(save_due)

    def _take(self) -> tuple[int, int]:
        if self._vote is None:
            return _NO_VOTE
        work, votes = self._vote
        self._vote = None
        work.wait()
        number, save_due = votes.tolist()
        return number, save_due

    def settle(self) -> None:
        """Complete the vote in flight, so that the control group is free. Collective."""
        self._take()


def signal_problems(names: Sequence[str]) -> list[str]:
    """Return those names that are not signals which a process can handle."""
    valid = {s.name for s in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    return [name for name in names if name not in valid]
