"""Detection of attempts that end in the same way again and again, before they save.

Only attempts with the configuration and code of the next start count. Failures count if their
exception is the same. Losses (killed processes, lost nodes, unusable stores) may pass, so they have
a larger limit, and starts after several of them wait.
"""

import hashlib
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.attempts import Record, moment_s
from trainer.core import sources
from trainer.errors import FAILURE, INTERRUPTED_TWICE, RUN_AGAIN, CrashLoopError, PerdureError

_CALM_LOSSES = 2
"""Losses in a row after which the next start does not wait."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 300.0


def failure_facts(error: BaseException) -> dict[str, Any]:
    """Return the exit code and cause of an attempt that an exception ended, for its record."""
    code = error.exit_code if isinstance(error, PerdureError) else FAILURE
    if isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED_TWICE
    return {"exit_code": code, "cause": _cause(error)}


def _cause(error: BaseException) -> str:
    """Return a digest of an exception: its type, last user frame, and message without numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [
        frame
        for frame in frames
        if not Path(frame.filename).is_relative_to(sources.PROJECT)
        and not sources.is_library(frame.filename)
    ]
    last = [f"{Path(f.filename).name}:{f.name}" for f in (users or frames)[-1:]]
    message = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", str(error))
    text = "\n".join([type(error).__qualname__, *last, message])
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Streak:
    """Attempts since the last save that ended like the next start may end; newest first."""

    failures: Sequence[Record]
    """Attempts that the same exception ended."""
    losses: Sequence[Record]
    """Attempts that were killed, lost a rank, or could not use their store."""

    def wait_s(self, now_s: float) -> float:
        """Return the seconds to wait before the next start; they double with every loss.

        Time since the newest loss counts.
        """
        excess = len(self.losses) - _CALM_LOSSES
        if excess < 1:
            return 0.0
        wait_s = min(_FIRST_WAIT_S * 2.0 ** min(excess - 1, 16), _LONGEST_WAIT_S)
        times_s = [moment_s(self.losses[0].get(key)) for key in ("ended", "told", "started")]
        known_s = [time_s for time_s in times_s if time_s is not None]
        passed_s = max(now_s - max(known_s), 0.0) if known_s else 0.0
        return max(wait_s - passed_s, 0.0)

    def loss_text(self, run: str) -> str:
        """Return a warning about the losses, or an empty text without any."""
        if not self.losses:
            return ""
        return "\n".join([_heading(len(self.losses), run, _LOST), *_causes(self.losses[:3])])


def streak(records: Sequence[Record], saved_by: set[int], identity: Mapping[str, str]) -> Streak:
    """Return the attempts that count for the next start.

    Preempted attempts, configuration errors and superseded attempts do not count. Neither do
    attempts that the scheduler killed and requeued, which shows in the restart count of the next
    attempt, nor those before one that was started with `launch.forgive=true`.

    Args:
        records: of all attempts, oldest first.
        saved_by: numbers of the attempts that have committed a checkpoint.
        identity: values in a record that identify configuration and code, for the next start.
    """
    failures: list[Record] = []
    losses: list[Record] = []
    following: Record = {}
    for record in reversed(records):
        if record["attempt"] in saved_by or record.get("outcome") == "done":
            break
        is_same_code = all(record.get(key) == value for key, value in identity.items())
        is_requeued = "outcome" not in record and _restarted(record, following)
        following = record
        if is_same_code and not is_requeued:
            if "outcome" not in record or record.get("exit_code") == RUN_AGAIN:
                losses.append(record)
            elif record.get("exit_code") == FAILURE:
                failures.append(record)
        if record.get("forgiven"):
            break
    different = (i for i, r in enumerate(failures) if r.get("cause") != failures[0].get("cause"))
    return Streak(failures[: next(different, len(failures))], losses)


def check(streak: Streak, run: str, *, max_failures: int, max_losses: int) -> None:
    """Raise CrashLoopError if too many attempts failed equally, or were lost; 0: no limit."""
    if max_failures and len(streak.failures) >= max_failures:
        kind, records = _FAILED, streak.failures
        advice = "Fix the cause: any change of the configuration or code starts the run again."
    elif max_losses and len(streak.losses) >= max_losses:
        kind, records = _LOST, streak.losses
        advice = (
            "Look for the out-of-memory killer and for failing nodes. If attempts live shorter "
            "than the interval between saves, lower checkpoint.every_s."
        )
    else:
        return
    again = "To try once more without a change, add launch.forgive=true to the command."
    raise CrashLoopError(
        "\n".join([_heading(len(records), run, kind), *_causes(records[:10]), advice, again])
    )


_FAILED = "crashed before saving a checkpoint, with the same error"
_LOST = "were killed or lost before saving a checkpoint"


def _heading(count: int, run: str, kind: str) -> str:
    attempts = "attempt" if count == 1 else f"{count} attempts"
    return f"the last {attempts} of {run} {kind.replace('were', 'was') if count == 1 else kind}:"


def _causes(records: Sequence[Record]) -> list[str]:
    killed = "killed, for example by SIGKILL or the out-of-memory killer"
    return [
        f"  attempt {r['attempt']} ({r.get('host')}, {r.get('started')}): "
        + (r.get("error") or killed)
        for r in records
    ]


def _restarted(record: Record, following: Record) -> bool:
    same_job = record.get("job") is not None and record.get("job") == following.get("job")
    return same_job and int(following.get("restart", 0)) > int(record.get("restart", 0))
