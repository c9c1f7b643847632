"""Warmup with cosine decay, and replay of any schedule with a new length."""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

HORIZON_WORDS = ("total_steps", "total_epochs", "steps_per_epoch")
"""Words in the arguments of a schedule that the run's numbers replace."""


def warmup_cosine(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    floor: float = 0.0,
    warmup_share: float = 0.0,
) -> LambdaLR:
    """Raise the learning rate linearly from 0, then lower it along half a cosine.

    A function of the step alone (I. Loshchilov and F. Hutter, SGDR, ICLR 2017, eq. 5, one cycle).
    A checkpoint stores only the step, so a run that resumes with a larger `total_steps` follows
    the longer curve from there.

    Args:
        optimizer: optimizer whose learning rates are scaled.
        total_steps: last step of the curve; the word `total_steps` in the configuration is
            replaced by the run's length.
        warmup_steps: number of steps of the linear warmup.
        floor: final learning rate as a fraction of the initial one, 0 … 1.
        warmup_share: warmup as a fraction of `total_steps`, 0 … 1; used if `warmup_steps` is 0.
    """
    warmup_steps = warmup_steps or round(warmup_share * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def steps(state: Mapping[str, Any]) -> int | None:
    """Return the number of steps in a scheduler's state dict; None if it is not stored there."""
    if "last_epoch" not in state and state.get("_schedulers"):  # of a ChainedScheduler
        return steps(state["_schedulers"][0])
    count = state.get("last_epoch")
    return count if isinstance(count, int) else None


@dataclass(frozen=True)
class ScheduleState:
    """State of a scheduler, and the optimizer settings that it controls."""

    state: dict[str, Any]
    groups: list[dict[str, Any]]
    """Scheduled settings of each of the optimizer's parameter groups."""

    @classmethod
    def capture(cls, scheduler: LRScheduler) -> "ScheduleState":
        """Copy the present state of a scheduler and its optimizer's scheduled settings."""
        groups = scheduler.optimizer.param_groups
        values = [{key: group[key] for key in _SCHEDULED_KEYS if key in group} for group in groups]
        return cls(*copy.deepcopy((scheduler.state_dict(), values)))

    def restore(self, scheduler: LRScheduler) -> None:
        """Load this state into an equal scheduler and its optimizer."""
        scheduler.load_state_dict(copy.deepcopy(self.state))
        for group, values in zip(scheduler.optimizer.param_groups, self.groups, strict=True):
            group |= copy.deepcopy(values)


def replay(scheduler: LRScheduler, state: Mapping[str, Any]) -> ScheduleState | None:
    """Return the state of a new scheduler after as many steps as the stored `state` has.

    Loading the stored state instead would restore the old length as well, because schedulers of
    torch store it. The scheduler itself is unchanged on return.

    Returns:
        None if the schedule is not a function of the step, or does not store its step.
    """
    target, current = steps(state), steps(scheduler.state_dict())
    if target is None or current is None or isinstance(scheduler, ReduceLROnPlateau):
        return None
    initial = ScheduleState.capture(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer has not stepped
        for _ in range(target - current):
            scheduler.step()
    replayed = ScheduleState.capture(scheduler)
    initial.restore(scheduler)
    return replayed


_SCHEDULED_KEYS = ("lr", "momentum", "betas")
"""Settings of a parameter group that torch's schedulers change."""
