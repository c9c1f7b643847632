"""A time line of a run: its attempts, saves and evaluations, idle times cut short."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from trainer.history import moment_s
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts
from trainer.reporting.markup import Html, joined, tag
from trainer.reporting.scales import duration
from trainer.terminal import iso

_GAP_SHARE = 0.04
"""An idle time takes at most this share of the time in which something ran."""
_TICKS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
            86400, 172800, 604800)  # fmt: skip
_MOST_MARKS = 400


@dataclass(frozen=True)
class Span:
    """One attempt on the clock."""

    record: Mapping[str, Any]
    begin_s: float
    train_s: float
    """When its first step began."""
    end_s: float
    has_ended: bool


def spans(run: Facts) -> list[Span]:
    """Return when each attempt began, trained and ended, as far as it has said."""
    found = []
    times = sorted(float(line["time"]) for line in run.lines if is_number(line.get("time")))
    for index, record in enumerate(run.records):
        begin_s = moment_s(record.get("started"))
        if begin_s is None:
            continue
        end_s = moment_s(record.get("ended"))
        if end_s is None:  # what it told last, or wrote last
            end_s = _last_sign_s(run, index, begin_s, times)
        end_s = max(end_s, begin_s)
        starting_s = record.get("starting_s")
        first = float(starting_s) if is_number(starting_s) else 0.0  # type: ignore[arg-type]
        train_s = min(begin_s + max(first, 0.0), end_s)
        found.append(Span(record, begin_s, train_s, end_s, "ended" in record))
    return sorted(found, key=lambda span: span.begin_s)


def _last_sign_s(run: Facts, index: int, begin_s: float, times: Sequence[float]) -> float:
    """Return when an attempt that told no end was alive for certain; `times` are of all lines."""
    told_s = moment_s(run.records[index].get("told"))
    known = [begin_s, *([] if told_s is None else [told_s])]
    until_s = run.read_s
    if index + 1 < len(run.records):
        until_s = moment_s(run.records[index + 1].get("started")) or begin_s
    elif run.standing.state in ("running", "starting"):
        known.append(run.read_s)
    before = bisect_right(times, until_s)
    return max([*known, *times[max(before - 1, 0) : before]])


@dataclass(frozen=True)
class Clock:
    """Maps times to 0 … 100 per cent of the width; idle times between `busy` ones are cut short."""

    busy: Sequence[tuple[float, float]]
    """Begin and end, apart from one another, rising."""

    def gaps(self) -> list[tuple[float, float]]:
        """Return the idle times, each as begin and end."""
        return [(before[1], after[0]) for before, after in pairwise(self.busy)]

    def is_cut(self, gap: tuple[float, float]) -> bool:
        """Return whether an idle time is drawn shorter than it was."""
        return self._most_idle_s < gap[1] - gap[0]

    def __call__(self, at_s: float) -> float:
        """Return the place of a moment."""
        moments, places = self._knots
        index = min(max(bisect_right(moments, at_s), 1), len(moments) - 1)
        before_s, after_s = moments[index - 1], moments[index]
        share = (at_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
        left, right = places[index - 1], places[index]
        whole = places[-1] or 1.0
        return 100 * (left + (right - left) * min(max(share, 0.0), 1.0)) / whole

    @cached_property
    def _most_idle_s(self) -> float:
        return _GAP_SHARE * sum(end - begin for begin, end in self.busy)

    @cached_property
    def _knots(self) -> tuple[list[float], list[float]]:
        """Return begins and ends, and the seconds that are drawn before each."""
        moments, places, drawn_s = list[float](), list[float](), 0.0
        for begin, end in self.busy:
            if moments:
                drawn_s += min(begin - moments[-1], self._most_idle_s)
            moments += [begin, end]
            places += [drawn_s, drawn_s + end - begin]
            drawn_s = places[-1]
        return moments, places


def clock(found: Sequence[Span]) -> Clock:
    """Return the clock of these attempts."""
    busy: list[tuple[float, float]] = []
    for span in found:
        if busy and span.begin_s <= busy[-1][1]:
            busy[-1] = (busy[-1][0], max(busy[-1][1], span.end_s))
        else:
            busy.append((span.begin_s, span.end_s))
    return Clock(busy)


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
