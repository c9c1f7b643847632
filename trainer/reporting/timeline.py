"""A time line of a run: its attempts, saves and evaluations, idle times cut short."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.core.formatting import duration, iso
from trainer.reporting.clock import Clock, Span, clock
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, tag

_TICKS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
            86400, 172800, 604800)  # fmt: skip
_MOST_MARKS = 400


def draw(run: Facts, found: Sequence[Span]) -> Html:
    """Return the time line; one sentence where no attempt left a record."""
    if not found:
        return tag("p", "No attempt has left a record, so there is no time line.", class_="none")
    place = clock(found)
    lanes = [
        _lane("" if index else "attempts", *_bars(run, lane, place))
        for index, lane in enumerate(_lanes(found))
    ]
    marks = [
        _lane("stops", *_marks(_stops(found), place, "stop")),
        _lane("saves", *_marks(_saves(run), place, "save")),
        _lane("evaluations", *_marks(_evaluations(run), place, "eval")),
    ]
    rows = tag("div", _gaps(place), *lanes, *marks, _times(place), class_="timeline")
    return joined([rows, _key()])


def _lanes(found: Sequence[Span]) -> list[list[Span]]:
    """Put attempts that overlap, as one that was superseded does, into lanes of their own."""
    lanes: list[list[Span]] = []
    for span in found:
        free = next((lane for lane in lanes if lane[-1].end_s <= span.begin_s), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _lane(name: str, *content: Html) -> Html:
    return tag("div", tag("b", name), tag("div", *content, class_="track"), class_="lane")


def state_of(span: Span, run: Facts) -> str:
    """Return how an attempt is, in one word that is also a class of the page."""
    if span.record is run.records[-1]:
        return run.standing.state
    return outcome(span.record)


def outcome(record: Mapping[str, Any]) -> str:
    """Return how an attempt ended that is not the newest, in one word."""
    named = {"done": "finished", "preempted": "stopped"}
    return named.get(str(record.get("outcome")), "died")


def _bars(run: Facts, lane: Sequence[Span], place: Clock) -> list[Html]:
    bars = []
    for span in lane:
        left, middle, right = place(span.begin_s), place(span.train_s), place(span.end_s)
        state = state_of(span, run)
        number = span.record.get("attempt", "?")
        told = f"attempt {number}: {duration(span.end_s - span.begin_s)} from {iso(span.begin_s)}"
        for part, begin, end in (("starting", left, middle), ("training", middle, right)):
            shown = number if part == "training" and end - begin > 3 else ""
            style = f"left:{begin:.3f}%;width:{end - begin:.3f}%"
            if end > begin or part == "training":
                bars.append(tag("i", shown, class_=f"bar {part} {state}", style=style, title=told))
    return bars


Mark = tuple[float, float, str]
"""When it began, how long it took, what there is to say."""


def _marks(found: Sequence[Mark], place: Clock, kind: str) -> list[Html]:
    stride = -(-len(found) // _MOST_MARKS) or 1
    marks = []
    for begin_s, length_s, text in found[::stride]:
        left = place(begin_s)
        style = f"left:{left:.3f}%;width:{place(begin_s + length_s) - left:.3f}%"
        marks.append(tag("i", class_=f"mark {kind}", style=style, title=text))
    return marks


def _stops(found: Sequence[Span]) -> list[Mark]:
    over = [span for span in found if span.record.get("outcome") != "done"]
    return [
        (span.end_s, 0.0, f"attempt {span.record.get('attempt')}: {why(span.record)}")
        for span in over
        if span.has_ended or span is not found[-1]
    ]


def why(record: Mapping[str, Any]) -> str:
    """Return how an attempt ended and why, as its record has it."""
    if "ended" not in record:
        return "no word of its end (killed, or still running)"
    if record.get("outcome") == "done":
        return "done"
    reason = record.get("error") or record.get("reason")
    kind = "stopped" if record.get("outcome") == "preempted" else "died"
    return f"{kind}: {reason}" if reason else kind


def _saves(run: Facts) -> list[Mark]:
    noted = [
        (float(save["time"]) - _seconds(save, "save_s"), _seconds(save, "save_s"), save["step"])
        for save in run.saves
        if is_number(save.get("time"))
    ]
    known = {step for _, _, step in noted}
    noted += [
        (found.saved_s, 0.0, found.commit.step)
        for found in run.checkpoints
        if found.saved_s is not None and found.commit.step not in known
    ]
    return [(at, took, f"checkpoint of step {step:,}") for at, took, step in sorted(noted)]


def _evaluations(run: Facts) -> list[Mark]:
    found = []
    for line in run.lines:
        if line["split"] == "eval" and is_number(line.get("time")):
            took_s = _seconds(line, "eval_s")
            text = f"evaluation at step {line['step']:,}"
            found.append((float(line["time"]) - took_s, took_s, text))
    return found


def _seconds(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    return max(float(value), 0.0) if is_number(value) else 0.0  # type: ignore[arg-type]


def _gaps(place: Clock) -> Html:
    """Return the bands of idle time; those that are cut short say how long they were."""
    bands = []
    for gap in place.gaps():
        left, right = place(gap[0]), place(gap[1])
        text = f"nothing ran for {duration(gap[1] - gap[0])}"
        cut = " cut" if place.is_cut(gap) else ""
        style = f"left:{left:.3f}%;width:{right - left:.3f}%"
        bands.append(tag("i", class_=f"idle{cut}", style=style, title=text))
    return tag("div", tag("div", *bands, class_="track"), class_="idles")


def _times(place: Clock) -> Html:
    """Return clock times below, a few and none too near to the next."""
    work_s = sum(end - begin for begin, end in place.busy)
    each_s = next((tick for tick in _TICKS_S if tick >= work_s / 5), _TICKS_S[-1])
    labels: list[Html] = []
    last, day = -100.0, ""
    moments = [place.busy[0][0]]
    for begin, end in place.busy:
        first = int(begin // each_s + 1)
        moments += [tick * each_s for tick in range(first, min(int(end // each_s), first + 50) + 1)]
    for at_s in moments:
        left = place(at_s)
        if left - last < 9 or left > 93:
            continue
        date, _, time_of_day = iso(at_s).removesuffix("+00:00").partition("T")
        text = time_of_day if date == day else f"{date} {time_of_day}"
        labels.append(tag("span", text, style=f"left:{left:.2f}%"))
        last, day = left + (8 if date != day else 0), date
    return tag("div", tag("b", "UTC"), tag("div", *labels), class_="x clock")


def _key() -> Html:
    entries = [
        ("bar starting", "starting"),
        ("bar training finished", "training"),
        ("bar training stopped", "training, then stopped in order"),
        ("bar training died", "training, then died"),
        ("idle cut", "idle, cut short"),
    ]
    return tag(
        "p",
        *(tag("span", tag("i", class_=name), text) for name, text in entries),
        class_="legend keys",
    )
