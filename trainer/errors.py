"""Errors that users can act on, and the exit codes of all commands.

A message states what happened, the value and what to do. Errors of these classes are printed
without a traceback; any other exception is a bug and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

DONE = 0
FAILURE = 1
CONFIGURATION = 2
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted, deadline, peer lost
NEVER_REQUEUE = 76  # superseded by a newer attempt, crash loop
INTERRUPTED_TWICE = 130  # second Ctrl-C


class PerdureError(Exception):
    """Base of the errors whose message is enough to act on."""

    exit_code = FAILURE


class ConfigError(PerdureError):
    """The configuration has to change."""

    exit_code = CONFIGURATION


class TrainingError(PerdureError):
    """Training failed and would fail again."""


class DataError(PerdureError):
    """The training data has to change."""


class StoreError(PerdureError):
    """A disk or bucket was not usable; no data is known to be damaged."""

    exit_code = RUN_AGAIN


class StoreRefusedError(StoreError):
    """A disk or bucket rejected a request, and would reject it again."""

    exit_code = FAILURE


class SaveHangsError(StoreError):
    """A save does not end, so no other save can start."""


class CheckpointError(PerdureError):
    """A checkpoint cannot be written or read."""


class PeerLostError(PerdureError):
    """Another rank was lost without reporting an error."""

    exit_code = RUN_AGAIN


class WorkerLostError(PeerLostError):
    """A data-loading process of this rank was lost without reporting an error."""


class PeerFailedError(PerdureError):
    """Another rank failed and reported its error."""


class CrashLoopError(PerdureError):
    """Several consecutive attempts crashed without saving a checkpoint."""

    exit_code = NEVER_REQUEUE


class SupersededError(PerdureError):
    """A newer attempt owns the run."""

    exit_code = NEVER_REQUEUE


@dataclass(frozen=True)
class Problem:
    """A problem in a configuration."""

    key: str
    """Full dotted key, for example `trainer.max_epochs`."""
    text: str
    """Value and how to correct it."""


def problems_text(problems: Sequence[Problem], of: str = "configuration") -> str:
    """Format all problems as the message of one ConfigError, with aligned keys."""
    width = min(max(len(p.key) for p in problems), 32)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    indent = "\n" + " " * (width + 4)
    lines = [f"  {p.key:<{width}}  {p.text.replace(chr(10), indent)}" for p in problems]
    return "\n".join([f"{count} in the {of}:", *lines])


def closest(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)`, or the valid names if none is close, or an empty string."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    if not names:
        return ""
    listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f" (valid: {listed})"


def version_text() -> str:
    """Return the versions of Perdure, Python and torch, without an import."""
    python = sys.version.split()[0]
    return f"perdure {_installed('perdure')} (Python {python}, torch {_installed('torch')})"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is only on the path
        return "not installed"


def print_error(error: object) -> None:
    """Print `error: …` to standard error."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print `warning: …` to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
