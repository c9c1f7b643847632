"""Votes of all ranks, combined through shared memory on one machine, else by an all-reduce."""

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
    """Vote of one rank at a step boundary, or the combined vote of all ranks."""

    reason: int = 0
    """Stop reason: a signal number, 1000 for a deadline, or 0. Combined: the maximum."""
    save_due: bool = False
    """A save is due. Combined: on any rank."""
    saves_ended: int = 0
    """Number of saves that have ended, below 2^30. Combined: the minimum."""
    ready: bool = True
    """The data of the next step is loaded. Combined: on every rank."""


class Votes(Protocol):
    """Exchange of votes: `send` and `receive` alternate, equally on every rank."""

    def send(self, vote: Vote) -> None:
        """Send this rank's vote without waiting."""

    def receive(self) -> Vote:
        """Wait for the last vote of every rank; return the combined vote."""


class RankEndedError(RuntimeError):
    """Process of another rank exited before it voted."""


def connect(world: World) -> Votes | None:
    """Return the exchange of votes between these ranks; None for a single rank. Collective."""
    return None if world.size == 1 else _board(world) or _Reduction(world)


class _Reduction:
    """Asynchronous all-reduce on the control group, completed by `receive`."""

    def __init__(self, world: World) -> None:
        self._group = world.control
        # Reused: allocating costs as much as sending.
        self._sent = torch.zeros(4, dtype=torch.int64)
        self._numbers = self._sent.numpy()
        self._work: Any = None

    def send(self, vote: Vote) -> None:
        self._numbers[:] = (vote.reason, vote.save_due, -vote.saves_ended, not vote.ready)
        self._work = dist.all_reduce(
            self._sent, dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def receive(self) -> Vote:
        self._work.wait()
        reason, save_due, saves_running, waiting = self._numbers.tolist()
        return Vote(reason, bool(save_due), -saves_running, not waiting)


class _Board:
    """Shared memory of one machine: two 64-bit words per rank, used alternately.

    A vote and its number share one word, so that reads and writes are atomic. A rank that writes
    vote n has read all votes n - 1, so no rank still needs its vote n - 2, which is overwritten.
    """

    def __init__(self, rank: int, memory: mmap.mmap, others: dict[int, int]) -> None:
        self._words = memoryview(memory).cast("q")
        self._rank, self._size = rank, len(others) + 1
        self._number = 0
        self._alive = select.poll()  # a pidfd is readable when its process has ended
        self._others = others
        for pidfd in others:
            self._alive.register(pidfd, select.POLLIN)

    def send(self, vote: Vote) -> None:
        self._number += 1
        bits = (vote.saves_ended << 13) | (vote.reason << 2) | (vote.save_due << 1) | vote.ready
        self._words[2 * self._rank + self._number % 2] = (self._number % 2**20) << 43 | bits

    def receive(self) -> Vote:
        reason, save_due, ended, ready = 0, 0, 2**30, 1
        for rank in range(self._size):  # one pass, since nothing is in the CPU cache
            vote = self._read(rank)
            reason = max(reason, vote >> 2 & 0x7FF)
            save_due |= vote & 2
            ended = min(ended, vote >> 13)
            ready &= vote
        return Vote(reason, save_due > 0, ended, ready > 0)

    def _read(self, rank: int) -> int:
        slot, number = 2 * rank + self._number % 2, self._number % 2**20
        polls = 0
        while (word := self._words[slot]) >> 43 != number:
            polls += 1
            if polls < 50:
                time.sleep(20e-6)
            elif ended := [fd for fd, _ in self._alive.poll(1)]:
                if self._words[slot] >> 43 == number:
                    continue  # it voted before it exited
                raise RankEndedError(f"the process of rank {self._others[ended[0]]} has ended")
        return word & (2**43 - 1)


def _board(world: World) -> _Board | None:
    """Return a board if the ranks share a machine and a PID namespace. Collective."""
    if world.local_size != world.size or not hasattr(os, "pidfd_open"):
        return None
    size = 16 * world.size
    file = -1
    if world.rank == 0:
        with suppress(OSError):
            file = os.memfd_create("votes")  # without a name, so nothing is orphaned
            os.truncate(file, size)
    ranks = world.gather((_namespace(), os.getpid(), file))
    try:
        if file < 0:
            file = os.open(f"/proc/{ranks[0][1]}/fd/{ranks[0][2]}", os.O_RDWR)
        others = {os.pidfd_open(pid): r for r, (_, pid, _) in enumerate(ranks) if r != world.rank}
        board = _Board(world.rank, mmap.mmap(file, size), others)
    except OSError:
        board = None
    same = len({namespace for namespace, _, _ in ranks}) == 1
    usable = world.all(board is not None and same)
    if file >= 0:
        os.close(file)
    return board if usable else None


def _namespace() -> tuple[str, str]:
    """Return the machine and PID namespace, within which process ids are comparable."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        return boot.read().strip(), os.readlink("/proc/self/ns/pid")
    return "", ""
