"""Weights of an evaluation: the trained ones, their moving averages, or those of an optimizer.

An optimizer with `train()` and `eval()`, such as a schedule-free one, trains other weights than it
is evaluated with, and moves the parameters from one to the other (A. Defazio et al., The road less
scheduled, 2024, eq. 3 to 5). It is in training mode from its construction on; checkpoints hold the
trained weights, and the evaluated ones as averages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.training import parallel
from trainer.training.job import Job


def has_modes(optimizer: Any) -> bool:
    """Return whether an optimizer has a training and an evaluation mode."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def averaged_parameters(job: Job) -> dict[str, Tensor]:
    """Return the parameters that an optimizer's evaluation mode replaces, by name."""
    ids = {id(p) for o in _with_modes(job) for group in o.param_groups for p in group["params"]}
    return {name: p for name, p in job.model.named_parameters() if id(p) in ids}


@contextmanager
def evaluation_weights(job: Job) -> Iterator[None]:
    """Temporarily put the weights of an evaluation into the model; restored bit by bit.

    Needs memory for one more copy of the weights, if an optimizer has modes.
    """
    if job.ema is not None:
        with job.ema.in_place():
            yield
        return
    optimizers = _with_modes(job)
    live = list(averaged_parameters(job).values())
    trained = [parameter.detach().clone() for parameter in live]
    _set_mode(job, optimizers, "eval")
    try:
        yield
    finally:
        _set_mode(job, optimizers, "train")
        with torch.no_grad():  # the way back by arithmetic is not exact
            for parameter, value in zip(live, trained, strict=True):
                parameter.copy_(value)


def _set_mode(job: Job, optimizers: Sequence[Any], mode: str) -> None:
    for optimizer in optimizers:
        getattr(optimizer, mode)()
    for phase in job.phases if optimizers else ():
        parallel.reshard(phase.wrapped)  # a gathered copy would keep the old values


def _with_modes(job: Job) -> list[Optimizer]:
    return [phase.optimizer for phase in job.phases if has_modes(phase.optimizer)]
