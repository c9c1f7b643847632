"""From values to places on paper, and to texts. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.core.formatting import compact, duration, number, size

SIZE = 1000.0
"""Side of the square that everything is drawn in; the page stretches it."""
_HUGE = 1e300
_WIDE = 30.0
"""A ratio of the largest to the smallest value from which on a logarithm shows more."""


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` … `high` to 0 … SIZE; what is outside lands on the edge."""

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high = self._bent(self.low), self._bent(self.high)
        share = (self._bent(value) - low) / (high - low) if high > low else 0.5
        return SIZE * min(max(share, 0.0), 1.0)

    def _bent(self, value: float) -> float:
        value = _within(value)
        return math.log10(max(value, 5e-324)) if self.is_log else value

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values within the scale, rising, of which there are at most `most` + 1."""
        if self.is_log:
            return _log_values(self.low, self.high, most)
        return _round_values(self.low, self.high, most)


def fitting(values: Sequence[float], *, may_log: bool = False) -> Scale:
    """Return a scale for finite values, with some air; shares of one stay within 0 … 1.

    Args:
        values: what is drawn.
        may_log: whether to take logarithms where the values span decades.
    """
    if not values:
        return Scale(0.0, 1.0)
    ordered = sorted(map(_within, values))
    low, high = ordered[0], ordered[-1]
    if may_log and low > 0 and high / low >= _WIDE:
        rare = ordered[len(ordered) // 100] / 3  # one tiny value must not squeeze all others
        return Scale(max(low, rare) / 1.2, high * 1.2, is_log=True)
    if low == high:
        return Scale(low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0))
    air = 0.04 * (high - low)
    is_share = low >= 0 and high <= 1 and high > 0.2
    low, high = low - air, high + air
    return Scale(max(low, 0.0), min(high, 1.0)) if is_share else Scale(low, high)


def _within(value: float) -> float:
    """Return a value with which sums and differences stay finite."""
    return min(max(value, -_HUGE), _HUGE)


def _log_values(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**power for power in range(first, last + 1) for m in mantissas]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most + 1:
            return found
    return found[:: -(-len(found) // most)]


def _round_values(low: float, high: float, most: int) -> list[float]:
    span = (high - low) / most
    if not (span > 0 and math.isfinite(span)):
        return [low]
    unit = 10.0 ** math.floor(math.log10(span))
    step = next((m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= span), 10 * unit)
    if not step > 0:  # too small for a float
        return [low]
    first = math.ceil(low / step - 1e-9)
    found = [(first + i) * step for i in range(most + 2)]
    return [value for value in found if low <= value <= high] or [low]


def whole_ticks(low: int, high: int, most: int = 5) -> list[int]:
    """Return round whole numbers within low … high."""
    values = Scale(float(low), float(high)).ticks(most)
    return sorted({int(value) for value in values if value == int(value)})


def labels(name: str, values: Sequence[float]) -> list[str]:
    """Return figures as an axis has them; the unit of a rate stands in the chart's head."""
    if name.endswith(("_s", "_bytes")) and not is_rate(name):
        return [quantity(name, value) for value in values]
    if max(map(abs, values), default=0.0) < 10_000:
        return [number(value) for value in values]
    return [compact(value) for value in values]


def is_rate(name: str) -> bool:
    """Return whether a figure counts something per second."""
    return name.endswith("_per_s")


def quantity(name: str, value: float | None) -> str:
    """Return a figure with the unit that its name says."""
    if value is None or not math.isfinite(value):
        return number(value)
    if is_rate(name):
        text = compact(value) if abs(value) >= 1e6 else number(value)
        return f"{text} {name.removesuffix('_per_s').replace('_', ' ')}/s"
    if name.endswith("_bytes"):
        return size(value)
    return duration(value) if name.endswith("_s") else number(value)
