"""Ranks that stand still, fail or vanish: what the others learn of it, and how soon."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from trainer.cluster.world import World
from trainer.cluster.watchdog import Watchdog


class Left(Exception):
    """Where a real process would have ended."""


class Watched:
    """A rank with a watchdog that tells instead of ending the process."""

    def __init__(self, world: World, watchdog_s=None, peer_timeout_s=2.0) -> None:
        self.boundaries = 0
        self.stacks, self.reasons = [], []
        self.left = threading.Event()
        self.watchdog = Watchdog(
            world,
            boundaries=lambda: self.boundaries,
            watchdog_s=watchdog_s,
            peer_timeout_s=peer_timeout_s,
            leave_stacks=self.stacks.append,
            leave=self._leave,
            session="test",
        )

    def _leave(self, text: str) -> None:
        self.reasons.append(text)
        self.left.set()
        raise Left


def oversleeps(world: World):
    """Rank 1 falls asleep in a step; the others wait for it in a collective."""
    watched = Watched(world, watchdog_s=1.0, peer_timeout_s=30.0)
    for _ in range(3):
        dist.all_reduce(torch.zeros(1))
        watched.boundaries += 1
    if world.rank == 1:
        falls_asleep(watched.left)
    dist.all_reduce(torch.zeros(1))
    assert watched.left.wait(60)
    return watched.reasons, len(watched.stacks), "falls_asleep" in watched.stacks[0]


def falls_asleep(until: threading.Event) -> None:
    until.wait(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_stands_still_is_named_and_all_leave_their_stacks(on_ranks):
    answers = on_ranks(3, oversleeps)
    for (reason,), stacks, _ in answers:
        assert reason.startswith("no step for 1 s (launch.watchdog_s). Behind: rank 1 (process ")
        assert "rank 0" not in reason
        assert "rank 2" not in reason
        assert stacks == 1
    assert [asleep for *_, asleep in answers] == [False, True, False]


def vanishes(world: World, who: int, folder: str):
    """A rank stops like a machine without power: no word, no closed connection."""
    watched = Watched(world)
    dist.barrier()
    if world.rank == who:
        pid = os.getpid()
        if os.fork() == 0:  # somebody has to wake it up, so that the test ends
            while not os.path.exists(f"{folder}/over"):
                time.sleep(0.05)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)
        return None
    assert watched.left.wait(60)
    if world.rank == 2:
        open(f"{folder}/over", "w").close()
    return watched.reasons


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_vanishes_is_left_behind(on_ranks, tmp_path, who):
    answers = on_ranks(3, vanishes, who, str(tmp_path))
    for rank, reasons in enumerate(answers):
        if rank != who:
            assert f"rank {who} " in reasons[0]
            assert "was lost" in reasons[0]


def breaks(world: World, says_so: bool):
    """Rank 1 leaves in the middle of a collective of the others."""
    watched = Watched(world, peer_timeout_s=30.0)
    if world.rank == 1:
        if says_so:
            watched.watchdog.failed("ValueError: bad")
            watched.watchdog.gone()
        os._exit(0)
    try:
        for _ in range(100):
            dist.all_reduce(torch.zeros(1000))
    except RuntimeError as error:
        assert watched.watchdog.explain(ValueError("of my own")) is None
        explained = watched.watchdog.explain(error)
        watched.watchdog.stop()
        return type(explained).__name__, str(explained)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_broken_connection_is_told_apart_from_an_error_of_ones_own(on_ranks, says_so):
    answers = on_ranks(3, breaks, says_so, dying=[1])
    for kind, text in (answers[0], answers[2]):
        if says_so:
            assert (kind, text) == ("PeerFailedError", "rank 1 failed: ValueError: bad")
        else:
            assert kind == "PeerLostError"
            assert "rank 1 (process" in text


def test_on_one_rank_it_tells_where_the_training_stands():
    watched = Watched(World(), watchdog_s=0.3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading, "excepthook", lambda arguments: None)
        falls_asleep(watched.left)
        watched.watchdog.stop()
    assert watched.reasons[0].startswith("no step for 0 s (launch.watchdog_s). Behind: rank 0 (")
    assert "falls_asleep" in watched.reasons[0] or "threading.py" in watched.reasons[0]
    assert "falls_asleep" in watched.stacks[0]


def test_as_long_as_the_training_moves_nobody_leaves():
    watched = Watched(World(), watchdog_s=0.5)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        watched.boundaries += 1
        time.sleep(0.01)
    watched.watchdog.stop()
    assert watched.reasons == []
