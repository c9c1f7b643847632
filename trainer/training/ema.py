"""Exponential moving average of the trained weights, for evaluation and export."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.training import parallel


class Ema:
    """Averages of the trained parameters, on the parameters' devices and sharded like them.

    After each update: average = decay * average + (1 - decay) * parameter (B. Polyak and
    A. Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim.
    1992, with exponential weights). Buffers are not averaged: an evaluation uses the model's.

    Args:
        model: the plain module, or one sharded by `fully_shard`; its parameters are referenced.
        decay: weight of the old average in an update, 0 … 1.
        wrapped: the module that training calls, if not the model itself.
    """

    def __init__(self, model: nn.Module, decay: float, wrapped: nn.Module | None = None) -> None:
        self._wrapped = wrapped or model
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._blend = get_ema_multi_avg_fn(decay)
        self.averages = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self) -> None:
        """Update the averages with the present parameters. No communication."""
        if self.averages:  # local parts: each operation on a DTensor costs more
            live = [parallel.local_part(p.detach()) for p in self._live.values()]
            self._blend([parallel.local_part(a) for a in self.averages.values()], live, 0)

    def restart(self) -> None:
        """Reset every average to its parameter."""
        with torch.no_grad():
            for name, parameter in self._live.items():
                self.averages[name].copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Temporarily swap the averaged weights into the model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        parallel.reshard(self._wrapped)  # a gathered copy would keep the old values
        with torch.no_grad():
            for name, parameter in self._live.items():
                live = parameter.detach().clone()
                parameter.copy_(self.averages[name])
                self.averages[name].copy_(live)
