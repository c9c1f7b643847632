"""Conversion of training state to named tensors and plain values, and back.

Names come from a walk over model and optimizer: `model.<name>`, `optimizer.<name>.<key>`,
`rng.<rank>.<generator>`. torch's `get_optimizer_state_dict` is not used, because it calls
`step` on an optimizer without state.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.checkpoint.values import TensorRef
from trainer.core import nested
from trainer.errors import CheckpointError


@dataclass
class Content:
    """State that one rank contributes to a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that every rank has, in the same order: plain tensors, equal on all ranks and
    written once, or DTensors."""
    rank_local: dict[str, Tensor] = field(default_factory=dict)
    """Plain tensors under names that no other rank uses."""
    deferrable: set[str] = field(default_factory=set)
    """Names in `tensors` that are constant, or changed only by `Optimizer.step`. They may be copied
    during the next forward and backward; all others are copied immediately."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names of tied tensors: the name under which each one is stored."""
    objects: dict[str, Any] = field(default_factory=dict)
    """Values that are not tensors. Only rank 0's are stored."""


def split(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move every tensor inside `value` to `tensors`, leaving a TensorRef in its place.

    Raises:
        CheckpointError: two tensors would get the same name, as in {1: …, "1": …}.
    """
    if isinstance(value, Tensor):
        if prefix in tensors:
            raise CheckpointError(
                f"two tensors of the state would be stored as {prefix!r}; rename one of them"
            )
        tensors[prefix] = value.detach()
        return TensorRef(prefix)
    if type(value) in (list, tuple):
        items = [split(item, f"{prefix}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else tuple(items)
    if type(value) is dict and any(
        isinstance(item, (Tensor, list, tuple, dict)) for item in value.values()
    ):
        return {key: split(item, f"{prefix}.{key}", tensors) for key, item in value.items()}
    return value


def join(value: Any, fetch: Callable[[str], Tensor]) -> Any:
    """Undo `split`: replace every TensorRef by `fetch(name)`."""
    if isinstance(value, TensorRef):
        return fetch(value.name)
    if type(value) is io.BytesIO:
        return io.BytesIO(value.getvalue())  # at its start for each reader
    if type(value) is list:
        return [join(item, fetch) for item in value]
    if type(value) is tuple:
        return tuple(join(item, fetch) for item in value)
    if type(value) is dict:
        return {key: join(item, fetch) for key, item in value.items()}
    return value


def tensor_names(value: Any) -> list[str]:
    """Return the names of all TensorRefs inside `value`."""
    names: list[str] = []

    def fetch(name: str) -> Tensor:
        names.append(name)
        return torch.empty(0)

    join(value, fetch)
    return names


def add_model(content: Content, model: nn.Module, *, with_buffers: bool) -> None:
    """Add the model's parameters, and its buffers and `_extra_state` where `with_buffers`.

    Args:
        content: modified in place.
        model: the unwrapped module.
        with_buffers: true on rank 0 only. After a step under DDP each rank has its own BatchNorm
            statistics, and the next forward overwrites them with rank 0's.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first_name: dict[int, str] = {}
    values: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            values[name] = split(
                value, f"model_extra.{name}", content.rank_local if with_buffers else {}
            )
        elif name in parameters or with_buffers:
            owner = first_name.setdefault(id(value), name)
            if owner != name:
                content.aliases[f"model.{name}"] = f"model.{owner}"
            elif name in parameters:
                content.tensors[f"model.{name}"] = value.detach()
                if not value.requires_grad:
                    # Frozen; `add_optimizers` adds the trained ones.
                    content.deferrable.add(f"model.{name}")
            else:
                content.rank_local[f"model.{name}"] = value.detach()
    if values:
        content.objects["model_extra"] = values


def load_model(
    model: nn.Module,
    objects: Mapping[str, Any],
    stored: Collection[str],
    fetch: Callable[[str], Tensor],
) -> None:
    """Hand values back that modules compute for their `state_dict`, through `load_state_dict`.

    Parameters and buffers were read in place.

    Args:
        model: the unwrapped module.
        objects: the checkpoint's values that are not tensors.
        stored: names of all stored tensors.
        fetch: returns a stored tensor.

    Raises:
        CheckpointError: a module rejects its value.
    """
    live = model.state_dict(keep_vars=True)
    computed = _computed(model, live)
    values = {name: join(value, fetch) for name, value in objects.get("model_extra", {}).items()}
    tensors = (name for name in computed if f"model.{name}" in stored and name not in values)
    values |= {name: fetch(f"model.{name}") for name in tensors}
    if not values:
        return
    # Parameters and buffers are copied to themselves, which does nothing.
    state = {name: value for name, value in live.items() if name not in computed} | values
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise  # from a module's own code
        raise CheckpointError(f"the model rejects its stored state: {error}") from None
    unknown = sorted(set(values) & set(getattr(result, "unexpected_keys", ())))
    if unknown:
        raise CheckpointError(
            f"no module of this model accepts the stored values {unknown[:4]}. A changed model can "
            "start from the weights that fit: init.weights=<safetensors>"
        )


def _computed(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Return the names in a state dict whose values are neither parameters nor buffers."""
    live = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    return {name for name, value in state.items() if id(value) not in live}


def model_targets(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that a checkpoint is read into, by name, shared storage once.

    Tensors that modules compute for their `state_dict` are not among them: see `load_model`.
    """
    content = Content()
    add_model(content, model, with_buffers=True)
    computed = computed_names(model)
    return {
        name: value
        for name, value in {**content.tensors, **content.rank_local}.items()
        if name.startswith("model.") and name not in computed
    }


def computed_names(model: nn.Module) -> set[str]:
    """Return stored names of the values that modules compute for their `state_dict`."""
    return {f"model.{name}" for name in _computed(model, model.state_dict(keep_vars=True))}


def parameter_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[int, str]:
    """Return parameter names by `id`, including every parameter of the optimizers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(_groups(optimizers)):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"parameter group {index} of the optimizer has a parameter of shape "
                    f"{tuple(parameter.shape)} that is not in the model, so it has no name to be "
                    "stored under. Register it in the model"
                )
    return names


def _groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def add_optimizers(content: Content, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Add the optimizers' state and hyperparameters without changing them.

    No parameter may be in two optimizers, as their state is stored under the parameter's name.
    """
    names = parameter_names(model, optimizers)
    scalars: dict[str, dict[Any, Any]] = {}
    for parameter, state in chain.from_iterable(o.state.items() for o in optimizers):
        if id(parameter) not in names:
            raise CheckpointError(
                f"optimizer.state has the key {parameter!r}, which is not a parameter of the "
                "model. Keep its value in the optimizer's param_groups"
            )
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                content.tensors[f"optimizer.{name}.{key}"] = value.detach()
                content.deferrable.add(f"optimizer.{name}.{key}")
            else:
                prefix = f"optimizer_tree.{name}.{key}"
                scalars.setdefault(name, {})[key] = split(value, prefix, content.tensors)
    groups, trained = [], set()
    for index, group in enumerate(_groups(optimizers)):
        trained |= {id(parameter) for parameter in group["params"]}
        content.deferrable |= {f"model.{names[id(parameter)]}" for parameter in group["params"]}
        values = {
            key: split(value, f"optimizer_group.{index}.{key}", content.tensors)
            for key, value in group.items()
            if key != "params"
        }
        groups.append({**values, "params": [names[id(p)] for p in group["params"]]})
    own_states = [_own_state(content, i, o, names) for i, o in enumerate(optimizers)]
    frozen = [
        [position, name]
        for position, (name, parameter) in enumerate(model.named_parameters())
        if id(parameter) not in trained
    ]
    content.objects["optimizer"] = {"groups": groups, "state": scalars}
    if any(state is not None for state in own_states):
        content.objects["optimizer"]["own"] = own_states
    if frozen:  # exports need the other parameters and their positions
        content.objects["optimizer"]["frozen"] = frozen


def has_own_state(optimizer: Any) -> bool:
    """Return whether an optimizer replaces `state_dict`, which may then hold more than `state`."""
    return type(optimizer).state_dict is not Optimizer.state_dict


def _own_state(content: Content, index: int, optimizer: Any, names: Mapping[int, str]) -> Any:
    """Return the `state_dict` of an optimizer that replaces it; None for others.

    Its tensors are added under `optimizer_own.`, unless they are stored by parameter already.
    """
    if not has_own_state(optimizer):
        return None
    by_parameter = {
        id(value): TensorRef(f"optimizer.{names[id(parameter)]}.{key}")
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    tree = nested.map_leaves(
        lambda value: by_parameter.get(id(value), value), optimizer.state_dict()
    )
    return split(tree, f"optimizer_own.{index}", content.tensors)


def load_own_state(
    optimizers: Sequence[Optimizer], objects: Mapping[str, Any], fetch: Callable[[str], Tensor]
) -> None:
    """Hand their `state_dict` back to optimizers that replace it, through `load_state_dict`.

    Settings of the groups are unchanged on return; load them, and the state by parameter, after it.

    Args:
        optimizers: of all phases.
        objects: the checkpoint's `optimizer`.
        fetch: returns a stored tensor.

    Raises:
        CheckpointError: an optimizer rejects its state.
    """
    for optimizer, tree in zip(optimizers, objects.get("own", ()), strict=False):
        if tree is None:
            continue
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        try:
            optimizer.load_state_dict(join(tree, fetch))
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{type(optimizer).__name__} rejects its stored state: {error}. If its groups "
                "changed, restore them, or start from the weights: init.weights=<safetensors>"
            ) from None
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group |= values


@dataclass(frozen=True)
class Slot:
    """Destination of a stored optimizer tensor: a new tensor and its entry in the state."""

    tensor: Tensor
    optimizer: Optimizer
    parameter: nn.Parameter
    key: str


def optimizer_slots(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, Slot]:
    """Allocate tensors for the stored optimizer state, by stored name.

    State that is not stored stays absent. A `step` is on the CPU unless its group is capturable or
    fused, as in `Optimizer.load_state_dict`; other tensors are on their parameter's device.

    Args:
        model: the unwrapped module.
        optimizers: they hold the model's parameters.
        stored: dtype and shape of each stored optimizer tensor, by name.
    """
    names = parameter_names(model, optimizers)
    owners = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            on_device = bool(group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                owners[names[id(parameter)]] = (optimizer, parameter, on_device)
    slots = {}
    for full, (dtype, shape) in stored.items():
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        if name not in owners:
            raise CheckpointError(
                f"the checkpoint has optimizer state for {name!r}, which no optimizer trains here. "
                "To start a changed model from these weights, use init.weights=<safetensors>"
            )
        optimizer, parameter, on_device = owners[name]
        on_cpu = key == "step" and not on_device
        device = torch.device("cpu") if on_cpu else parameter.device
        if hasattr(parameter, "device_mesh") and shape == tuple(parameter.shape):
            tensor = torch.empty_like(parameter.detach(), dtype=dtype)  # with the same sharding
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        slots[full] = Slot(tensor, optimizer, parameter, key)
    return slots


def check_groups(
    model: nn.Module, optimizers: Sequence[Optimizer], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the optimizers have the stored parameter groups.

    Raises:
        CheckpointError: they differ.
    """
    names = parameter_names(model, optimizers)
    current = [[names[id(p)] for p in group["params"]] for group in _groups(optimizers)]
    if current != [group["params"] for group in groups]:
        raise CheckpointError(
            f"parameter groups differ: the optimizer has {len(current)} groups of "
            f"{[len(g) for g in current]} parameters, the checkpoint {len(groups)} of "
            f"{[len(g['params']) for g in groups]}, or their order changed. To start a changed "
            "optimizer from these weights, use init.weights=<safetensors>"
        )


def load_optimizer_state(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    scalars: Mapping[str, Mapping[Any, Any]],
    slots: Mapping[str, Slot],
    fetch: Callable[[str], Tensor],
) -> None:
    """Replace the optimizers' state by the slots' tensors and the stored values by parameter."""
    names = parameter_names(model, optimizers)
    states = {}
    for optimizer in optimizers:
        optimizer.state.clear()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            states[names[id(parameter)]] = (optimizer.state, parameter)
    for slot in slots.values():
        slot.optimizer.state[slot.parameter][slot.key] = slot.tensor
    for name, values in scalars.items():
        state, parameter = states[name]
        state[parameter].update(join(values, fetch))
