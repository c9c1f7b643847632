"""What the records of all attempts say together: whether they get anywhere, and what was lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainer.errors import CrashLoopError

DIED = "error"
"""How an attempt ended that could not say more, and every one that has no end in its record."""
_INNOCENT = ("done", "preempted")

Record = Mapping[str, Any]


def run_id(records: Sequence[Record]) -> str:
    """Return a name of the run that all of its attempts share, and no other run has."""
    started = "".join(filter(str.isdigit, records[0]["started"][:19]))
    return f"{started}-{records[0]['token']}"


def refuse_crash_loop(records: Sequence[Record], saved_by: set[int], most: int, run: str) -> None:
    """Raise CrashLoopError if the last `most` attempts died and none of them saved anything.

    Attempts that were preempted neither count nor end the row; nor do those that a scheduler took
    away without a word and started again itself, which shows in the restart count of the next.

    Args:
        records: of all attempts, oldest first.
        saved_by: numbers of the attempts that have committed a checkpoint.
        most: attempts; 0: never refuse.
        run: how to call the run.
    """
    row: list[Record] = []
    following: Record = {}
    for record in reversed(records):
        if record["attempt"] in saved_by or record.get("outcome") == "done":
            break
        taken_away = "outcome" not in record and _restarted(record, following)
        if record.get("outcome") != "preempted" and not taken_away:
            row.append(record)
        following = record
    if not most or len(row) < most:
        return
    causes = [
        f"  attempt {r['attempt']} ({r.get('host')}, {r.get('started')}): "
        + (r.get("error") or "died without a word, as by SIGKILL or lack of memory")
        for r in row[:most]
    ]
    raise CrashLoopError(
        "\n".join(
            [
                f"the last {len(row)} attempts of {run} died, and none of them saved anything:",
                *causes,
                "When the cause is removed, start once with "
                "launch.max_attempts_without_progress=0.",
            ]
        )
    )


def _restarted(record: Record, following: Record) -> bool:
    same_job = record.get("job") is not None and record.get("job") == following.get("job")
    return same_job and int(following.get("restart", 0)) > int(record.get("restart", 0))


@dataclass(frozen=True)
class Goodput:
    """What all attempts of a run have done, and how much of it counts."""

    attempts: int
    preempted: int
    useful_steps: int
    all_steps: int
    starting_s: float
    """From the starts of the attempts to their first steps, summed up."""
    training_s: float
    """From the first steps of the attempts to their ends, summed up."""

    @property
    def share(self) -> float:
        """Return the useful steps as a share of all."""
        return self.useful_steps / max(self.all_steps, 1)

    def __str__(self) -> str:
        """Return one line for the end of a run."""
        lost = self.all_steps - self.useful_steps
        return (
            f"{self.attempts} attempts ({self.preempted} preempted): {100 * self.share:.1f} % of "
            f"{self.all_steps:,} steps counted, {lost:,} were repeated; {self.starting_s:.0f} s "
            f"went into starting, {self.training_s:.0f} s into training"
        )


def goodput(records: Sequence[Record], step: int) -> Goodput:
    """Return what the attempts have done together, the last of which is at `step`.

    Of an attempt that died without a word, what it told last counts, or what was saved of it.
    """
    begun = [record for record in records if type(record.get("first_step")) is int]
    done = []
    for record in begun:
        end = step if record is records[-1] else last_step(records, record) or 0
        done.append(max(end - record["first_step"], 0))
    useful = step - begun[0]["first_step"] if begun else 0
    return Goodput(
        attempts=len(records),
        preempted=sum(record.get("outcome") == "preempted" for record in records),
        useful_steps=useful,
        all_steps=max(sum(done), useful),
        starting_s=sum(_seconds(record, "starting_s") for record in records),
        training_s=sum(_seconds(record, "training_s") for record in records),
    )


def last_step(records: Sequence[Record], record: Record) -> int | None:
    """Return the last step that is known of an attempt: told, or gone on from later."""
    known = [record.get("last_step")]
    for later in records:
        origin = later.get("resumed_from")
        if isinstance(origin, Mapping) and origin.get("attempt") == record.get("attempt"):
            known.append(origin.get("step"))
    return max((step for step in known if type(step) is int), default=None)


def _seconds(record: Record, key: str) -> float:
    """Return what a record tells; a damaged one may tell anything."""
    value: Any = record.get(key)
    is_known = type(value) in (int, float) and 0 <= value < _LONGEST_S
    return float(value) if is_known else 0.0


_LONGEST_S = 1e10


_QUIET_S = 90.0
"""An attempt that lives says something of itself at least every 30 s."""


@dataclass(frozen=True)
class Condition:
    """How a run is, from outside."""

    state: str
    """finished, running, starting, stopped (it can go on), died, silent (it said no end, and
    nothing for a while), or unknown (there is no record)."""
    since_s: float | None = None
    """When it was heard of last, in seconds since 1970."""
    why: str = ""


def condition(newest: Record | None, *, last_activity_s: float | None, now_s: float) -> Condition:
    """Return how a run is.

    Args:
        newest: record of its newest attempt.
        heard_s: when its newest figures are from, in seconds since 1970.
        now_s: the time.
    """
    if newest is None:
        return Condition("unknown", last_activity_s, "no attempt has left a record")
    ended_s = moment_s(newest.get("ended"))
    if "ended" in newest:
        outcome = newest.get("outcome")
        state = {"done": "finished", "preempted": "stopped"}.get(str(outcome), "died")
        why = newest.get("error") if state == "died" else newest.get("reason")
        return Condition(state, ended_s, str(why or ""))
    times = [moment_s(newest.get(key)) for key in ("told", "started")]
    since_s = max((at for at in [*times, last_activity_s] if at is not None), default=None)
    if since_s is None or now_s - since_s > _QUIET_S:
        return Condition("silent", since_s, "killed without a word, or it hangs")
    return Condition("running" if "first_step" in newest else "starting", since_s)


def moment_s(text: object) -> float | None:
    """Return seconds since 1970 of a time as records have it, if it is one."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None
