"""When attempts ran, and the clock of their time line. Pure."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from trainer.checkpoint.attempts import moment_s
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Facts

_GAP_SHARE = 0.04
"""An idle time takes at most this share of the time in which something ran."""


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
