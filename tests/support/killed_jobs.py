"""Jobs that die in the middle of training, and the oracle of their resume."""

import pytest
from support.loop_jobs import a_saver, everything, go_on, saved_steps

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.task import Classification
from trainer.training import loop


class KilledError(Exception):
    pass


class Deadly(Classification):
    """Raises at a given call, in training or in evaluation."""

    def __init__(self, call, *, training=True):
        super().__init__()
        self.remaining, self.training = call, training

    def loss(self, model, batch):
        self.remaining -= model.training == self.training
        if self.remaining == 0:
            raise KilledError
        return super().loss(model, batch)


def resumed_like_undisturbed(folder, job, deadly, *, every):
    """Train without and with a death, resume, and compare all state; return the resumed job.

    Args:
        folder: an empty folder.
        job: called with changes; returns a new job.
        deadly: the task of the job that dies.
        every: steps between two saves.
    """
    undisturbed, state = job(), State()
    loop.train(undisturbed, state, a_saver(folder / "a"), Stop(World()))
    saver = a_saver(folder / "b", every=Every(steps=every))
    with pytest.raises(KilledError):
        loop.train(job(task=deadly), State(), saver, Stop(World()))
    assert saved_steps(folder / "b")
    again = job()
    its_state, finished = go_on(folder / "b", again, every=Every(steps=every))
    assert finished
    assert everything(again, its_state) == everything(undisturbed, state)
    return again
