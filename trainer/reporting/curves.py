"""Curves of metrics: points and smoothing. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

MOST_POINTS = 800
"""Maximum points per curve; of more, the extremes of each section are drawn."""

Points = Sequence[tuple[int, float]]
"""(step, finite value) pairs, steps ascending."""


@dataclass(frozen=True)
class Curve:
    """Line of a chart."""

    name: str
    points: Points
    colour: int
    """Index of a page colour, from 1."""
    style: str = "line"
    """line, faint (raw data of a smoothed line), or dots (few measurements, joined)."""


def points(lines: Iterable[Mapping[str, Any]], split: str, key: str) -> Points:
    """Return the finite values of one metric, by step."""
    values = [
        (line["step"], float(line[key]))
        for line in lines
        if line["split"] == split and is_number(line.get(key))
    ]
    return sorted(values, key=lambda point: point[0])


def is_number(value: object) -> bool:
    """Return whether a value is a finite number that can be drawn."""
    if type(value) is int:
        return abs(value) < 1 << 1000
    return type(value) is float and math.isfinite(value)


def smoothed(raw: Points) -> Points:
    """Return at each point the mean of its neighbours: a fiftieth of all on either side."""
    reach = len(raw) // 50
    if reach == 0:
        return raw
    sums = [0.0, *accumulate(value for _, value in raw)]
    if not math.isfinite(sums[-1]):
        return raw
    values = []
    for index, (step, _) in enumerate(raw):
        first, end = max(index - reach, 0), min(index + reach + 1, len(raw))
        values.append((step, (sums[end] - sums[first]) / (end - first)))
    return values


def thinned(all_points: Points, max_points: int = MOST_POINTS) -> Points:
    """Return at most about `max_points` points: the lowest and highest of each stretch."""
    if len(all_points) <= max_points:
        return all_points
    indices_drawn = {0, len(all_points) - 1}
    stretches = max((max_points - 2) // 2, 1)
    for number in range(stretches):
        first = number * len(all_points) // stretches
        end = (number + 1) * len(all_points) // stretches
        indices = range(first, end)
        indices_drawn.add(min(indices, key=lambda i: all_points[i][1]))
        indices_drawn.add(max(indices, key=lambda i: all_points[i][1]))
    return [all_points[i] for i in sorted(indices_drawn)]


def steps_per_epoch(lines: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the steps per epoch, if the lines determine it closely."""
    lower, upper = 0, None
    for line in lines:
        step, epoch = line["step"], line.get("epoch")
        if type(epoch) is not int or epoch < 0:
            continue
        lower = max(lower, step // (epoch + 1) + 1)
        if epoch:
            upper = min(upper or step, step // epoch)
    return upper if upper and abs(upper - lower) <= upper // 50 + 1 else None
