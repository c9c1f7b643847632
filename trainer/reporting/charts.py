"""Line charts as data; `page.js` draws them with uPlot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.reporting import curves
from trainer.reporting.curves import Curve
from trainer.reporting.scales import clipped, fitting

_DIGITS = 6


@dataclass(frozen=True)
class Chart:
    """Content of one chart."""

    title: str
    curves: Sequence[Curve]
    key: str = ""
    """Name of the metric, which implies its unit."""
    may_log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """Step axis shared by all charts of a page."""

    low: int
    high: int
    steps_per_epoch: int | None = None
    resumed: Sequence[int] = ()
    """Steps at which attempts resumed."""


def drawn(charts: Sequence[Chart], axis: Axis) -> list[dict[str, Any]]:
    """Return title, hint and data of every chart that has points."""
    return [
        {"title": chart.title, "hint": _hint(data, chart.note), "data": data}
        for chart in charts
        if (data := _data(chart, axis))["curves"]
    ]


def _hint(data: Mapping[str, Any], note: str) -> str:
    return ", ".join(filter(None, ["log scale" if data["log"] else "", note]))


def _data(chart: Chart, axis: Axis) -> dict[str, Any]:
    """Return the values of a chart, rounded to six digits."""
    y = fitting([v for curve in chart.curves for _, v in curve.points], may_log=chart.may_log)
    high = max(axis.high, axis.low + 1)
    return {
        "x": [axis.low, high],
        "y": [y.low, y.high],
        "log": y.is_log,
        "unit": _unit(chart.key),
        "epoch": axis.steps_per_epoch,
        "resumed": [step for step in axis.resumed if step <= high],
        "curves": [_curve(curve) for curve in chart.curves if curve.points],
    }


def _unit(key: str) -> str:
    if key.endswith("_bytes"):
        return "bytes"
    return "s" if key.endswith("_s") and not key.endswith("_per_s") else ""


def _curve(curve: Curve) -> dict[str, Any]:
    points = curves.thinned(curve.points)
    return {
        "name": curve.name,
        "colour": curve.colour,
        "style": curve.style,
        "x": [step for step, _ in points],
        "y": [float(f"{clipped(value):.{_DIGITS}g}") for _, value in points],
    }
