"""Estimate of the remaining time of a run: steps, evaluations and save stalls. Pure."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from trainer.core.intervals import Every

_LAPS = 50
"""Number of recent lines in the median step time."""


class Estimate:
    """Remaining time, estimated from the lines of an attempt.

    Args:
        facts: of the attempt, as passed to trackers.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._step_s: deque[float] = deque(maxlen=_LAPS)
        self._eval_s: list[float] = []
        self._stall_s: list[float] = []
        self._last: tuple[int, float] | None = None
        self._between_steps_s = 0.0  # seconds outside steps since the last line

    def add(self, line: Mapping[str, Any], now_s: float) -> None:
        """Add a log line received at `now_s` of a monotonic clock."""
        if line["split"] == "eval":
            self._eval_s.append(line.get("eval_s", 0.0))
            self._between_steps_s += self._eval_s[-1]
            return
        if "step_p50_s" in line:
            self._step_s.append(line["step_p50_s"])
        elif self._last is not None and line["step"] > self._last[0]:
            steps, since_s = line["step"] - self._last[0], now_s - self._last[1]
            self._step_s.append(max(since_s - self._between_steps_s, 0.0) / steps)
        self._last, self._between_steps_s = (line["step"], now_s), 0.0

    def saved(self, save: Mapping[str, Any]) -> None:
        """Add the cost of a save."""
        self._stall_s.append(save["stall_s"])
        self._between_steps_s += save["stall_s"]

    def remaining_s(self, step: int) -> float | None:
        """Return the seconds from `step` to the end of the run; None without enough lines."""
        if not self._step_s:
            return None
        facts = self._facts
        remaining_s: float = max(facts["max_steps"] - step, 0) * statistics.median(self._step_s)
        remaining_s += _count(facts.get("eval_every"), facts, step) * _median(self._eval_s)
        saves: float = _count(facts.get("save_every"), facts, step)
        if every_s := facts.get("save_every_s"):
            saves = max(saves, remaining_s / every_s)
        return remaining_s + saves * _median(self._stall_s)


def _median(values: list[float]) -> float:
    """Return the median, which ignores a slow first evaluation; 0 without values."""
    return statistics.median(values) if values else 0.0


def _count(every: Every | None, facts: Mapping[str, Any], step: int) -> int:
    """Return the number of due steps after `step`, including the run's last."""
    end: int = facts["max_steps"]
    if every is None or step >= end:
        return 0
    per_epoch = facts["steps_per_epoch"] or 0
    periods = [period for period in (every.steps, (every.epochs or 0) * per_epoch) if period]

    def multiples(length: int) -> int:
        return (end - 1) // length - step // length

    both = multiples(math.lcm(*periods)) if len(periods) == 2 else 0
    return sum(map(multiples, periods)) - both + 1
