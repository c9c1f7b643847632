"""Signals, deadlines and waiting for data, on one rank; several ranks: tests/dist."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.cluster.stop import DEADLINE, Stop, reason_text, signal_problems
from trainer.cluster.world import World


@pytest.fixture
def stop():
    made = Stop(World(), grace_s=50.0)
    made.listen(["SIGUSR1", "SIGUSR2"])
    yield made
    made.restore_handlers()


def test_a_signal_is_known_at_the_next_boundary_and_stays(stop):
    assert stop.agree().reason == stop.reason == 0
    signal.raise_signal(signal.SIGUSR2)
    assert stop.agree().reason == stop.reason == signal.SIGUSR2
    assert stop.agree().reason == signal.SIGUSR2
    assert reason_text(stop.reason) == "SIGUSR2"
    assert stop.boundaries == 3


def test_the_grace_time_runs_from_the_signals_arrival(stop):
    assert stop.left_s is None
    signal.raise_signal(signal.SIGUSR1)
    while stop.left_s is None:  # a thread takes the time
        pass
    first = stop.left_s
    assert 0 < first < 50.0
    signal.raise_signal(signal.SIGUSR1)  # does not begin it anew
    assert stop.left_s <= first


def test_a_deadline_is_a_reason_like_a_signal():
    stop = Stop(World(), deadline=lambda reserve_s: stop.boundaries >= 3)
    assert [stop.agree().reason for _ in range(3)] == [0, 0, DEADLINE]
    assert reason_text(stop.reason) == "deadline"
    assert stop.left_s is None


def test_data_that_does_not_come_is_waited_for_until_it_does(stop):
    arrived = threading.Event()
    asked = []

    def has(count):
        asked.append(count)
        if len(asked) == 5:
            arrived.set()
        return arrived.is_set()

    vote = stop.agree(has)
    assert vote.ready
    assert not vote.reason
    assert len(asked) >= 5


def test_a_signal_ends_the_waiting_for_data(stop):
    def has(count):
        signal.raise_signal(signal.SIGUSR1)
        return False

    assert stop.agree(has).reason == signal.SIGUSR1


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGUSR1)
    threads = threading.active_count()
    for _ in range(3):
        made = Stop(World())
        made.listen(["SIGUSR1"])
        made.restore_handlers()
    assert signal.getsignal(signal.SIGUSR1) is before
    until = time.monotonic() + 30
    while threading.active_count() > threads:
        assert time.monotonic() < until


def test_names_that_are_no_signals_to_handle_are_found():
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
def test_at_a_terminal_a_second_interrupt_ends_the_process_at_once(at_terminal):
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
