"""Training state as named tensors and plain values, and back.

Names are our own walk over model and optimizer: `model.<name>`, `optimizer.<name>.<key>`,
`rng.<rank>.<generator>`. torch's `get_optimizer_state_dict` is not used: on an optimizer without
state it takes a step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.checkpoint.values import TensorRef
from trainer.errors import CheckpointError


@dataclass
class Content:
    """What one rank brings to a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What every rank brings, in the same order: plain tensors, equal on all ranks and written
    once, or DTensors."""
    rank_local: dict[str, Tensor] = field(default_factory=dict)
    """Plain tensors that no other rank brings under the same name."""
    deferrable: set[str] = field(default_factory=set)
    """Names in `tensors` that nothing but an optimizer's step changes, or nothing at all. They may
    be copied while the next forward and backward run; all else is copied at once."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that share the storage of another name."""
    objects: dict[str, Any] = field(default_factory=dict)
    """Everything else; rank 0's are stored."""


def split(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move every tensor inside `value` to `tensors`, leaving a TensorRef in its place.

    Raises:
        CheckpointError: two tensors would get one name, as {1: …, "1": …} would.
    """
    if isinstance(value, Tensor):
        if prefix in tensors:
            raise CheckpointError(f"two tensors of the state would be stored as {prefix!r}")
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
    """Undo `split`: put `fetch(name)` in the place of every TensorRef."""
    if isinstance(value, TensorRef):
        return fetch(value.name)
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
        content: to add to.
        model: the plain module.
        with_buffers: true on rank 0 only.

    After a step under DDP each rank has its own BatchNorm statistics, of which rank 0's are the
    ones that survive the next forward; so buffers are never deduplicated over ranks.
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
                    content.deferrable.add(
                        f"model.{name}"
                    )  # frozen; others if an optimizer has them
            else:
                content.rank_local[f"model.{name}"] = value.detach()
    if values:
        content.objects["model_extra"] = values


def load_model(
    model: nn.Module, objects: Mapping[str, Any], fetch: Callable[[str], Tensor]
) -> None:
    """Hand `_extra_state` values back; the tensors themselves were read in place."""
    for name, value in objects.get("model_extra", {}).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.set_extra_state(join(value, fetch))


def model_targets(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that a checkpoint is read into, by name, shared storage once."""
    content = Content()
    add_model(content, model, with_buffers=True)
    return {
        name: value
        for name, value in {**content.tensors, **content.rank_local}.items()
        if name.startswith("model.")
    }


def parameter_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[int, str]:
    """Return the name of every parameter that the optimizers hold, by id."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(_groups(optimizers)):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"the optimizer's group {index} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that is not in the model, so it has no name to be "
                    "stored under; make it a parameter of the model"
                )
    return names


def _groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def add_optimizers(content: Content, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Add the optimizers' state and hyper-parameters as they are; never takes a step.

    No parameter may be in two of them: their state has the parameters' names.
    """
    names = parameter_names(model, optimizers)
    scalars: dict[str, dict[Any, Any]] = {}
    for parameter, state in (pair for each in optimizers for pair in each.state.items()):
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                content.tensors[f"optimizer.{name}.{key}"] = value.detach()
                content.deferrable.add(f"optimizer.{name}.{key}")
            else:
                prefix = f"optimizer_tree.{name}.{key}"
                scalars.setdefault(name, {})[key] = split(value, prefix, content.tensors)
    groups, held = [], set()
    for index, group in enumerate(_groups(optimizers)):
        held |= {id(parameter) for parameter in group["params"]}
        content.deferrable |= {f"model.{names[id(parameter)]}" for parameter in group["params"]}
        values = {
            key: split(value, f"optimizer_group.{index}.{key}", content.tensors)
            for key, value in group.items()
            if key != "params"
        }
        groups.append({**values, "params": [names[id(p)] for p in group["params"]]})
    frozen = [
        [place, name]
        for place, (name, parameter) in enumerate(model.named_parameters())
        if id(parameter) not in held
    ]
    content.objects["optimizer"] = {"groups": groups, "state": scalars}
    if frozen:  # for exports: what else is in model.parameters(), and where
        content.objects["optimizer"]["frozen"] = frozen


@dataclass(frozen=True)
class Slot:
    """Where a stored optimizer tensor goes: a new tensor, and the state entry to put it in."""

    tensor: Tensor
    optimizer: Optimizer
    parameter: nn.Parameter
    key: str


def optimizer_slots(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, Slot]:
    """Allocate what the checkpoint holds for the optimizers.

    Driven by the stored names: state that is absent stays absent. dtype and shape are the stored
    ones. A 0-dim `step` lives on the CPU unless the group is capturable or fused, as torch's
    own `Optimizer.load_state_dict` has it; all else lives with its parameter.
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
                f"the checkpoint has optimizer state for {name!r}, which this model does not "
                "train; a changed model can start from init.weights=<safetensors>"
            )
        optimizer, parameter, on_device = owners[name]
        on_cpu = key == "step" and not on_device
        device = torch.device("cpu") if on_cpu else parameter.device
        if hasattr(parameter, "device_mesh") and shape == tuple(parameter.shape):
            made = torch.empty_like(parameter.detach(), dtype=dtype)  # sharded in the same way
        else:
            made = torch.empty(shape, dtype=dtype, device=device)
        slots[full] = Slot(made, optimizer, parameter, key)
    return slots


def load_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    objects: Mapping[str, Any],
    slots: Mapping[str, Slot],
    fetch: Callable[[str], Tensor],
) -> None:
    """Put stored state and hyper-parameters into the optimizers.

    Raises:
        CheckpointError: the parameter groups are not those of the checkpoint.
    """
    names = parameter_names(model, optimizers)
    groups = objects["groups"]
    found = [[names[id(p)] for p in group["params"]] for group in _groups(optimizers)]
    if found != [group["params"] for group in groups]:
        raise CheckpointError(
            f"the optimizer has {len(found)} groups of {[len(g) for g in found]} parameters, the "
            f"checkpoint {len(groups)} of {[len(g['params']) for g in groups]}, or in another "
            "order; a changed optimizer can start from init.weights=<safetensors>"
        )
    for group, stored in zip(_groups(optimizers), groups, strict=True):
        values = {key: value for key, value in stored.items() if key != "params"}
        group.update(join(values, fetch))
    states = {}
    for optimizer in optimizers:
        optimizer.state.clear()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            states[names[id(parameter)]] = (optimizer.state, parameter)
    for slot in slots.values():
        slot.optimizer.state[slot.parameter][slot.key] = slot.tensor
    for name, values in objects["state"].items():
        state, parameter = states[name]
        state[parameter].update(join(values, fetch))
