"""Evaluate all attempt records of a run: goodput and the run's status."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

DIED = "error"
"""Outcome of an attempt that failed; also assumed if its record has no end."""

Record = Mapping[str, Any]


def run_id(records: Sequence[Record]) -> str:
    """Return an identifier that is the same in all attempts of a run and unique to it."""
    started = "".join(filter(str.isdigit, records[0]["started"][:19]))
    return f"{started}-{records[0]['token']}"


@dataclass(frozen=True)
class Goodput:
    """Steps and time of all attempts of a run, and the steps that were not lost."""

    attempts: int
    preempted: int
    useful_steps: int
    all_steps: int
    starting_s: float
    """Total time from the attempts' starts to their first steps."""
    training_s: float
    """Total time from the attempts' first steps to their ends."""

    @property
    def fraction(self) -> float:
        """Return the fraction of steps that were not lost."""
        return self.useful_steps / max(self.all_steps, 1)

    def __str__(self) -> str:
        """Return one line for the end of the log."""
        lost = self.all_steps - self.useful_steps
        return (
            f"{self.attempts} attempts ({self.preempted} preempted): {100 * self.fraction:.1f} % "
            f"of {self.all_steps:,} steps were useful, {lost:,} were repeated; "
            f"{self.starting_s:.0f} s of startup, {self.training_s:.0f} s of training"
        )


def goodput(records: Sequence[Record], step: int) -> Goodput:
    """Return the goodput of all attempts; the newest attempt is at `step`.

    For a killed attempt, the last step is that of its heartbeat, or of a checkpoint that a later
    attempt resumed from.
    """
    started = [record for record in records if type(record.get("first_step")) is int]
    steps = []
    for record in started:
        end = step if record is records[-1] else last_step(records, record) or 0
        steps.append(max(end - record["first_step"], 0))
    useful = step - started[0]["first_step"] if started else 0
    return Goodput(
        attempts=len(records),
        preempted=sum(record.get("outcome") == "preempted" for record in records),
        useful_steps=useful,
        all_steps=max(sum(steps), useful),
        starting_s=sum(_seconds(record, "starting_s") for record in records),
        training_s=sum(_seconds(record, "training_s") for record in records),
    )


def last_step(records: Sequence[Record], record: Record) -> int | None:
    """Return the last recorded step of an attempt, or the step that a later one resumed from."""
    steps = [record.get("last_step")]
    for later in records:
        origin = later.get("resumed_from")
        if isinstance(origin, Mapping) and origin.get("attempt") == record.get("attempt"):
            steps.append(origin.get("step"))
    return max((step for step in steps if type(step) is int), default=None)


def _seconds(record: Record, key: str) -> float:
    """Return a duration from a record; 0 if it is missing or invalid."""
    value: Any = record.get(key)
    is_valid = type(value) in (int, float) and 0 <= value < _MAX_S
    return float(value) if is_valid else 0.0


_MAX_S = 1e10
"""Longest valid duration."""


_QUIET_S = 90.0
"""Seconds without a heartbeat until a run is silent; heartbeats come every 30 s."""


@dataclass(frozen=True)
class Condition:
    """Status of a run, from its records."""

    state: str
    """finished, running, starting, stopped (can be resumed), died, silent (no end and no recent
    heartbeat), or unknown (no attempt record)."""
    since_s: float | None = None
    """Time of the last sign of activity, in seconds since 1970."""
    reason: str = ""


def condition(newest: Record | None, *, last_activity_s: float | None, now_s: float) -> Condition:
    """Return the status of a run.

    Args:
        newest: record of the newest attempt.
        last_activity_s: time of the newest logged metrics, in seconds since 1970.
        now_s: current time, in seconds since 1970.
    """
    if newest is None:
        return Condition("unknown", last_activity_s, "no attempt record")
    ended_s = moment_s(newest.get("ended"))
    if "ended" in newest:
        outcome = newest.get("outcome")
        state = {"done": "finished", "preempted": "stopped"}.get(str(outcome), "died")
        reason = newest.get("error") if state == "died" else newest.get("reason")
        return Condition(state, ended_s, str(reason or ""))
    times = [moment_s(newest.get(key)) for key in ("told", "started")]
    since_s = max((at for at in [*times, last_activity_s] if at is not None), default=None)
    if since_s is None or now_s - since_s > _QUIET_S:
        return Condition("silent", since_s, "killed or hanging")
    return Condition("running" if "first_step" in newest else "starting", since_s)


def moment_s(text: object) -> float | None:
    """Return a recorded time in seconds since 1970, or None if it is invalid."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None
