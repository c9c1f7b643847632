"""Run times of attempts and the time axis of the timeline. Pure."""

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
"""Maximum width of an idle time, as a fraction of the busy time."""


@dataclass(frozen=True)
class Span:
    """Run time of one attempt."""

    record: Mapping[str, Any]
    begin_s: float
    train_s: float
    """Start of the first step."""
    end_s: float
    has_ended: bool


def spans(run: Facts) -> list[Span]:
    """Return start, first step and end of each attempt, as far as recorded."""
    attempt_spans = []
    times = sorted(float(line["time"]) for line in run.lines if is_number(line.get("time")))
    for index, record in enumerate(run.records):
        begin_s = moment_s(record.get("started"))
        if begin_s is None:
            continue
        end_s = moment_s(record.get("ended"))
        if end_s is None:  # the last heartbeat or metric
            end_s = _last_sign_s(run, index, begin_s, times)
        end_s = max(end_s, begin_s)
        starting_s = record.get("starting_s")
        first = float(starting_s) if is_number(starting_s) else 0.0  # type: ignore[arg-type]
        train_s = min(begin_s + max(first, 0.0), end_s)
        attempt_spans.append(Span(record, begin_s, train_s, end_s, "ended" in record))
    return sorted(attempt_spans, key=lambda span: span.begin_s)


def _last_sign_s(run: Facts, index: int, begin_s: float, times: Sequence[float]) -> float:
    """Return the last sign of life of an attempt without an end; `times` are of all lines."""
    heartbeat_s = moment_s(run.records[index].get("told"))
    moments_alive = [begin_s, *([] if heartbeat_s is None else [heartbeat_s])]
    until_s = run.read_s
    if index + 1 < len(run.records):
        until_s = moment_s(run.records[index + 1].get("started")) or begin_s
    elif run.condition.state in ("running", "starting"):
        moments_alive.append(run.read_s)
    before = bisect_right(times, until_s)
    return max([*moments_alive, *times[max(before - 1, 0) : before]])


@dataclass(frozen=True)
class Clock:
    """Maps times to 0 … 100 per cent of the width; long idle times are shortened."""

    busy: Sequence[tuple[float, float]]
    """Disjoint (start, end) intervals, ascending."""

    def gaps(self) -> list[tuple[float, float]]:
        """Return the idle intervals."""
        return [(before[1], after[0]) for before, after in pairwise(self.busy)]

    def is_cut(self, gap: tuple[float, float]) -> bool:
        """Return whether an idle interval is shortened."""
        return self._most_idle_s < gap[1] - gap[0]

    def __call__(self, at_s: float) -> float:
        """Return the position of a time, in per cent."""
        moments, positions = self._knots
        index = min(max(bisect_right(moments, at_s), 1), len(moments) - 1)
        before_s, after_s = moments[index - 1], moments[index]
        fraction = (at_s - before_s) / (after_s - before_s) if after_s > before_s else 0.0
        before_place, after_place = positions[index - 1], positions[index]
        total = positions[-1] or 1.0
        return (
            100
            * (before_place + (after_place - before_place) * min(max(fraction, 0.0), 1.0))
            / total
        )

    @cached_property
    def _most_idle_s(self) -> float:
        return _GAP_SHARE * sum(end - begin for begin, end in self.busy)

    @cached_property
    def _knots(self) -> tuple[list[float], list[float]]:
        """Return interval bounds and the drawn seconds before each."""
        moments, positions, drawn_so_far_s = list[float](), list[float](), 0.0
        for begin, end in self.busy:
            if moments:
                drawn_so_far_s += min(begin - moments[-1], self._most_idle_s)
            moments += [begin, end]
            positions += [drawn_so_far_s, drawn_so_far_s + end - begin]
            drawn_so_far_s = positions[-1]
        return moments, positions


def clock(attempt_spans: Sequence[Span]) -> Clock:
    """Return the time axis of these attempts."""
    busy: list[tuple[float, float]] = []
    for span in attempt_spans:
        if busy and span.begin_s <= busy[-1][1]:
            busy[-1] = (busy[-1][0], max(busy[-1][1], span.end_s))
        else:
            busy.append((span.begin_s, span.end_s))
    return Clock(busy)
