"""When to save and evaluate, and what to keep: pure functions of numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Intervals of saving or evaluating; None switches one off."""

    steps: int | None = None
    epochs: int | None = None


def due(every: Every, *, step: int, epoch: int, epoch_ended: bool, final: bool) -> bool:
    """Return whether something is due at this step; at the `final` one, everything is.

    `epoch` counts complete epochs; `epoch_ended` says that this step completed the last of them.
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
    """Return which steps to delete.

    Args:
        steps: every committed step of this timeline, with its metric where one was measured.
        keep_last: newest steps to keep; the newest is always kept.
        keep_best: steps with the best metric to keep; of equal ones the earlier.
        mode: `max` or `min`, whether a larger metric is better.
        keep_every_steps: multiples of this are kept for good; None: none.
    """
    kept = {*sorted(steps)[-max(keep_last, 1) :], *best_first(steps, mode)[:keep_best]}
    if keep_every_steps:
        kept |= {step for step in steps if step % keep_every_steps == 0}
    return sorted(set(steps) - kept)


def best_first(steps: Mapping[int, float | None], mode: str) -> list[int]:
    """Return the measured steps, the best one first; of equal ones the earlier first."""
    sign = -1 if mode == "max" else 1
    measured = [
        (sign * value, step)
        for step, value in steps.items()
        if value is not None and not math.isnan(value)
    ]
    return [step for _, step in sorted(measured)]
