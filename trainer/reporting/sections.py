"""Tables and tiles of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint.inspection import CheckpointStatus
from trainer.core.formatting import age, duration, integer, iso, number, pluralize, size
from trainer.reporting import metric_charts
from trainer.reporting.curves import is_number, points
from trainer.reporting.facts import Facts
from trainer.reporting.scales import quantity

_OMITTED = frozenset(
    {
        "attempt", "token", "started", "ended", "told", "first_step", "last_step", "outcome",
        "reason", "error", "resumed_from", "save_s", "starting_s", "training_s", "resume", "pid",
        "max_steps", "steps_per_epoch", "changed", "best",
    }
)  # fmt: skip
"""Keys of an attempt's record that other sections show, or that do not help a reader."""


# --- head --------------------------------------------------------------------------------------


def since(run: Facts) -> str:
    """Return the time and reason of the run's state."""
    condition = run.condition
    if condition.since_s is None:
        return condition.reason
    ago = f"{age(condition.since_s)} ago"
    phrases = {
        "running": f"active {ago}",
        "silent": f"no activity for {ago.removesuffix(' ago')}",
    }
    text = phrases.get(condition.state, ago)
    return f"{text}: {condition.reason}" if condition.reason else text


def tiles(run: Facts) -> list[dict[str, Any]]:
    """Return the headline numbers."""
    newest = max((run.last("train"), run.last("eval")), key=lambda line: line.get("step", -1))
    good, best = run.goodput, run.best
    took_s = good.starting_s + good.training_s
    tiles_shown = [
        _tile("step", number(run.step), _of(run.step, run.max_steps), progress=_progress(run)),
        _tile("epoch", integer(newest.get("epoch")), f"{integer(newest.get('samples'))} samples"),
    ]
    if best is not None:
        tiles_shown.append(
            _tile(f"best {best.metric}", number(best.value), f"at step {best.step:,}")
        )
    for split, key in (("eval", "loss"), ("train", "loss")):
        line = run.last(split)
        if is_number(line.get(key)) and (best is None or (split, key) != ("eval", best.metric)):
            name = "eval loss" if split == "eval" else "train loss"
            tiles_shown.append(_tile(name, number(line[key]), f"at step {line['step']:,}"))
    if took_s:
        parts = f"{duration(good.training_s)} training"
        tiles_shown.append(_tile("time", duration(took_s), parts))
    if run.records:
        lost = good.all_steps - good.useful_steps
        text = f"{pluralize(lost, 'step')} repeated"
        tiles_shown.append(_tile("goodput", f"{100 * good.fraction:.1f} %", text))
    rates = sorted(value for _, value in points(run.lines, "train", "samples_per_s"))
    if rates:
        median = f"{number(rates[len(rates) // 2], 3)}/s"
        tiles_shown.append(_tile("throughput", median, "samples; median"))
    return tiles_shown


def _of(step: int, limit: int | None) -> str:
    return "" if limit is None else f"of {limit:,}"


def _progress(run: Facts) -> float | None:
    return min(run.step / run.max_steps, 1.0) if run.max_steps else None


def _tile(name: str, value: str, more: str, progress: float | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "more": more, "progress": progress}


# --- system ------------------------------------------------------------------------------------


def system(run: Facts) -> dict[str, Any]:
    """Return hardware and versions of the newest attempt, with those of earlier ones."""
    facts: dict[str, list[Any]] = {}
    for record in run.records:
        for key, value in _flat(record).items():
            facts.setdefault(key, []).append(value)
    rows = []
    for key, values in facts.items():
        newest = _fact(key, values[-1])
        earlier = dict.fromkeys(text for value in values if (text := _fact(key, value)) != newest)
        rows.append({"name": key.replace("_", " "), "value": newest, "earlier": list(earlier)})
    return {"attempt": run.records[-1].get("attempt") if run.records else None, "rows": rows}


def _fact(key: str, value: Any) -> str:
    """Return a fact with its unit; for a list with a value per rank, the largest."""
    if isinstance(value, list) and value and all(map(is_number, value)):
        return f"{_fact(key, max(value))} (the largest of {len(value):,})"
    is_measured = is_number(value) and key.endswith(("_s", "_bytes"))
    return quantity(key, value) if is_measured else str(value)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key, value in record.items():
        if key in _OMITTED:
            continue
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        entry |= {f"{key}: {name}" if name else key: one for name, one in items}
    return {key.removeprefix("versions: "): value for key, value in entry.items()}


# --- checkpoints -------------------------------------------------------------------------------


def checkpoints(run: Facts) -> list[dict[str, Any]]:
    """Return the rows of the checkpoints, newest first."""
    best = _best_step(run)
    return [_checkpoint(entry, entry.commit.step == best) for entry in reversed(run.checkpoints)]


def _best_step(run: Facts) -> int | None:
    """Return the step of the best existing checkpoint."""
    best = run.best
    if best is None:
        return None
    candidates = [
        (entry.metrics[best.metric], -entry.commit.step)
        for entry in run.checkpoints
        if entry.state == "intact" and is_number(entry.metrics.get(best.metric))
    ]
    sign = -1 if best.mode == "min" else 1
    return -max(candidates, key=lambda one: (sign * one[0], one[1]))[1] if candidates else None


def _checkpoint(entry: CheckpointStatus, is_best: bool) -> dict[str, Any]:
    saved, saved_age = "–", ""
    if entry.saved_s is not None:
        saved = iso(entry.saved_s).removesuffix("+00:00").replace("T", " ")
        saved_age = age(entry.saved_s)
    return {
        "step": entry.commit.step,
        "attempt": entry.commit.attempt,
        "saved": saved,
        "age": saved_age,
        "size": size(entry.size_bytes),
        "ranks": entry.manifest.world_size if entry.manifest else "",
        "state": entry.state,
        "reason": entry.reason,
        "is_best": is_best,
        "metrics": ", ".join(f"{name} {number(value)}" for name, value in entry.metrics.items()),
    }


# --- comparison of runs ------------------------------------------------------------------------


def summary(runs: Sequence[Facts], names: Sequence[str]) -> dict[str, Any]:
    """Return a row per run: state, final and best metrics."""
    keys = list(dict.fromkeys(key for run in runs for key in metric_charts.ordered(run)))
    measured = [key for key in keys if any(points(run.lines, "eval", key) for run in runs)]
    winner = _winner(runs)
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        good, best = run.goodput, run.best
        rows.append({
            "name": name,
            "colour": index % metric_charts.COLOURS + 1,
            "state": run.condition.state,
            "step": run.step,
            "time": duration(good.starting_s + good.training_s),
            "last": [number(run.last("eval").get(key)) for key in measured],
            "best": f"{best.metric} {number(best.value)}" if best else "–",
            "best_step": f"{best.step:,}" if best else "–",
            "is_winner": index == winner,
        })  # fmt: skip
    last = [f"{key}, last" for key in measured]
    titles = ["run", "state", "step", "time", *last, "best", "at step"]
    return {"titles": titles, "rows": rows}


def _winner(runs: Sequence[Facts]) -> int | None:
    """Return the index of the best run, if all use the same metric and it is unique."""
    best = [run.best for run in runs]
    if len({(one.metric, one.mode) for one in best if one}) != 1:
        return None
    signed = {
        index: -one.value if one.mode == "min" else one.value
        for index, one in enumerate(best)
        if one
    }
    top = [index for index, value in signed.items() if value == max(signed.values())]
    return top[0] if len(top) == 1 else None
