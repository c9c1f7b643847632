"""A start that takes longer than the grace time after a signal."""

import signal
import threading

import pytest

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.training.late_start import ending_late_start


@pytest.fixture
def stop():
    stop = Stop(World(), grace_s=0.5)
    stop.listen(["SIGUSR1"])
    yield stop
    stop.restore_handlers()


def test_signal_ends_a_start_that_does_not_reach_its_first_boundary(stop):
    ended = threading.Event()
    with ending_late_start(stop, ended.set):
        signal.raise_signal(signal.SIGUSR1)
        assert ended.wait(30)


@pytest.mark.parametrize("signals", [True, False])
def test_start_that_reaches_a_boundary_or_has_no_signal_goes_on(stop, signals):
    ended = threading.Event()
    with ending_late_start(stop, ended.set):
        if signals:
            stop.agree()
            signal.raise_signal(signal.SIGUSR1)
        assert not ended.wait(1.5)
