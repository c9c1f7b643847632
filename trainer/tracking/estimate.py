"""How long the rest of a run will take: steps, evaluations and what saves cost. Pure."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from trainer.core.intervals import Every

_LAPS = 50
"""Lines whose pace counts: so the estimate follows a change, and no single line moves it."""


class Estimate:
    """Learns from the lines of an attempt.

    Args:
        facts: of the attempt, as trackers get them.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._step_s: deque[float] = deque(maxlen=_LAPS)
        self._eval_s: list[float] = []
        self._stall_s: list[float] = []
        self._last: tuple[int, float] | None = None
        self._aside_s = 0.0  # since the last line, what no step took

    def take(self, line: Mapping[str, Any], now_s: float) -> None:
        """Take note of a line that came at `now_s`, by any clock that is always the same."""
        if line["split"] == "eval":
            self._eval_s.append(line.get("eval_s", 0.0))
            self._aside_s += self._eval_s[-1]
            return
        if "step_p50_s" in line:
            self._step_s.append(line["step_p50_s"])
        elif self._last is not None and line["step"] > self._last[0]:
            steps, since_s = line["step"] - self._last[0], now_s - self._last[1]
            self._step_s.append(max(since_s - self._aside_s, 0.0) / steps)
        self._last, self._aside_s = (line["step"], now_s), 0.0

    def saved(self, save: Mapping[str, Any]) -> None:
        """Take note of what a save cost."""
        self._stall_s.append(save["stall_s"])
        self._aside_s += save["stall_s"]

    def left_s(self, step: int) -> float | None:
        """Return the seconds from `step` to the end of the run; None: too early to say."""
        if not self._step_s:
            return None
        facts = self._facts
        rest_s: float = max(facts["max_steps"] - step, 0) * statistics.median(self._step_s)
        rest_s += _count(facts.get("eval_every"), facts, step) * _usual(self._eval_s)
        saves: float = _count(facts.get("save_every"), facts, step)
        if every_s := facts.get("save_every_s"):
            saves = max(saves, rest_s / every_s)
        return rest_s + saves * _usual(self._stall_s)


def _usual(values: list[float]) -> float:
    """Return the median: the first evaluation also loads libraries, say."""
    return statistics.median(values) if values else 0.0


def _count(every: Every | None, facts: Mapping[str, Any], step: int) -> int:
    """Return how many steps after `step` are due, the last one of the run among them."""
    end: int = facts["max_steps"]
    if every is None or step >= end:
        return 0
    per_epoch = facts["steps_per_epoch"] or 0
    periods = [each for each in (every.steps, (every.epochs or 0) * per_epoch) if each]

    def multiples(of: int) -> int:
        return (end - 1) // of - step // of

    both = multiples(math.lcm(*periods)) if len(periods) == 2 else 0
    return sum(map(multiples, periods)) - both + 1
