"""An exponential moving average of the weights, that is evaluated and can be exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.training import parallel

PREFIX = "ema."
"""Before the parameter's name, in checkpoints."""


class Ema:
    """Averages of the parameters that are trained; each lies where its parameter does.

    After each update: average = decay * average + (1 - decay) * parameter (B. Polyak and
    A. Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim.
    1992, with exponential weights). Buffers are not averaged: an evaluation uses the model's.

    Args:
        model: the plain module, or one that `fully_shard` has cut; its parameters are referred to.
        decay: share of the old average that is left after an update, 0 … 1.
        wrapped: what training calls, where that is not the model itself.
    """

    def __init__(self, model: nn.Module, decay: float, wrapped: nn.Module | None = None) -> None:
        self._wrapped = wrapped or model
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._blend = get_ema_multi_avg_fn(decay)
        self.averages = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self) -> None:
        """Take the parameters as they are now into the averages. No communication."""
        if self.averages:
            live = [_local(parameter.detach()) for parameter in self._live.values()]
            self._blend([_local(average) for average in self.averages.values()], live, 0)

    def restart(self) -> None:
        """Let every average be its parameter, as at the beginning."""
        with torch.no_grad():
            for name, parameter in self._live.items():
                self.averages[name].copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages as its parameters for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        parallel.reshard(self._wrapped)  # what was gathered is another copy
        with torch.no_grad():
            for name, parameter in self._live.items():
                held = parameter.detach().clone()
                parameter.copy_(self.averages[name])
                self.averages[name].copy_(held)


def _local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; each operation on a DTensor costs more."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
