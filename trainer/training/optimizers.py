"""Optimizers of a configuration: built, and tried for state that a checkpoint would not contain."""

import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint import state_tree, values
from trainer.checkpoint.state_tree import Content
from trainer.config import targets
from trainer.core import rng
from trainer.errors import CheckpointError, ConfigError
from trainer.training import modes

_STEPS = 12
"""Steps of a trial before and after its restore; wrappers often act at every 5th or 10th step."""
_OPAQUE = (FunctionType, MethodType, ModuleType, type)
_MAX_NAMES = 4

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups: `params` and settings."""


def make(node: Mapping[str, Any], groups: Groups, model: nn.Module) -> Any:
    """Build an optimizer, in training mode if it has one.

    Args:
        node: `optimizer` in the configuration, without groups and phases.
        groups: parameter groups of the model.
        model: the plain module.

    Raises:
        ConfigError: the optimizer rejects its arguments or some of the parameters, or keeps state
            that a checkpoint would not contain.
    """
    try:
        optimizer = _build(node, groups)
    except ConfigError:
        _check_shapes(node, groups, model)
        raise
    if not type(optimizer).__module__.startswith("torch.optim"):
        _check_sharding(node, optimizer, groups)
        _check_state(node, groups)
    return optimizer


def _build(node: Mapping[str, Any], groups: Groups) -> Any:
    is_plain = len(groups) == 1 and groups[0].keys() == {"params"}
    optimizer = targets.make(node, "optimizer", groups[0]["params"] if is_plain else groups)
    if modes.has_modes(optimizer):
        optimizer.train()
    return optimizer


def _check_shapes(node: Mapping[str, Any], groups: Groups, model: nn.Module) -> None:
    """Raise if the optimizer rejects some parameters because of their shape, as Muon does."""
    problems: dict[torch.Size, str] = {}
    accepted, rejected = 0, []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in (p for group in groups for p in group["params"]):
        if parameter.shape not in problems:
            try:
                _build(node, [{"params": [parameter]}])
                problems[parameter.shape] = ""
            except ConfigError as error:
                problems[parameter.shape] = str(error)
        if problems[parameter.shape]:
            rejected.append((names[id(parameter)], problems[parameter.shape]))
        else:
            accepted += 1
    if rejected and accepted:
        listed = ", ".join(name for name, _ in rejected[:_MAX_NAMES])
        more = f" and {len(rejected) - _MAX_NAMES:,} more" if len(rejected) > _MAX_NAMES else ""
        raise ConfigError(
            f"{rejected[0][1]}. Rejected parameters: {listed}{more}; accepted: {accepted:,}. Use "
            "an optimizer that has an update for both, chosen by a setting in optimizer.groups, or "
            "freeze these parameters with trainer.freeze"
        ) from None


def _check_sharding(node: Mapping[str, Any], optimizer: Any, groups: Groups) -> None:
    is_sharded = any(hasattr(p, "device_mesh") for group in groups for p in group["params"])
    if is_sharded and state_tree.has_own_state(optimizer):
        raise ConfigError(
            f"optimizer: {node['_target_']} has its own state_dict(), whose tensors have no "
            "parameter to be sharded like; use parallel.strategy=ddp"
        )


# --- trial of a restore ------------------------------------------------------------------------


def _check_state(node: Mapping[str, Any], groups: Groups) -> None:
    """Check on small parameters that a restored optimizer has the state of the saved one.

    An optimizer that cannot be tried passes: its step may need more than gradients.

    Raises:
        ConfigError: a value is lost, or cannot be stored.
    """
    try:
        with rng.forked(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lost = _lost_state(node, groups)
    except CheckpointError as error:
        raise ConfigError(f"optimizer: {node['_target_']} cannot be saved: {error}") from None
    except Exception:
        return
    if lost:
        raise ConfigError(
            f"optimizer: {lost_text(node['_target_'], lost)}. Keep it in self.state or "
            "self.param_groups, or return it from state_dict() and set it in load_state_dict()"
        )


def lost_text(target: str, names: Sequence[str]) -> str:
    """Return the text for a target whose attributes `names` a checkpoint would not contain."""
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return (
        f"{target} keeps state in {', '.join(names[:_MAX_NAMES])}{more}, which a checkpoint would "
        "not contain, so a resumed run would differ"
    )


def check_change(
    node: Mapping[str, Any], before: Groups, after: Groups, changed: Collection[str]
) -> None:
    """Check on small parameters that an optimizer with changed settings can use its former state.

    State may be missing that only the new settings need, such as a momentum that was 0.

    Args:
        node: target and arguments of the optimizer.
        before: its parameter groups, with the former settings.
        after: the same with the present settings.
        changed: keys of the changed settings, for the message.

    Raises:
        ConfigError: its step fails.
    """
    with rng.forked(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, optimizer = small(node, before)
            _take_steps(model, optimizer)
        except Exception:
            return  # cannot be tried
        for group, settings in zip(optimizer.param_groups, after, strict=True):
            group |= {key: value for key, value in settings.items() if key != "params"}
        try:
            _take_steps(model, optimizer)
        except Exception as error:  # any, from a user's optimizer too
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"{', '.join(sorted(changed))} changed, and {node['_target_']} cannot continue "
                f"with its stored state: {text}. Undo the change, or start from the weights only: "
                "init.weights=<file>, exported by python -m trainer.export"
            ) from None


def _lost_state(node: Mapping[str, Any], groups: Groups) -> list[str]:
    """Return the names of values that differ between a saved and a restored optimizer."""
    saved_model, saved = small(node, groups)
    twin_model, twin = small(node, groups)
    restored_model, restored = small(node, groups)  # at its start, as in the next attempt
    steps = zip(_take_steps(saved_model, saved), _take_steps(twin_model, twin), strict=True)
    chance = {n for one, other in steps for n in one if one[n] != other.get(n)}  # such as times
    _restore(saved_model, saved, restored_model, restored)
    before, after = attribute_values(saved, saved_model), attribute_values(restored, restored_model)
    names = {**before, **after}.keys() - chance
    if lost := [name for name in names if before.get(name) != after.get(name)]:
        return sorted(lost)
    for model, optimizer in ((saved_model, saved), (restored_model, restored)):
        _take_steps(model, optimizer)
    pairs = zip(saved_model.parameters(), restored_model.parameters(), strict=True)
    is_equal = all(torch.equal(a, b) for a, b in pairs)
    return [] if is_equal else ["a variable outside of its attributes"]


def small(node: Mapping[str, Any], groups: Groups) -> tuple[nn.Module, Any]:
    """Return parameters of two elements per axis, as many as groups, and their optimizer."""
    model = nn.ParameterList()
    small = []
    for group in groups:
        like = group["params"][0]
        device = "cpu" if like.is_meta else like.device
        tensor = torch.ones((2,) * like.ndim, dtype=like.dtype, device=device)
        model.append(nn.Parameter(tensor))
        small.append({**group, "params": [model[-1]]})
    rng.seed_all(0)
    return model, _build(node, small)


def _take_steps(model: nn.Module, optimizer: Any) -> list[dict[str, Any]]:
    """Take steps with given gradients and generators; return the optimizer's values after each."""
    rng.seed_all(1)
    steps = []
    for step in range(_STEPS):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, (step % 5 - 1.5) * 0.1 + index)
        optimizer.step()
        steps.append(attribute_values(optimizer, model))
    return steps


def _restore(saved_model: nn.Module, saved: Any, model: nn.Module, optimizer: Any) -> None:
    """Restore parameters and optimizer as from a checkpoint."""
    content = Content()
    state_tree.add_optimizers(content, saved_model, [saved])
    objects: Any = values.decode(values.encode(content.objects["optimizer"], "optimizer"))
    stored = {name: tensor.clone() for name, tensor in content.tensors.items()}
    state_tree.load_own_state([optimizer], objects, lambda name: stored[name].clone())
    for group, entry in zip(optimizer.param_groups, objects["groups"], strict=True):
        settings = {key: value for key, value in entry.items() if key != "params"}
        group |= state_tree.join(settings, lambda name: stored[name].clone())
    named = {n: (t.dtype, tuple(t.shape)) for n, t in stored.items() if n.startswith("optimizer.")}
    slots = state_tree.optimizer_slots(model, [optimizer], named)
    for name, slot in slots.items():
        slot.tensor.copy_(stored[name])
    scalars = objects["state"]
    state_tree.load_optimizer_state(
        model, [optimizer], scalars, slots, lambda name: stored[name].clone()
    )
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), saved_model.parameters(), strict=True):
            parameter.copy_(source)


def attribute_values(owner: Any, model: nn.Module) -> dict[str, Any]:
    """Return the names and values of all numbers, texts and tensors that an object keeps.

    Args:
        owner: an optimizer or a schedule.
        model: its parameters, which are named by their index.
    """
    indices = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    visited: set[int] = set()

    def walk(name: str, value: Any, parents: frozenset[int]) -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.Generator):
            yield name, value.get_state().tolist()
        elif isinstance(value, Tensor):
            yield name, indices.get(id(value), (str(value.dtype), repr(value.tolist())))
        elif isinstance(value, (int, float, str, bytes, type(None))):
            yield name, repr(value)
        elif id(value) not in parents | visited and not isinstance(value, _OPAQUE):
            if hasattr(value, "__dict__"):  # containers may be shared before a restore only
                visited.add(id(value))
            for key, item in _items(value, indices):
                yield from walk(f"{name}{key}", item, parents | {id(value)})

    return {name.removeprefix("."): value for name, value in walk("", owner, frozenset())}


def _items(value: Any, indices: Mapping[int, int]) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a container or object, with their names after its own."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"[{indices.get(id(key), key)!r}]", item
    elif isinstance(value, (list, tuple, set, deque)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        for key, item in getattr(value, "__dict__", {}).items():
            if key != "defaults":  # only read when a group is added
                yield f".{key}", item
