"""Jobs built and trained without Hydra in one process, and their complete training state."""

from contextlib import suppress

import torch
from support.savers import a_saver_for
from torch import nn

from trainer.checkpoint import lineage
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.data.source import EvalStream, TrainStream
from trainer.data.synthetic import Synthetic
from trainer.storage import open_store
from trainer.task import Classification
from trainer.tracking.several import Silent
from trainer.training import loop, resume
from trainer.training.contents import collect
from trainer.training.job import Job, Phase

BEGINNING = {"epoch": 0, "batch": 0}
BATCH = 8
PER_EPOCH = 5  # 43 samples
DATA = Synthetic((6,), classes=3, train_samples=43, eval_samples=23, seed=1)


class Net(nn.Module):
    """Network whose steps depend on more than their batch: BatchNorm and dropout."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.body(x)


class Lines(Silent):
    """Tracker that keeps all logged lines."""

    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(dict(line))

    def of(self, split):
        return [line for line in self.lines if line["split"] == split]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def a_job(*, model=None, optimizer=sgd, schedule=None, dataset=DATA, accumulate=1, **changes):
    """Build a job by hand, as build.py does from a configuration."""
    torch.manual_seed(0)
    model = model or Net()
    built_optimizer = optimizer(model)
    rng.seed_all(7)
    defaults = {
        "task": Classification(),
        "data": TrainStream(dataset.train, World(), 5, BATCH, accumulate),
        "evaluation": EvalStream(dataset.eval, World(), 5),
        "tracker": Lines(),
        "max_steps": 12,
        "eval_every": Every(),
        "log_every_steps": 1,
    }  # fmt: skip
    return Job(
        world=World(),
        model=model,
        phases=[
            Phase(
                wrapped=model,
                optimizer=built_optimizer,
                scheduler=schedule(built_optimizer) if schedule else None,
            )
        ],
        **{**defaults, **changes},
    )


class Prompt(Saver):
    """Saver that waits for each save; otherwise these short steps would pass later due saves."""

    def at_boundary(self, state, collect, **votes):
        super().at_boundary(state, collect, **votes)
        if self._flight is not None:
            with suppress(Exception):  # raised again at the next boundary
                self._flight.save.result()


def a_saver(folder, start=None, *, every=None, store=None, kind=Prompt, **settings):
    """Begin an attempt of the run in `folder`, resumed from `start` if given."""
    store = store or open_store(str(folder))
    attempt = lineage.begin(store, {"resume": "auto"})
    origin = {"step": start.step if start else 0, "attempt": None}
    lineage.amend(store, attempt, {"resumed_from": origin})
    retention = Retention(store, attempt, keep_last=100)
    resumed = start is not None and start.manifest is not None
    settings = {"retention": retention, "every": every or Every(), **settings}
    return a_saver_for(
        store, attempt, kind=kind, resumed_step=start.step if resumed else None, **settings
    )


def go_on(folder, job, *, stop=None, **settings):
    """Resume training from the newest checkpoint; return (state, whether it is finished)."""
    run = Run(name="a", run_dir=str(folder))
    start = resume.choose(Replicas(open_store(str(folder))), run, {})
    saver = a_saver(folder, start, **settings)
    if start.manifest is not None:
        rng.seed_all(999)  # the checkpoint alone decides
    state = resume.load(job, start)
    return state, loop.train(job, state, saver, stop or Stop(World()))


def saved_steps(folder):
    return [commit.step for commit in lineage.commits(open_store(str(folder)))]


def everything(job, state):
    """Return the complete training state, in a form that compares bit for bit."""
    content = collect(job, state)
    tensors = {name: (t.dtype, t.numpy().tobytes()) for name, t in content.tensors.items()}
    return tensors, repr(content.objects)


def without_times(lines):
    return [
        {k: v for k, v in line.items() if k != "time" and not k.endswith(("_s", "_per_s"))}
        for line in lines
    ]
