"""Trial of schedules: restored ones continue as the saved ones, or are rejected before a run."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.checkpoint import state_tree, values
from trainer.core import rng
from trainer.errors import CheckpointError, ConfigError
from trainer.training import optimizers

_MAX_STEPS = 100
_DERIVED = ("_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
"""Attributes of every LRScheduler that no learning rate depends on."""
_BASE = ("base_lrs", "last_epoch", *_DERIVED)
"""Attributes of every LRScheduler. A schedule may not need all."""

Make = Callable[[], tuple[nn.Module, Optimizer, LRScheduler]]
"""Function that returns new small parameters, their optimizer and its schedule."""


def check(target: str, make: Make, steps: int) -> None:
    """Check that a restored schedule continues as the saved one. Generators are unchanged.

    A schedule that cannot be tried passes: it may need more than a small optimizer.

    Args:
        target: dotted name of the schedule, for the message.
        make: returns the small objects.
        steps: length of the schedule; the trial may be shorter.

    Raises:
        ConfigError: state is lost, or cannot be stored or restored.
    """
    with rng.forked(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer does not step
        try:
            lost = _lost_state(make, min(steps, _MAX_STEPS))
        except _StateError as error:
            raise ConfigError(f"scheduler: {target} {error}") from None
        except Exception:
            return
    if lost:
        raise ConfigError(
            f"scheduler: {optimizers.lost_text(target, lost)}. Return it from state_dict() and "
            "set it in load_state_dict()"
        )


class _StateError(Exception):
    """Error of a schedule whose state cannot be stored or restored."""


@dataclass(frozen=True)
class _Position:
    """Observations of a schedule after a step."""

    settings: Sequence[Mapping[str, Any]]
    """Settings of the optimizer's groups."""
    attributes: Mapping[str, Any]
    """Values of the schedule's attributes, by name."""
    state: Callable[[], Any] | None = None
    """Function that returns a new copy of the state as a checkpoint contains it, at some steps."""


def _lost_state(make: Make, max_steps: int) -> list[str]:
    """Return the names of values that differ between a saved and a restored schedule."""
    saves = {1, max_steps // 3, 2 * max_steps // 3} - {0}
    saved = list(_run(*make(), range(max_steps), saves))
    twin = list(_run(*make(), range(max_steps), saves))
    if any(a.settings != b.settings for a, b in zip(saved, twin, strict=True)):
        return []  # depends on more than the steps, such as the time
    pairs = zip(saved, twin, strict=True)
    chance = {n for a, b in pairs for n in a.attributes if a.attributes[n] != b.attributes.get(n)}
    for step in sorted(saves):
        if step >= len(saved):
            break
        position, expected = saved[step - 1], saved[step:]
        model, optimizer, scheduler = make()
        _restore(scheduler, optimizer, position)
        restored = list(_run(model, optimizer, scheduler, range(step, len(saved)), saves))
        names = _lost_counters(position, expected[-1], restored[-1]) if restored else []
        is_equal = [a.settings for a in restored] == [b.settings for b in expected]
        if not is_equal:
            lost = _different(expected[-1], restored[-1]) if restored else []
            names = lost or ["a variable outside of its attributes"]
        if names := [name for name in names if name not in chance]:
            return names
    return []


def _run(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    steps: Sequence[int],
    saves: set[int],
) -> Iterator[_Position]:
    """Take steps of a schedule up to its end; yield its position after each."""
    for step in steps:
        if step in saves or not step:
            rng.seed_all(step)
        try:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(step * 7 % 11)  # any metric that rises and falls
            else:
                scheduler.step()
        except Exception:
            return  # `schedules.check_length` reports it, if the run is longer
        names = optimizers.attribute_values(scheduler, model)
        yield _Position(
            settings=_settings(optimizer),
            attributes={n: v for n, v in names.items() if "optimizer." not in n},
            state=_store(scheduler) if step + 1 in saves else None,
        )


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    groups = optimizer.param_groups
    return [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in groups]


def _store(scheduler: Any) -> Callable[[], Any]:
    """Return a function that returns the schedule's state as if read from a checkpoint."""
    tensors: dict[str, Tensor] = {}
    try:
        state = scheduler.state_dict()
    except Exception as error:  # any, from a user's class
        raise _StateError(f"cannot be saved: its state_dict() fails: {_text(error)}") from None
    try:
        encoded = values.encode(state_tree.split(state, "scheduler", tensors), "scheduler")
    except CheckpointError as error:
        raise _StateError(f"cannot be saved: {error}") from None
    encoded = copy.deepcopy(encoded)
    stored = {name: tensor.clone() for name, tensor in tensors.items()}
    return lambda: state_tree.join(values.decode(encoded), lambda name: stored[name].clone())


def _restore(scheduler: Any, optimizer: Optimizer, position: _Position) -> None:
    """Restore a schedule, then its optimizer's settings, as from a checkpoint."""
    assert position.state is not None  # noqa: S101 (for the type checker)
    try:
        scheduler.load_state_dict(position.state())
    except Exception as error:  # any, from a user's class
        text = f"its load_state_dict() fails: {_text(error)}"
        raise _StateError(f"cannot be restored: {text}") from None
    for group, settings in zip(optimizer.param_groups, position.settings, strict=True):
        group |= copy.deepcopy(dict(settings))


def _different(expected: _Position, restored: _Position) -> list[str]:
    """Return the names of attributes that differ."""
    names = expected.attributes.keys() | restored.attributes.keys()
    return sorted(
        name
        for name in names
        if expected.attributes.get(name) != restored.attributes.get(name)
        and _attribute(name) not in _DERIVED
    )


def _lost_counters(saved: _Position, expected: _Position, restored: _Position) -> list[str]:
    """Return the names of numbers that move with the steps, and that lag after the restore.

    They may act later than the trial ends.
    """
    return [
        name
        for name in _different(expected, restored)
        if _attribute(name) not in _BASE
        and not name.endswith("]")
        and saved.attributes.get(name) != expected.attributes.get(name)
    ]


def _attribute(name: str) -> str:
    return name.rpartition(".")[2].partition("[")[0]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
