"""Stop on one rank: signals, deadlines and missing data (several ranks: tests/dist)."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.cluster.early_stop import watch_arrivals
from trainer.cluster.stop import DEADLINE, Stop, reason_text, signal_problems
from trainer.cluster.world import World


@pytest.fixture
def stop():
    stop = Stop(World(), grace_s=50.0)
    stop.listen(["SIGUSR1", "SIGUSR2"])
    yield stop
    stop.restore_handlers()


def test_agree_returns_signal_from_next_boundary_on(stop):
    assert stop.agree().reason == stop.reason == 0
    signal.raise_signal(signal.SIGUSR2)
    assert stop.agree().reason == stop.reason == signal.SIGUSR2
    assert stop.agree().reason == signal.SIGUSR2
    assert reason_text(stop.reason) == "SIGUSR2"
    assert stop.boundaries == 3


def test_remaining_s_counts_from_first_signal(stop):
    assert stop.remaining_s is None
    signal.raise_signal(signal.SIGUSR1)
    while stop.remaining_s is None:  # a thread records the time
        pass
    first = stop.remaining_s
    assert 0 < first < 50.0
    signal.raise_signal(signal.SIGUSR1)  # does not restart it
    assert stop.remaining_s <= first


def test_signal_of_the_loop_does_not_reach_an_earlier_watch():
    """The early stop would end the process with 75, although the loop has dealt with the signal."""
    earlier = []
    end_earlier = watch_arrivals(earlier.append)
    others = set(threading.enumerate())
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    (thread,) = set(threading.enumerate()) - others
    signal.raise_signal(signal.SIGUSR1)
    stop.restore_handlers()
    thread.join()
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.raise_signal(signal.SIGUSR1)  # received by the earlier watch alone
    while not earlier:
        time.sleep(0.001)
    signal.signal(signal.SIGUSR1, previous)
    end_earlier()
    assert earlier == [signal.SIGUSR1]


def test_agree_returns_deadline_as_reason():
    stop = Stop(World(), deadline=lambda reserve_s: stop.boundaries >= 3)
    assert [stop.agree().reason for _ in range(3)] == [0, 0, DEADLINE]
    assert reason_text(stop.reason) == "deadline"
    assert stop.remaining_s is None


def test_agree_waits_for_data(stop):
    arrived = threading.Event()
    counts = []

    def has(count):
        counts.append(count)
        if len(counts) == 5:
            arrived.set()
        return arrived.is_set()

    vote = stop.agree(has)
    assert vote.ready
    assert not vote.reason
    assert len(counts) >= 5


def test_agree_signal_ends_wait_for_data(stop):
    def has(count):
        signal.raise_signal(signal.SIGUSR1)
        return False

    assert stop.agree(has).reason == signal.SIGUSR1


def test_restore_handlers_restores_previous_state():
    before = signal.getsignal(signal.SIGUSR1)
    threads = threading.active_count()
    for _ in range(3):
        stop = Stop(World())
        stop.listen(["SIGUSR1"])
        stop.restore_handlers()
    assert signal.getsignal(signal.SIGUSR1) is before
    until = time.monotonic() + 30
    while threading.active_count() > threads:
        assert time.monotonic() < until


def test_signal_problems_returns_unusable_names():
    assert signal_problems(["SIGTERM", "SIGKILL", "TERM", "SIGUSR1"]) == ["SIGKILL", "TERM"]


HANGS = """
import time
from trainer.cluster.world import World
from trainer.cluster.stop import Stop
stop = Stop(World())
stop.listen(["SIGINT"], interrupts_end=True)
print("ready", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize("at_terminal", [True, False])
def test_second_interrupt_exits_at_terminal_only(at_terminal):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        stdin=follower if at_terminal else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            if not at_terminal:
                continue
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert b"second Ctrl-C" in process.stderr.read()
            break
    finally:
        process.kill()
        process.communicate(timeout=60)
        os.close(leader)
        os.close(follower)
