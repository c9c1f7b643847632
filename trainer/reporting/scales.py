"""Scales from values to positions, and values with units. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.core.formatting import compact, duration, number, size

_HUGE = 1e300
_WIDE = 30.0
"""Ratio of largest to smallest value above which the scale is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """Maps `low` … `high` to 0 … 1; values outside are clipped."""

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high = self._bent(self.low), self._bent(self.high)
        fraction = (self._bent(value) - low) / (high - low) if high > low else 0.5
        return min(max(fraction, 0.0), 1.0)

    def _bent(self, value: float) -> float:
        value = clipped(value)
        return math.log10(max(value, 5e-324)) if self.is_log else value


def fitting(values: Sequence[float], *, may_log: bool = False) -> Scale:
    """Return a scale for finite values with a margin; fractions stay within 0 … 1.

    Args:
        values: the values to draw.
        may_log: use a logarithmic scale if the values span decades.
    """
    if not values:
        return Scale(0.0, 1.0)
    ordered = sorted(map(clipped, values))
    low, high = ordered[0], ordered[-1]
    if may_log and low > 0 and high / low >= _WIDE:
        rare = ordered[len(ordered) // 100] / 3  # one tiny value must not squeeze all others
        return Scale(max(low, rare) / 1.2, high * 1.2, is_log=True)
    if low == high:
        return Scale(low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0))
    air = 0.04 * (high - low)
    is_fraction = low >= 0 and high <= 1 and high > 0.2
    low, high = low - air, high + air
    return Scale(max(low, 0.0), min(high, 1.0)) if is_fraction else Scale(low, high)


def clipped(value: float) -> float:
    """Clip a value so that sums and differences stay finite."""
    return min(max(value, -_HUGE), _HUGE)


def quantity(name: str, value: float | None) -> str:
    """Return a value with the unit implied by its name."""
    if value is None or not math.isfinite(value):
        return number(value)
    if name.endswith("_per_s"):
        text = compact(value) if abs(value) >= 1e6 else number(value)
        return f"{text} {name.removesuffix('_per_s').replace('_', ' ')}/s"
    if name.endswith("_bytes"):
        return size(value)
    return duration(value) if name.endswith("_s") else number(value)
