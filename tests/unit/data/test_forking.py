"""A data worker that a fork leaves hanging is replaced."""

import os
import subprocess
import sys

import pytest

from tests.support.run_commands import ROOT
from trainer.data import forking

SCRIPT = """
import ctypes, os, sys, threading, time
import torch
from trainer.data import forking
from trainer.data.feed import Feed, Item

forking._START_S = 1.0
attempts = []
os.register_at_fork(
    before=lambda: attempts.append(1),
    after_in_child=lambda: len(attempts) in {hanging} and time.sleep(1e6),
)
make = lambda key: Item(torch.full((2,), key))
try:
    feed = Feed(make, iter(range(8)), device=torch.device("cpu"), workers=2)
    print([int(item[0]) for item in feed])
finally:
    print(len(attempts))
"""


def run(hanging):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hanging=hanging)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_worker_that_hangs_in_its_fork_is_replaced():
    done = run({1, 3})
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3, 4, 5, 6, 7]\n4\n", "")


def test_workers_that_always_hang_are_an_error():
    done = run(set(range(10)))
    assert done.stdout == "5\n"
    assert "WorkerLostError: 5 data workers in a row did not start within 1 s" in done.stderr


def test_failed_fork_leaves_no_descriptor_open(monkeypatch):
    def fail():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", os.fork)  # restored after the test
    monkeypatch.setattr(forking, "_plain_fork", fail)
    before = os.listdir("/proc/self/fd")
    with forking.verified_forks(), pytest.raises(BlockingIOError):
        os.fork()
    assert os.listdir("/proc/self/fd") == before


def test_fork_is_the_plain_one_outside_of_the_context():
    with forking.verified_forks():
        assert os.fork is not forking._plain_fork
    assert os.fork is forking._plain_fork
