"""Stalled, failed and lost ranks: the reports that the other ranks receive."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from trainer.cluster.watchdog import Watchdog
from trainer.cluster.world import World


class Exited(Exception):
    """Raised in place of the exit of a real process."""


class Watched:
    """A rank with a watchdog that records the reason instead of exiting."""

    def __init__(self, world: World, watchdog_s=None, peer_timeout_s=2.0) -> None:
        self.boundaries = 0
        self.stacks, self.reasons = [], []
        self.exited = threading.Event()
        self.watchdog = Watchdog(
            world,
            boundaries=lambda: self.boundaries,
            watchdog_s=watchdog_s,
            peer_timeout_s=peer_timeout_s,
            write_stacks=self.stacks.append,
            exit_process=self._exit,
            session="test",
        )

    def _exit(self, text: str) -> None:
        self.reasons.append(text)
        self.exited.set()
        raise Exited


def oversleeps(world: World):
    """Rank 1 stalls in a step; the others wait for it in a collective."""
    watched = Watched(world, watchdog_s=1.0, peer_timeout_s=30.0)
    for _ in range(3):
        dist.all_reduce(torch.zeros(1))
        watched.boundaries += 1
    if world.rank == 1:
        falls_asleep(watched.exited)
    dist.all_reduce(torch.zeros(1))
    assert watched.exited.wait(60)
    return watched.reasons, len(watched.stacks), "falls_asleep" in watched.stacks[0]


def falls_asleep(until: threading.Event) -> None:
    until.wait(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_watchdog_names_stalled_rank_and_writes_all_stacks(on_ranks):
    answers = on_ranks(3, oversleeps)
    for (reason,), stacks, _ in answers:
        assert reason.startswith("no step for 1 s (launch.watchdog_s). Behind: rank 1 (process ")
        assert "rank 0" not in reason
        assert "rank 2" not in reason
        assert stacks == 1
    assert [asleep for *_, asleep in answers] == [False, True, False]


def stops(world: World, lost: int, folder: str):
    """A rank stops like a machine without power: no report, no closed connection."""
    watched = Watched(world)
    dist.barrier()
    if world.rank == lost:
        pid = os.getpid()
        if os.fork() == 0:  # resumes the stopped process, so that the test ends
            while not os.path.exists(f"{folder}/over"):
                time.sleep(0.05)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)
        return None
    assert watched.exited.wait(60)
    if world.rank == 2:
        open(f"{folder}/over", "w").close()
    return watched.reasons


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_watchdog_reports_stopped_rank_as_lost(on_ranks, tmp_path, lost):
    answers = on_ranks(3, stops, lost, str(tmp_path))
    for rank, reasons in enumerate(answers):
        if rank != lost:
            assert f"rank {lost} " in reasons[0]
            assert "was lost" in reasons[0]


def is_suspended(world: World, seconds: float):
    """All ranks stop at once and continue later, as with `scontrol suspend`."""
    watched = Watched(world, watchdog_s=2.0)
    pids = world.gather(os.getpid())
    if world.rank == 0 and os.fork() == 0:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    longest_s = 0.0
    while longest_s < seconds / 2:  # until the pause is over
        before = time.monotonic()
        time.sleep(0.01)
        longest_s = time.monotonic() - before
    for _ in range(20):  # as many checks of the watchdog
        watched.boundaries += 1
        if watched.exited.wait(0.1):
            break
    watched.watchdog.stop()
    return watched.reasons


def test_watchdog_leaves_out_the_time_of_suspended_ranks(on_ranks):
    assert on_ranks(2, is_suspended, 4.0) == [[], []]


def breaks(world: World, reports: bool):
    """Rank 1 exits during a collective of the other ranks."""
    watched = Watched(world, peer_timeout_s=30.0)
    if world.rank == 1:
        if reports:
            watched.watchdog.report_failure("ValueError: bad")
            watched.watchdog.report_closed()
        os._exit(0)
    try:
        for _ in range(100):
            dist.all_reduce(torch.zeros(1000))
    except RuntimeError as error:
        assert watched.watchdog.explain(ValueError("unrelated")) is None
        misuse = RuntimeError("[enforce fail at gloo/pair.cc:440] op.preamble.length <= op.nbytes")
        assert watched.watchdog.explain(misuse) is None  # it would come again
        explained = watched.watchdog.explain(error)
        watched.watchdog.stop()
        return type(explained).__name__, str(explained)


@pytest.mark.parametrize("reports", [True, False])
def test_explain_returns_peer_error_for_broken_connection_only(on_ranks, reports):
    answers = on_ranks(3, breaks, reports, dying=[1])
    for kind, text in (answers[0], answers[2]):
        if reports:
            assert (kind, text) == ("PeerFailedError", "rank 1 failed: ValueError: bad")
        else:
            assert kind == "PeerLostError"
            assert "rank 1 (process" in text


def test_watchdog_on_one_rank_names_stalled_line():
    watched = Watched(World(), watchdog_s=0.3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading, "excepthook", lambda arguments: None)
        falls_asleep(watched.exited)
        watched.watchdog.stop()
    assert watched.reasons[0].startswith("no step for 0 s (launch.watchdog_s). Behind: rank 0 (")
    assert "falls_asleep" in watched.reasons[0] or "threading.py" in watched.reasons[0]
    assert "falls_asleep" in watched.stacks[0]


def test_watchdog_while_steps_advance_stays_quiet():
    watched = Watched(World(), watchdog_s=0.5)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        watched.boundaries += 1
        time.sleep(0.01)
    watched.watchdog.stop()
    assert watched.reasons == []
