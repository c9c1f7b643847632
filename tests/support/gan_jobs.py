"""Jobs with two phases: a discriminator and a generator."""

import torch
from support.loop_jobs import Lines, a_job
from torch.utils.data import TensorDataset

from models.dcgan import DCGAN
from trainer.cluster.world import World
from trainer.config.schema import Parallel
from trainer.core import rng
from trainer.data.source import EvalStream, TrainStream
from trainer.task import Adversarial
from trainer.training import parallel, parameters
from trainer.training.ema import Ema
from trainer.training.job import Phase

RATES = {"discriminator": 0.02, "generator": 0.01}


def images(count=43):
    pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return TensorDataset(pixels, torch.zeros(count, dtype=torch.int64))


def net():
    torch.manual_seed(0)
    return DCGAN([1, 8, 8], latent=3, width=4)


def adam(phase, params):
    return torch.optim.Adam(params, lr=RATES[phase], betas=(0.5, 0.999))


def phased(job, options=None, *, make=adam, schedule=None, stated=Adversarial.phases):
    """Give a job phases, as build.py does from a configuration."""
    names, _ = parameters.phases(job.model, stated)
    wrapped = parallel.wrap_phases(job.model, job.world, options or Parallel(), names)
    by_name = dict(job.model.named_parameters())
    optimizers = {phase: make(phase, [by_name[n] for n in group]) for phase, group in names.items()}
    job.phases = [
        Phase(
            name=phase,
            wrapped=wrapped[phase],
            optimizer=optimizer,
            scheduler=schedule(optimizer) if schedule else None,
        )
        for phase, optimizer in optimizers.items()
    ]
    return job


def gan_job(accumulate=1, ema_decay=None, schedule=None, **changes):
    data = images()
    defaults = {
        "task": Adversarial(),
        "data": TrainStream(data, World(), 5, 8, accumulate),
        "evaluation": EvalStream(data, World(), 5),
        "tracker": Lines(),
    }
    job = phased(a_job(model=net(), **{**defaults, **changes}), schedule=schedule)
    job.ema = Ema(job.model, ema_decay) if ema_decay is not None else None
    rng.seed_all(7)
    return job
