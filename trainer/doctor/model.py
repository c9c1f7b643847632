"""The size of a run's state, from a model that has no memory."""

from dataclasses import dataclass

import torch
from torch import nn

from trainer import build
from trainer.config import Run
from trainer.terminal import size


@dataclass(frozen=True)
class Sizes:
    """Bytes of a run's state, over all ranks."""

    parameters: int
    weight_bytes: int
    """Of parameters and buffers."""
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, but for what is small."""
        return self.weight_bytes + self.optimizer_bytes

    def text(self) -> str:
        """Return what a person reads."""
        return (
            f"{self.parameters:,} parameters: weights {size(self.weight_bytes)}, gradients "
            f"{size(self.gradient_bytes)}, optimizer {size(self.optimizer_bytes)}; a checkpoint "
            f"{size(self.checkpoint_bytes)}"
        )


def sizes(run: Run) -> Sizes | None:
    """Return the sizes of a run's state; None where its model cannot be built on meta."""
    try:
        with torch.device("meta"):
            model = build.make(run.model, "model")
    except (NotImplementedError, RuntimeError):  # it computes with its weights, or loads them
        return None
    if not isinstance(model, nn.Module):
        return None
    parameters = list(model.parameters())
    weights = [*parameters, *model.buffers()]
    copies = _state_tensors(run)
    return Sizes(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(t.numel() * t.element_size() for t in weights),
        gradient_bytes=sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        optimizer_bytes=copies * sum(p.numel() * p.element_size() for p in parameters),
    )


def _state_tensors(run: Run) -> int:
    """Return how many tensors of a parameter's shape the optimizer keeps for each."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    node = {key: value for key, value in run.optimizer.items() if key not in ("groups", "phases")}
    optimizer = build.make(node, "optimizer", [parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == (2, 2) for value in state)
