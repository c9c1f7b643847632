"""Line charts: HTML labels around an SVG that stretches with the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.core.formatting import number
from trainer.reporting import curves
from trainer.reporting.curves import Curve
from trainer.reporting.markup import Html, data, joined, tag
from trainer.reporting.scales import SIZE, Scale, fitting, integer_ticks, labels

_DIGITS = 6
_X_TICKS = 7


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


def draw(chart: Chart, axis: Axis) -> Html:
    """Return a chart; empty markup without points."""
    curves_drawn = [
        Curve(curve.name, curves.thinned(curve.points), curve.colour, curve.style)
        for curve in chart.curves
        if curve.points
    ]
    if not curves_drawn:
        return Html("")
    x = Scale(float(axis.low), float(max(axis.high, axis.low + 1)))
    y = fitting([v for curve in chart.curves for _, v in curve.points], may_log=chart.may_log)
    hints = ["log scale"] if y.is_log else []
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("h3", chart.title),
            tag("span", ", ".join([*hints, *filter(None, [chart.note])]), class_="hint"),
            _legend(curves_drawn) if len(chart.curves) > 1 else None,
        ),
        tag("div", _y_axis(chart.key, y), _picture(chart, curves_drawn, axis, x, y), class_="plot"),
        _x_axis(axis, x),
        _readings(chart.key, curves_drawn, x, y),
        class_="chart",
    )


def _legend(curves_drawn: Sequence[Curve]) -> Html:
    entries = [
        tag("span", tag("i", class_=f"key c{curve.colour} {curve.style}"), curve.name)
        for curve in curves_drawn
    ]
    return tag("span", *entries, class_="legend")


def _picture(chart: Chart, curves_drawn: Sequence[Curve], axis: Axis, x: Scale, y: Scale) -> Html:
    grid = "".join(f"M0 {SIZE - y(tick):.1f}H{SIZE:.0f}" for tick in y.ticks())
    resumed = "".join(f"M{x(step):.1f} 0V{SIZE:.0f}" for step in axis.resumed)
    parts = [tag("path", class_="grid", d=grid)]
    if resumed:
        parts.append(tag("path", class_="resumed", d=resumed))
    for curve in curves_drawn:
        colour = f"c{curve.colour}"
        if len(curve.points) > 1:
            line = curves.path(curve.points, x, y)
            parts.append(tag("path", class_=f"curve {curve.style} {colour}", d=line))
        if len(curve.points) == 1 or (curve.style == "dots" and len(curve.points) <= 120):
            dots_path = curves.dots(curve.points, x, y)
            parts.append(tag("path", class_=f"points {colour}", d=dots_path))
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {SIZE:.0f} {SIZE:.0f}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{chart.title} by step",
    )


def _y_axis(key: str, y: Scale) -> Html:
    ticks = y.ticks()
    ticks_drawn = [
        tag("span", text, style=f"top:{100 - y(tick) / SIZE * 100:.2f}%")
        for text, tick in zip(labels(key, ticks), ticks, strict=True)
    ]
    return tag("div", *ticks_drawn, class_="y")


def _x_axis(axis: Axis, x: Scale) -> Html:
    steps = integer_ticks(axis.low, axis.high, _X_TICKS)
    rows = [_x_labels("step", list(zip(labels("step", steps), steps, strict=True)), x)]
    if axis.steps_per_epoch:
        steps_per_epoch = axis.steps_per_epoch
        epochs = integer_ticks(
            -(-axis.low // steps_per_epoch), axis.high // steps_per_epoch, _X_TICKS
        )
        rows.append(
            _x_labels("epoch", [(number(epoch), epoch * steps_per_epoch) for epoch in epochs], x)
        )
    return joined(rows)


def _x_labels(name: str, ticks_at: Sequence[tuple[str, int]], x: Scale) -> Html:
    ticks_drawn = [
        tag("span", text, style=f"left:{x(step) / SIZE * 100:.2f}%") for text, step in ticks_at
    ]
    return tag("div", tag("b", name), tag("div", *ticks_drawn), class_=f"x {name}")


def _readings(key: str, curves_drawn: Sequence[Curve], x: Scale, y: Scale) -> Html:
    """Return the values shown on hover, rounded to six digits."""
    unit = "s" if key.endswith("_s") and not key.endswith("_per_s") else ""
    return data(
        {
            "x": [x.low, x.high],
            "y": [y.low, y.high],
            "log": y.is_log,
            "unit": unit,
            "curves": [
                {
                    "name": curve.name,
                    "colour": curve.colour,
                    "faint": curve.style == "faint",
                    "x": [step for step, _ in curve.points],
                    "y": [float(f"{value:.{_DIGITS}g}") for _, value in curve.points],
                }
                for curve in curves_drawn
            ],
        }
    )
