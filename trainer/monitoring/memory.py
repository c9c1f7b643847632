"""Memory of the training state on one rank, and the size of its checkpoint."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer

from trainer.checkpoint import plan

_RNG_BYTES = 10_100
"""Size of one rank's generator states (Python, NumPy, torch on the CPU) in a checkpoint, bytes."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the training state after the first step."""

    parameters: int
    trained: int
    """Parameters that require gradients."""
    weights_bytes: int
    """Parameters and buffers on this rank."""
    gradients_bytes: int
    """Gradients on this rank."""
    optimizer_bytes: int | None
    """Optimizer state on this rank; None: an optimizer whose state is unknown."""
    checkpoint_bytes: int | None
    """A checkpoint of all ranks; None: the optimizer's state is unknown."""


def measure(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    averages: Mapping[str, Tensor],
    world_size: int,
) -> Sizes:
    """Return the sizes. Changes nothing; not collective.

    Args:
        model: the plain module, or one after `fully_shard`.
        optimizers: the optimizers of its parameters.
        averages: averaged weights, which a checkpoint contains too.
        world_size: number of ranks.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buffers_bytes = sum(buffer.nbytes for buffer in model.buffers())
    local_bytes = _state_bytes(optimizers, local=True)
    global_bytes = _state_bytes(optimizers, local=False)
    checkpoint_bytes = None
    if global_bytes is not None:
        stored_bytes = sum(map(_global_bytes, [*parameters, *averages.values()])) + buffers_bytes
        checkpoint_bytes = stored_bytes + global_bytes + world_size * _RNG_BYTES
    return Sizes(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in trained),
        weights_bytes=sum(plan.local(parameter).nbytes for parameter in parameters) + buffers_bytes,
        gradients_bytes=sum(plan.local(parameter).nbytes for parameter in trained),
        optimizer_bytes=local_bytes,
        checkpoint_bytes=checkpoint_bytes,
    )


def _global_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a DTensor: over all ranks


def _state_bytes(optimizers: Sequence[Optimizer], *, local: bool) -> int | None:
    """Return the optimizers' state size after one step, from fake tensors; None: unknown."""
    total = 0
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            return None  # a copy of a third-party optimizer may share what it updates
        for group in optimizer.param_groups:
            sizes: dict[tuple[Sequence[int], torch.dtype], int] = {}
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                shape = (plan.local(parameter) if local else parameter).shape
                kind = (shape, parameter.dtype)
                try:
                    if kind not in sizes:
                        sizes[kind] = _step_fake(optimizer, group, *kind)
                except (TypeError, ValueError, RuntimeError, KeyError):  # LBFGS needs a closure
                    return None
                total += sizes[kind]
    return total


def _step_fake(
    optimizer: Optimizer, group: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Step a copy of `optimizer` on a fake parameter; return the size of its state, bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
        parameter.grad = torch.empty_like(parameter)
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        options = {"fused": None, "foreach": False, "capturable": False}
        twin.param_groups = [{**group, "params": [parameter], **options}]
        # The state exists before the update, which in some optimizers depends on values.
        with suppress(DataDependentOutputException):
            twin.step()
        state = twin.state[parameter].values()
    return sum(_global_bytes(value) for value in state if isinstance(value, Tensor))
