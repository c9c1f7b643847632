"""The parts of a run's page that are tables and tiles."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.checkpoint.inspection import CheckpointStatus
from trainer.core.formatting import age, duration, integer, iso, number, pluralize, size
from trainer.reporting import figures
from trainer.reporting.curves import is_number, points
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, listing, tag
from trainer.reporting.scales import quantity

_KNOWN = frozenset(
    {
        "attempt", "token", "started", "ended", "told", "first_step", "last_step", "outcome",
        "reason", "error", "resumed_from", "save_s", "starting_s", "training_s", "resume", "pid",
        "max_steps", "steps_per_epoch", "changed",
    }
)  # fmt: skip
"""What is shown of an attempt's record in other places, or tells a person nothing."""


# --- head --------------------------------------------------------------------------------------


def pill(run: Facts) -> Html:
    """Return how the run is, as a badge."""
    state = run.standing.state
    return tag("span", state, class_=f"pill {state}")


def since(run: Facts) -> str:
    """Return since when the run is as it is, in words."""
    standing = run.standing
    if standing.since_s is None:
        return standing.why
    ago = f"{age(standing.since_s)} ago"
    words = {
        "running": f"heard of {ago}",
        "silent": f"not heard of since {ago.removesuffix(' ago')}",
    }
    text = words.get(standing.state, ago)
    return f"{text}: {standing.why}" if standing.why else text


def tiles(run: Facts) -> Html:
    """Return the figures that one looks for first."""
    newest = max((run.last("train"), run.last("eval")), key=lambda line: line.get("step", -1))
    good, best = run.goodput, run.best
    took_s = good.starting_s + good.training_s
    shown = [
        _tile("step", number(run.step), _of(run.step, run.max_steps), share=_share(run)),
        _tile("epoch", integer(newest.get("epoch")), f"{integer(newest.get('samples'))} samples"),
    ]
    if best is not None:
        shown.append(_tile(f"best {best.metric}", number(best.value), f"at step {best.step:,}"))
    for split, key in (("eval", "loss"), ("train", "loss")):
        line = run.last(split)
        if is_number(line.get(key)) and (best is None or (split, key) != ("eval", best.metric)):
            name = "eval loss" if split == "eval" else "train loss"
            shown.append(_tile(name, number(line[key]), f"at step {line['step']:,}"))
    if took_s:
        parts = f"{duration(good.training_s)} training"
        shown.append(_tile("time", duration(took_s), parts))
    if run.records:
        lost = good.all_steps - good.useful_steps
        text = f"{pluralize(lost, 'step')} repeated"
        shown.append(_tile("goodput", f"{100 * good.share:.1f} %", text))
    rates = sorted(value for _, value in points(run.lines, "train", "samples_per_s"))
    if rates:
        median = f"{number(rates[len(rates) // 2], 3)}/s"
        shown.append(_tile("throughput", median, "samples; median"))
    return tag("div", *shown, class_="tiles")


def _of(step: int, most: int | None) -> str:
    return "" if most is None else f"of {most:,}"


def _share(run: Facts) -> float | None:
    return min(run.step / run.max_steps, 1.0) if run.max_steps else None


def _tile(name: str, value: str, more: str, share: float | None = None) -> Html:
    bar = None
    if share is not None:
        bar = tag("i", tag("i", style=f"width:{100 * share:.2f}%"), class_="meter")
    head = tag("span", name, class_="what")
    return tag("div", head, tag("b", value), bar, tag("small", more), class_="tile")


# --- system ------------------------------------------------------------------------------------


def system(run: Facts) -> Html:
    """Return what the attempts ran on; what was not the same for all is marked."""
    if not run.records:
        return tag("p", "No attempt has left a record of what it ran on.", class_="none")
    facts: dict[str, list[Any]] = {}
    for record in run.records:
        for key, value in _flat(record).items():
            facts.setdefault(key, []).append(value)
    rows = []
    for key, values in facts.items():
        counts = Counter(_fact(key, value) for value in values)
        newest = _fact(key, values[-1])
        others = [text for text in counts if text != newest]
        more = tag("span", "earlier: " + ", ".join(others), class_="before") if others else None
        rows.append([key.replace("_", " "), joined([newest, more])])
    return listing(["", f"attempt {run.records[-1].get('attempt')}"], rows, class_="facts")


def _fact(key: str, value: Any) -> str:
    """Return a fact with its unit; of one that each rank has of its own, the largest."""
    if isinstance(value, list) and value and all(map(is_number, value)):
        return f"{_fact(key, max(value))} (the largest of {len(value):,})"
    is_measured = is_number(value) and key.endswith(("_s", "_bytes"))
    return quantity(key, value) if is_measured else str(value)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in _KNOWN:
            continue
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{key}: {name}" if name else key: one for name, one in inner}
    return {key.removeprefix("versions: "): value for key, value in found.items()}


# --- checkpoints -------------------------------------------------------------------------------


def checkpoints(run: Facts) -> Html:
    """Return a table of the checkpoints, the newest first, the best one marked."""
    if not run.checkpoints:
        return tag("p", "There is no checkpoint.", class_="none")
    best = _best_step(run)
    rows = [_checkpoint(found, found.commit.step == best) for found in reversed(run.checkpoints)]
    titles = ["step", "attempt", "saved (UTC)", "age", "size", "ranks", "state", "metrics"]
    return listing(titles, rows, numbers=(0, 1, 3, 4, 5), plain=(2,))


def _best_step(run: Facts) -> int | None:
    """Return the step of the best checkpoint that is still there."""
    best = run.best
    if best is None:
        return None
    kept = [
        (found.metrics[best.metric], -found.commit.step)
        for found in run.checkpoints
        if found.state == "intact" and is_number(found.metrics.get(best.metric))
    ]
    sign = -1 if best.mode == "min" else 1
    return -max(kept, key=lambda one: (sign * one[0], one[1]))[1] if kept else None


def _checkpoint(found: CheckpointStatus, is_best: bool) -> Sequence[object]:
    saved = "–"
    if found.saved_s is not None:
        saved = iso(found.saved_s).removesuffix("+00:00").replace("T", " ")
    shown = [f"{name} {number(value)}" for name, value in found.metrics.items()]
    pill = tag("span", found.state, class_=f"pill {found.state}")
    state = joined([pill, " ", found.reason or None])
    badge = tag("span", "best", class_="pill best") if is_best else None
    return [
        f"{found.commit.step:,}",
        found.commit.attempt,
        saved,
        "" if found.saved_s is None else age(found.saved_s),
        size(found.size_bytes),
        found.manifest.world_size if found.manifest else "",
        state,
        joined([badge, " " if is_best else None, ", ".join(shown)]),
    ]


# --- runs beside one another -------------------------------------------------------------------


def summary(runs: Sequence[Facts], names: Sequence[str]) -> Html:
    """Return one line a run: how it is, and its final and best figures."""
    keys = list(dict.fromkeys(key for run in runs for key in figures.ordered(run)))
    measured = [key for key in keys if any(points(run.lines, "eval", key) for run in runs)]
    titles = ["run", "state", "step", "time", *(f"{key}, last" for key in measured)]
    titles += ["best", "at step"]
    winner = _winner(runs)
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        good, best = run.goodput, run.best
        swatch = tag("i", class_=f"key c{index % 8 + 1} line")
        last = [number(run.last("eval").get(key)) for key in measured]
        chosen: list[object] = ["–", "–"]
        if best is not None:
            text = f"{best.metric} {number(best.value)}"
            chosen = [tag("b", text) if index == winner else text, f"{best.step:,}"]
        took = duration(good.starting_s + good.training_s)
        rows.append([joined([swatch, name]), pill(run), f"{run.step:,}", took, *last, *chosen])
    return listing(titles, rows, numbers=range(2, len(titles)))


def _winner(runs: Sequence[Facts]) -> int | None:
    """Return which run is best, where all are judged by the same figure and none is as good."""
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
