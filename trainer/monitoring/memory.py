"""How much memory the training state takes on a rank, and how large a checkpoint of it is."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_EXTENTS = (2, 3, 5, 7, 11, 13)
"""Of the small parameters that are updated to see what an optimizer keeps of each axis."""
_GENERATORS_BYTES = 10_100
"""What a checkpoint holds of each rank: Python's, NumPy's and torch's generators, on the CPU."""


@dataclass(frozen=True)
class Sizes:
    """Of the training state, before the first step."""

    parameters: int
    trained: int
    weights_bytes: int
    """On this rank, buffers among them; so are the next two."""
    gradients_bytes: int
    optimizer_bytes: int | None
    """None: an optimizer of which we do not know what it keeps."""
    checkpoint_bytes: int | None


def measure(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    averages: Mapping[str, Tensor],
    world_size: int,
) -> Sizes:
    """Return the sizes. No communication; changes nothing.

    Args:
        model: the plain module, or one that `fully_shard` has cut.
        optimizers: of its parameters.
        averages: of weights, that a checkpoint holds too.
        world_size: number of ranks.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buffers_bytes = sum(buffer.nbytes for buffer in model.buffers())
    kept = [_kept(optimizer) for optimizer in optimizers]
    local = whole = None
    if None not in kept:
        known = [each for each in kept if each is not None]
        local, whole = sum(each[0] for each in known), sum(each[1] for each in known)
    stored = sum(map(_bytes, [*parameters, *averages.values()])) + buffers_bytes
    return Sizes(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in trained),
        weights_bytes=sum(_local(parameter).nbytes for parameter in parameters) + buffers_bytes,
        gradients_bytes=sum(_local(parameter).nbytes for parameter in trained),
        optimizer_bytes=local,
        checkpoint_bytes=None if whole is None else stored + whole + world_size * _GENERATORS_BYTES,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # the whole of a DTensor


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def _kept(optimizer: Optimizer) -> tuple[int, int] | None:
    """Return the bytes of an optimizer's state, on this rank and over all, after its first step.

    Small parameters of as many axes are updated by a twin; an axis of a state tensor that is as
    long as theirs will be as long as the real one. None: not one of torch's, or it does not say.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None  # a shallow twin of somebody else's could share what it updates
    here, everywhere = 0, 0
    for group in optimizer.param_groups:
        seen: dict[tuple[int, torch.dtype], list[Tensor] | None] = {}
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            kind = (parameter.ndim, parameter.dtype)
            if kind not in seen:
                seen[kind] = _state(optimizer, group, *kind)
            states = seen[kind]
            if states is None:
                return None
            here += _scaled(states, parameter.ndim, _local(parameter).shape)
            everywhere += _scaled(states, parameter.ndim, parameter.shape)
    return here, everywhere


def _state(
    optimizer: Optimizer, group: Mapping[str, Any], axes: int, dtype: torch.dtype
) -> list[Tensor] | None:
    """Return the state tensors of a parameter of `_EXTENTS`."""
    if axes > len(_EXTENTS) or not dtype.is_floating_point:
        return None
    small = nn.Parameter(torch.zeros(_EXTENTS[:axes], dtype=dtype))
    small.grad = torch.zeros_like(small)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": [small], "fused": None, "foreach": False, "capturable": False}
    ]
    try:
        twin.step()
    except (TypeError, ValueError, RuntimeError, KeyError):  # LBFGS needs a closure
        return None
    return [value for value in twin.state[small].values() if isinstance(value, Tensor)]


def _scaled(states: Sequence[Tensor], axes: int, shape: Sequence[int]) -> int:
    small = _EXTENTS[:axes]
    total = 0
    for state in states:
        if state.ndim == axes:
            extents = [
                real if have == little else have
                for real, have, little in zip(shape, state.shape, small, strict=True)
            ]
        else:
            extents = list(state.shape)
        total += prod(extents) * state.element_size()
    return total
