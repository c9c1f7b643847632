"""What the records of all attempts say together: whether they get anywhere, and what was lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import CrashLoopError

DIED = "error"
"""How an attempt ended that could not say more, and every one that has no end in its record."""
_INNOCENT = ("done", "preempted")

Record = Mapping[str, Any]


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

    Of an attempt that died without a word, what it told last counts.
    """
    begun = [record for record in records if "first_step" in record]
    done = [max(record.get("last_step", 0) - record["first_step"], 0) for record in begun]
    useful = step - begun[0]["first_step"] if begun else 0
    return Goodput(
        attempts=len(records),
        preempted=sum(record.get("outcome") == "preempted" for record in records),
        useful_steps=useful,
        all_steps=max(sum(done), useful),
        starting_s=sum(record.get("starting_s", 0.0) for record in records),
        training_s=sum(record.get("training_s", 0.0) for record in records),
    )
