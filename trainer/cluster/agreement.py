"""How the ranks' votes travel: through shared memory on one machine, else by an all-reduce."""

import mmap
import os
import select
import time
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from trainer.cluster.world import World


class Vote(NamedTuple):
    """What a rank says at a boundary, or all of them together."""

    reason: int = 0
    """Why to stop: number of a signal, 1000 for a deadline, or 0. Together: the highest."""
    save_due: bool = False
    """Whether it is time to save. Together: whether some rank says so."""
    saves_ended: int = 0
    """How many saves have ended, below 2^30. Together: on every rank."""
    ready: bool = True
    """Whether the data of the next step is there. Together: on every rank."""


class Votes(Protocol):
    """A way for votes to travel: one is sent, then taken, and so on, alike on every rank."""

    def send(self, mine: Vote) -> None:
        """Give this rank's vote. Waits for nobody."""

    def take(self) -> Vote:
        """Return what was sent last on every rank, together. Waits for the last one's."""


class RankEndedError(RuntimeError):
    """The process of another rank is gone, and its vote will not come."""


def between(world: World) -> Votes | None:
    """Return the way for votes between these ranks; None: there is but one. Collective."""
    return None if world.size == 1 else _board(world) or _Reduction(world)


class _Reduction:
    """An all-reduce on the control group; it has until it is taken to complete."""

    def __init__(self, world: World) -> None:
        self._group = world.control
        self._sent = torch.zeros(4, dtype=torch.int64)  # kept: making them costs as much as sending
        self._numbers = self._sent.numpy()
        self._work: Any = None

    def send(self, mine: Vote) -> None:
        self._numbers[:] = (mine.reason, mine.save_due, -mine.saves_ended, not mine.ready)
        self._work = dist.all_reduce(
            self._sent, dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def take(self) -> Vote:
        self._work.wait()
        reason, save_due, saves_running, waiting = self._numbers.tolist()
        return Vote(reason, bool(save_due), -saves_running, not waiting)


class _Board:
    """Shared memory of one machine: two words of 64 bits for each rank, used in turn.

    A vote is one word with its number, so that it is written and read whole. A rank that writes
    vote n has read all votes n - 1, hence nobody still needs its n - 2, whose place it takes.
    """

    def __init__(self, rank: int, memory: mmap.mmap, others: dict[int, int]) -> None:
        self._words = memoryview(memory).cast("q")
        self._rank, self._size = rank, len(others) + 1
        self._number = 0
        self._alive = select.poll()  # a pidfd is readable when its process has ended
        self._others = others
        for pidfd in others:
            self._alive.register(pidfd, select.POLLIN)

    def send(self, mine: Vote) -> None:
        self._number += 1
        said = (mine.saves_ended << 13) | (mine.reason << 2) | (mine.save_due << 1) | mine.ready
        self._words[2 * self._rank + self._number % 2] = (self._number % 2**20) << 43 | said

    def take(self) -> Vote:
        reason, save_due, ended, ready = 0, 0, 2**30, 1
        for rank in range(self._size):  # one pass: all of this is cold at every step
            vote = self._read(rank)
            reason = max(reason, vote >> 2 & 0x7FF)
            save_due |= vote & 2
            ended = min(ended, vote >> 13)
            ready &= vote
        return Vote(reason, save_due > 0, ended, ready > 0)

    def _read(self, rank: int) -> int:
        place, number = 2 * rank + self._number % 2, self._number % 2**20
        looks = 0
        while (word := self._words[place]) >> 43 != number:
            looks += 1
            if looks < 50:
                time.sleep(20e-6)
            elif ended := [fd for fd, _ in self._alive.poll(1)]:
                if self._words[place] >> 43 == number:
                    continue  # it voted, and then ended
                raise RankEndedError(f"the process of rank {self._others[ended[0]]} has ended")
        return word & (2**43 - 1)


def _board(world: World) -> _Board | None:
    """Return a board if the ranks share a machine and its process numbers. Collective."""
    if world.local_size != world.size or not hasattr(os, "pidfd_open"):
        return None
    size = 16 * world.size
    file = -1
    if world.rank == 0:
        with suppress(OSError):
            file = os.memfd_create("votes")  # no name, hence no litter
            os.truncate(file, size)
    seen = world.gather((_namespace(), os.getpid(), file))
    try:
        if file < 0:
            file = os.open(f"/proc/{seen[0][1]}/fd/{seen[0][2]}", os.O_RDWR)
        others = {os.pidfd_open(pid): r for r, (_, pid, _) in enumerate(seen) if r != world.rank}
        board = _Board(world.rank, mmap.mmap(file, size), others)
    except OSError:
        board = None
    same = len({namespace for namespace, _, _ in seen}) == 1
    usable = world.all(board is not None and same)
    if file >= 0:
        os.close(file)
    return board if usable else None


def _namespace() -> tuple[str, str]:
    """Return what tells whether two processes know each other's numbers: machine and namespace."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        return boot.read().strip(), os.readlink("/proc/self/ns/pid")
    return "", ""
