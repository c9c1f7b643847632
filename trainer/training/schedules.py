"""Learning-rate schedules of a configuration: their checks, and the objects built from it."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from trainer import schedule
from trainer.config import targets
from trainer.config.schema import Run
from trainer.core import metric_mode, nested, rng
from trainer.core.state import State
from trainer.errors import ConfigError, Problem
from trainer.training import schedule_trial
from trainer.training.job import Job, Phase

_OPTIMIZER = "optimizer"
"""Argument of schedulers, also of those within another scheduler."""


def check(settings: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of the targets in `scheduler`. Imports them, calls nothing."""
    if not settings:
        return []
    node = _replaced(settings, dict.fromkeys(schedule.HORIZON_WORDS, 1))
    provided = 0 if targets.takes(node.get("_target_"), _OPTIMIZER) else 1
    return targets.check_target(node, "scheduler", provided, named=(_OPTIMIZER,))


def check_plateau(run: Run, mode: str | None) -> list[Problem]:
    """Return the problem of a ReduceLROnPlateau whose mode contradicts the metric it follows.

    Args:
        run: the configuration.
        mode: `max` or `min` of `checkpoint.metric`; None: as far as its name tells.
    """
    metric, mode_setting = run.checkpoint.metric or "loss", run.scheduler.get("mode")
    expected = metric_mode.by_name(metric) or mode
    target = str(run.scheduler.get("_target_", ""))
    is_plateau = target.endswith("ReduceLROnPlateau")
    if not is_plateau or expected is None or mode_setting in (None, expected):
        return []
    better = "smaller" if expected == "min" else "larger"
    text = (
        f"{mode_setting!r}, but a {better} {metric!r} is better, which the schedule follows. "
        "Remove scheduler.mode, or set checkpoint.metric and checkpoint.mode"
    )
    return [Problem("scheduler.mode", text)]


def horizon_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the words in a schedule that the run's numbers replace, by key, also nested ones."""
    return {
        nested.dotted(path): value
        for path, value in nested.leaves(settings)
        if isinstance(value, str) and value in schedule.HORIZON_WORDS
    }


def maker(
    settings: Mapping[str, Any], optimizer: Optimizer, steps_per_epoch: int
) -> Callable[[int], LRScheduler] | None:
    """Return a function that builds the schedule for a number of steps; None without one.

    Args:
        settings: `scheduler` in the configuration.
        optimizer: the function also resets its settings to the present ones.
        steps_per_epoch: 0 if unknown.
    """
    if not settings:
        return None
    configured = copy.deepcopy(
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    )

    def make(steps: int) -> LRScheduler:
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            parameters = group["params"]
            group.clear()
            group |= {"params": parameters, **copy.deepcopy(values)}
        epochs = -(-steps // max(steps_per_epoch, 1))  # unused by streams
        horizon = dict(zip(schedule.HORIZON_WORDS, (steps, epochs, steps_per_epoch), strict=True))
        with warnings.catch_warnings():  # a schedule takes its first step before the optimizer
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler: LRScheduler = _build(_replaced(settings, horizon), optimizer, "scheduler")
        return scheduler

    return make


def _replaced(settings: Mapping[str, Any], horizon: Mapping[str, int]) -> dict[str, Any]:
    """Return the node of a schedule with numbers in place of the words."""
    node = {key: value for key, value in settings.items() if key != "interval"}
    replaced: dict[str, Any] = nested.map_leaves(
        lambda value: horizon.get(value, value) if isinstance(value, str) else value, node
    )
    return replaced


def _build(node: Any, optimizer: Optimizer, key: str) -> Any:
    """Build a schedule and those in its arguments; every one of them gets the optimizer."""
    if isinstance(node, list):
        return [_build(item, optimizer, f"{key}[{i}]") for i, item in enumerate(node)]
    members = {
        name: _build(value, optimizer, f"{key}.{name}")
        for name, value in node.items()
        if _has_schedules(value)
    }
    rest = {name: value for name, value in node.items() if name not in members}
    if targets.takes(node["_target_"], _OPTIMIZER):
        return targets.make(rest, key, optimizer=optimizer, **members)
    return targets.make(rest, key, optimizer, **members)


def _has_schedules(value: Any) -> bool:
    """Return whether an argument is a schedule, or a list of schedules."""
    if isinstance(value, list):
        return bool(value) and all(_has_schedules(item) for item in value)
    return isinstance(value, Mapping) and targets.takes(value.get("_target_"), _OPTIMIZER)


def check_state(
    settings: Mapping[str, Any],
    make_small: Callable[[], tuple[nn.Module, Optimizer]],
    steps: int,
    steps_per_epoch: int,
) -> None:
    """Check that a restored schedule continues as the saved one, on small parameters.

    Args:
        settings: `scheduler` in the configuration.
        make_small: returns new parameters and their optimizer.
        steps: number of steps of the schedule.
        steps_per_epoch: 0 if unknown.

    Raises:
        ConfigError: state is lost, or cannot be stored or restored.
    """

    def make() -> tuple[nn.Module, Optimizer, LRScheduler]:
        model, optimizer = make_small()
        build = maker(settings, optimizer, steps_per_epoch)
        assert build is not None  # noqa: S101 (for the type checker)
        return model, optimizer, build(steps)

    if settings:
        schedule_trial.check(settings["_target_"], make, steps)


# --- length ------------------------------------------------------------------------------------


def check_length(job: Job, state: State) -> None:
    """Check that every schedule can be stepped from `state` to the end of the run.

    Raises:
        ConfigError: a schedule is shorter than the run.
    """
    steps: int | None = job.max_steps - state.step
    if job.scheduler_interval == "epoch":
        steps = _remaining_epochs(job, state)
    if steps is not None:
        check_steps(job.phases, steps, job.scheduler_interval)


def check_steps(phases: Sequence[Phase], steps: int, interval: str) -> None:
    """Check that every phase's schedule can be stepped this many times more.

    The schedules and generators are unchanged on return. Takes the last step only, so that the
    length of the run does not matter.

    Args:
        phases: the phases of a step.
        steps: remaining steps or epochs.
        interval: `step` or `epoch`.

    Raises:
        ConfigError: a schedule is shorter.
    """
    for phase in phases:
        scheduler = phase.scheduler
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau) or steps <= 0:
            continue
        position = schedule.ScheduleState.capture(scheduler)
        try:
            with rng.forked(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer has not stepped
                _take_last_step(scheduler, (schedule.steps(position.state) or 0) + steps)
        except Exception as error:  # any, from a user's function too
            name = f" of phase {phase.name!r}" if phase.name else ""
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"scheduler: {type(scheduler).__name__}{name} ends before the run, which takes "
                f"{steps:,} more {interval}s: {text}. Set its length to one of the "
                f"words {', '.join(schedule.HORIZON_WORDS[:2])}, or shorten the run with "
                "trainer.max_steps"
            ) from None
        finally:
            position.restore(scheduler)


def _remaining_epochs(job: Job, state: State) -> int | None:
    """Return the number of epoch ends until the end of the run; None if it is unknown."""
    if job.data.steps_per_epoch:
        batches = int(state.cursor["batch"]) + job.max_steps - state.step
        return batches // job.data.steps_per_epoch
    return None if job.max_epochs is None else job.max_epochs - state.epoch


def _take_last_step(scheduler: LRScheduler, last: int) -> None:
    """Set a schedule to its step before `last`, counted from 0, and take that step."""
    if isinstance(scheduler, ChainedScheduler):
        for member in scheduler._schedulers:
            _take_last_step(member, last)
    elif isinstance(scheduler, SequentialLR):
        current, starts = scheduler.last_epoch, [0, *scheduler._milestones]
        for member, start, end in zip(
            scheduler._schedulers, starts, [*starts[1:], last + 1], strict=True
        ):
            if start and start <= last and hasattr(member, "_schedulers"):
                raise TypeError(f"SequentialLR cannot start a {type(member).__name__} later on")
            steps = min(end - 1, last) - start
            if start <= current:  # a nested SequentialLR is a step ahead of the outer one
                steps += (schedule.steps(member.state_dict()) or 0) - (current - start)
            if steps > 0 and current < end:
                _take_last_step(member, steps)
    elif isinstance(getattr(scheduler, "last_epoch", None), int):
        scheduler.last_epoch = last - 1
        scheduler.step()
