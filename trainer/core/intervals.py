"""Intervals of saving and evaluation, and checkpoint retention, as pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Intervals of saving or evaluation; None disables one."""

    steps: int | None = None
    epochs: int | None = None


def due(every: Every, *, step: int, epoch: int, epoch_ended: bool, final: bool) -> bool:
    """Return whether an action is due at this step; at the `final` step it always is.

    `epoch` is the number of complete epochs; `epoch_ended` is true if this step completed one.
    """
    if final or (every.steps and step % every.steps == 0):
        return True
    return bool(every.epochs and epoch_ended and epoch % every.epochs == 0)


def stale(
    steps: Mapping[int, float | None],
    *,
    keep_last: int,
    keep_best: int,
    mode: str,
    keep_every_steps: int | None = None,
) -> list[int]:
    """Return the steps to delete, in ascending order.

    Args:
        steps: every committed step of this timeline, with its metric if one was measured.
        keep_last: number of newest steps to keep; the newest is always kept.
        keep_best: number of steps with the best metric to keep; of equal ones the earlier.
        mode: `max` if a larger metric is better, `min` otherwise.
        keep_every_steps: keep multiples of this permanently; None disables it.
    """
    retained = {*sorted(steps)[-max(keep_last, 1) :], *best_first(steps, mode)[:keep_best]}
    if keep_every_steps:
        retained |= {step for step in steps if step % keep_every_steps == 0}
    return sorted(set(steps) - retained)


def best_first(steps: Mapping[int, float | None], mode: str) -> list[int]:
    """Return the measured steps, the best one first; of equal ones the earlier first."""
    sign = -1 if mode == "max" else 1
    measured = [
        (sign * value, step)
        for step, value in steps.items()
        if value is not None and not math.isnan(value)
    ]
    return [step for _, step in sorted(measured)]
