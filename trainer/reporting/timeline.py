"""The timeline of a run: attempts, saves and evaluations; long idle times are shortened."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.core.formatting import duration, iso
from trainer.reporting.clock import Clock, Span, clock
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts

_TICKS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
            86400, 172800, 604800)  # fmt: skip
_MOST_MARKS = 400


Mark = dict[str, Any]
"""A bar or mark: its classes, `left` and `width` in percent, text and tooltip."""


def drawn(run: Facts, spans: Sequence[Span]) -> dict[str, Any] | None:
    """Return lanes, idle times and clock times; None without attempt records."""
    if not spans:
        return None
    position = clock(spans)
    lanes = [
        ("" if index else "attempts", _bars(run, lane, position))
        for index, lane in enumerate(_lanes(spans))
    ]
    lanes += [
        ("stops", _marks(_stops(spans), position, "stop")),
        ("saves", _marks(_saves(run), position, "save")),
        ("evaluations", _marks(_evaluations(run), position, "eval")),
    ]
    return {"lanes": lanes, "idle": _gaps(position), "times": _times(position)}


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Put overlapping attempts, such as a superseded one, into separate lanes."""
    lanes: list[list[Span]] = []
    for span in spans:
        free = next((lane for lane in lanes if lane[-1].end_s <= span.begin_s), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def state_of(span: Span, run: Facts) -> str:
    """Return an attempt's state, which is also a CSS class of the page."""
    if span.record is run.records[-1]:
        return run.condition.state
    return outcome(span.record)


def outcome(record: Mapping[str, Any]) -> str:
    """Return the outcome of an attempt that is not the newest."""
    named = {"done": "finished", "preempted": "stopped"}
    return named.get(str(record.get("outcome")), "died")


def _mark(kind: str, begin: float, end: float, title: str, text: object = "") -> Mark:
    return {"kind": kind, "left": begin, "width": end - begin, "title": title, "text": text}


def _bars(run: Facts, lane: Sequence[Span], position: Clock) -> list[Mark]:
    bars = []
    for span in lane:
        x, x_step, x_end = map(position, (span.begin_s, span.train_s, span.end_s))
        state = state_of(span, run)
        number = span.record.get("attempt", "?")
        label = f"attempt {number}: {duration(span.end_s - span.begin_s)} from {iso(span.begin_s)}"
        if x_step > x:
            bars.append(_mark(f"bar starting {state}", x, x_step, label))
        text = number if x_end - x_step > 3 else ""
        bars.append(_mark(f"bar training {state}", x_step, x_end, label, text))
    return bars


Moment = tuple[float, float, str]
"""(start, duration, text) of a mark."""


def _marks(moments: Sequence[Moment], position: Clock, kind: str) -> list[Mark]:
    stride = -(-len(moments) // _MOST_MARKS) or 1
    return [
        _mark(f"mark {kind}", position(begin_s), position(begin_s + length_s), text)
        for begin_s, length_s, text in moments[::stride]
    ]


def _stops(spans: Sequence[Span]) -> list[Moment]:
    over = [span for span in spans if span.record.get("outcome") != "done"]
    return [
        (span.end_s, 0.0, f"attempt {span.record.get('attempt')}: {ending(span.record)}")
        for span in over
        if span.has_ended or span is not spans[-1]
    ]


def ending(record: Mapping[str, Any]) -> str:
    """Return the recorded end of an attempt and its reason."""
    if "ended" not in record:
        return "no end recorded (killed, or still running)"
    if record.get("outcome") == "done":
        return "done"
    reason = record.get("error") or record.get("reason")
    kind = "stopped" if record.get("outcome") == "preempted" else "died"
    return f"{kind}: {reason}" if reason else kind


def _saves(run: Facts) -> list[Moment]:
    marks = [
        (float(save["time"]) - _seconds(save, "save_s"), _seconds(save, "save_s"), save["step"])
        for save in run.saves
        if is_number(save.get("time"))
    ]
    steps_noted = {step for _, _, step in marks}
    marks += [
        (spans.saved_s, 0.0, spans.commit.step)
        for spans in run.checkpoints
        if spans.saved_s is not None and spans.commit.step not in steps_noted
    ]
    return [(at, took_s, f"checkpoint of step {step:,}") for at, took_s, step in sorted(marks)]


def _evaluations(run: Facts) -> list[Moment]:
    spans = []
    for line in run.lines:
        if line["split"] == "eval" and is_number(line.get("time")):
            took_s = _seconds(line, "eval_s")
            text = f"evaluation at step {line['step']:,}"
            spans.append((float(line["time"]) - took_s, took_s, text))
    return spans


def _seconds(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    return max(float(value), 0.0) if is_number(value) else 0.0  # type: ignore[arg-type]


def _gaps(position: Clock) -> list[Mark]:
    """Return the bands of idle time; shortened ones state their duration."""
    return [
        _mark(
            "idle cut" if position.is_cut(gap) else "idle",
            position(gap[0]),
            position(gap[1]),
            f"nothing ran for {duration(gap[1] - gap[0])}",
        )
        for gap in position.gaps()
    ]


def _times(position: Clock) -> list[tuple[str, float]]:
    """Return a few well-spaced clock times, with their positions in percent."""
    work_s = sum(end - begin for begin, end in position.busy)
    interval_s = next((tick for tick in _TICKS_S if tick >= work_s / 5), _TICKS_S[-1])
    labels: list[tuple[str, float]] = []
    last, day = -100.0, ""
    moments = [position.busy[0][0]]
    for begin, end in position.busy:
        first = int(begin // interval_s + 1)
        moments += [
            tick * interval_s for tick in range(first, min(int(end // interval_s), first + 50) + 1)
        ]
    for at_s in moments:
        x = position(at_s)
        if x - last < 9 or x > 93:
            continue
        date, _, time_of_day = iso(at_s).removesuffix("+00:00").partition("T")
        text = time_of_day if date == day else f"{date} {time_of_day}"
        labels.append((text, x))
        last, day = x + (8 if date != day else 0), date
    return labels
