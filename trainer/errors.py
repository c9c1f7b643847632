"""Errors a person can act on, and the exit codes of every command.

A message says what was asked, what was found and what to do. An error of these classes is shown
without a traceback; anything else is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DONE = 0
FAILURE = 1
CONFIGURATION = 2
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted, deadline, peer lost
NEVER_REQUEUE = 76  # superseded by a newer attempt, crash loop
INTERRUPTED_TWICE = 130  # second Ctrl-C


class PerdureError(Exception):
    """Base of the errors whose message is all that a person needs."""

    exit_code = FAILURE


class ConfigError(PerdureError):
    """The configuration has to change."""

    exit_code = CONFIGURATION


class TrainingError(PerdureError):
    """The training itself went wrong, and would again."""


class DataError(PerdureError):
    """The training data has to change."""


class StoreError(PerdureError):
    """A disk or a bucket could not be used; nothing is known to be damaged."""

    exit_code = RUN_AGAIN


class SaveHangsError(StoreError):
    """A save does not end, so no other one can begin."""


class CheckpointError(PerdureError):
    """This checkpoint cannot be written or read."""


class PeerLostError(PerdureError):
    """Another rank is gone without a word."""

    exit_code = RUN_AGAIN


class WorkerLostError(PeerLostError):
    """A process that fetches data for this rank is gone without a word."""


class PeerFailedError(PerdureError):
    """Another rank failed, and has said why."""


class CrashLoopError(PerdureError):
    """Attempt after attempt died, and none of them saved anything."""

    exit_code = NEVER_REQUEUE


class SupersededError(PerdureError):
    """A newer attempt owns the run."""

    exit_code = NEVER_REQUEUE


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    """Full dotted key, for example `trainer.max_epochs`."""
    text: str
    """What was found there and what would be right."""


def problems_text(problems: Sequence[Problem]) -> str:
    """Format all problems as the message of one ConfigError, keys aligned."""
    width = min(max(len(p.key) for p in problems), 32)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    indent = "\n" + " " * (width + 4)
    lines = [f"  {p.key:<{width}}  {p.text.replace(chr(10), indent)}" for p in problems]
    return "\n".join([f"{count} in the configuration:", *lines])


def closest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or the valid names when none is near, or an empty text."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f" (valid: {shown})"
