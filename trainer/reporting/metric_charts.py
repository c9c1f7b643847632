"""The charts of a run's metrics, alone or overlaid with other runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.reporting import curves
from trainer.reporting.charts import Axis, Chart
from trainer.reporting.curves import Curve, is_number, points, smoothed
from trainer.reporting.facts import Facts
from trainer.reporting.scales import quantity
from trainer.tracking import jsonl

_STEP_TIMES = {
    "step_p50_s": "median",
    "step_p95_s": "95th percentile",
    "step_max_s": "longest",
    "data_wait_s": "wait for data",
}
COLOURS = 8
"""Number of the page's curve colours."""
_MOST_RESUMED = 24
"""Maximum resume marks; more would hide the curves."""
MAX_CHARTS = 24


def axis(runs: Sequence[Facts]) -> Axis:
    """Return the step axis of all charts; with epochs if all runs agree on their length."""
    steps = [line["step"] for run in runs for line in run.lines]
    lengths = {run.steps_per_epoch for run in runs}
    firsts = [record.get("first_step") for run in runs for record in run.records[1:]]
    resumed = sorted({step for step in firsts if type(step) is int and step > 0})
    return Axis(
        0,
        max(steps, default=1),
        lengths.pop() if len(lengths) == 1 else None,
        resumed if len(runs) == 1 and len(resumed) <= _MOST_RESUMED else (),
    )


def keys(lines: Iterable[Mapping[str, Any]], split: str | None = None) -> list[str]:
    """Return the names of all metrics in order of appearance."""
    names = {
        key: True
        for line in lines
        if split in (None, line["split"])
        for key, value in line.items()
        if key not in jsonl.POSITION and is_number(value)
    }
    return list(names)


def is_measure(key: str) -> bool:
    """Return whether a metric measures the model rather than the machine."""
    return not (is_lr(key) or key == "skipped" or key.endswith(("_s", "_bytes")))


def is_lr(key: str) -> bool:
    """Return whether a metric is a learning rate."""
    return key == "lr" or key.startswith(("lr_", "lr.", "lr/"))


def ordered(run: Facts) -> list[str]:
    """Return a run's model metrics: the loss, the deciding metric, then the others."""
    best = run.best.metric if run.best else ""
    names = [key for key in keys(run.lines) if is_measure(key)]
    return sorted(names, key=lambda key: (key != "loss", key != best))


def measures(run: Facts) -> list[Chart]:
    """Return loss and metrics: training raw and smoothed, evaluation as dots."""
    return [_measure(run, key) for key in ordered(run)[:MAX_CHARTS]]


def _measure(run: Facts, key: str) -> Chart:
    raw = points(run.lines, "train", key)
    lines = _smooth("training", raw, 1)
    lines.append(Curve("evaluation", points(run.lines, "eval", key), 2, "dots"))
    return Chart(title(key), lines, key, may_log=_may_log(key), note=_hidden(run, key))


def _hidden(run: Facts, key: str) -> str:
    """Return a note with the number of non-finite values, which files store as null."""
    count = sum(key in line and not is_number(line[key]) for line in run.lines)
    return f"{count:,} not finite" if count else ""


def _smooth(name: str, raw: curves.Points, colour: int) -> list[Curve]:
    soft = smoothed(raw)
    if soft is raw:
        return [Curve(name or "measured", raw, colour)]
    names = (f"{name}, {how}".removeprefix(", ") for how in ("raw", "smoothed"))
    return [Curve(next(names), raw, colour, "faint"), Curve(next(names), soft, colour)]


def _may_log(key: str) -> bool:
    return "loss" in key or "perplexity" in key or key == "grad_norm" or key.endswith("_s")


def title(key: str) -> str:
    """Return a metric's name as a heading."""
    titles = {
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "samples_per_s": "Throughput",
        "eval_s": "Evaluation time",
    }
    if key in titles:
        return titles[key]
    text = key.removesuffix("_per_s") + (" per second" if key.endswith("_per_s") else "")
    text = text.replace("_", " ").removesuffix(" bytes").removesuffix(" s")
    return text[:1].upper() + text[1:]


def machine(run: Facts) -> list[Chart]:
    """Return learning rate, throughput, step times, saves and other machine metrics."""
    names = keys(run.lines)
    rates = [key for key in names if is_lr(key)]
    lr = [
        Curve(key, points(run.lines, "train", key), index % COLOURS + 1)
        for index, key in enumerate(rates)
    ]
    charts = [Chart("Learning rate", lr, "lr")]
    for key in (key for key in names if key.endswith("_per_s")):
        charts.append(_pace(run, key))
    times = [
        Curve(name, points(run.lines, "train", key), colour)
        for colour, (key, name) in enumerate(_STEP_TIMES.items(), 1)
    ]
    charts.append(Chart("Step time", times, "step_s", may_log=True))
    charts.append(Chart("Saves", _saves(run), "save_s", may_log=True))
    handled = [*rates, *_STEP_TIMES]
    for key in names:
        if key not in handled and not is_measure(key) and not key.endswith("_per_s"):
            measured = [
                Curve("training", points(run.lines, "train", key), 1),
                Curve("evaluation", points(run.lines, "eval", key), 2, "dots"),
            ]
            charts.append(Chart(title(key), measured, key, may_log=_may_log(key)))
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def _pace(run: Facts, key: str) -> Chart:
    raw = points(run.lines, "train", key)
    values = sorted(value for _, value in raw)
    note = ""
    if values:
        note = f"median {quantity(key, values[len(values) // 2])}"
    return Chart(title(key), _smooth("", raw, 1), key, note=note)


def _saves(run: Facts) -> list[Curve]:
    def curve(name: str, key: str, colour: int) -> Curve:
        values = [(s["step"], float(s[key])) for s in run.saves if is_number(s.get(key))]
        return Curve(name, sorted(values), colour, "dots")

    return [curve("save", "save_s", 1), curve("training stalled", "stall_s", 2)]


def overlaid(runs: Sequence[Facts], names: Sequence[str]) -> list[Chart]:
    """Return charts with the metrics of several runs overlaid, evaluations first."""
    shared = list(dict.fromkeys(key for run in runs for key in ordered(run)))
    shared.sort(key=lambda key: key != "loss")
    charts = []
    for key in shared[:MAX_CHARTS]:
        for split, style, label in (("eval", "dots", "evaluation"), ("train", "line", "training")):
            charts.append(_overlay(runs, names, split, key, style, f"{title(key)}, {label}"))
    for key in ("lr", "samples_per_s", "tokens_per_s"):
        charts.append(_overlay(runs, names, "train", key, "line", title(key)))
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def _overlay(
    runs: Sequence[Facts], names: Sequence[str], split: str, key: str, style: str, heading: str
) -> Chart:
    overlay = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        raw = points(run.lines, split, key)
        soft = raw if split == "eval" or is_lr(key) else smoothed(raw)
        overlay.append(Curve(name, soft, index % COLOURS + 1, style))
    note = "smoothed" if split == "train" and not is_lr(key) else ""
    return Chart(heading, overlay, key, may_log=_may_log(key), note=note)
