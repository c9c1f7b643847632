"""A tracker whose failure ends it, and never the training."""

import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer.errors import ConfigError, PerdureError
from trainer.protocols import Tracker

_METHODS = ("start", "log", "say", "flush", "close")


class Guarded:
    """Passes every call on, until one fails: that is told, once, and the rest is left out.

    Args:
        name: what the configuration calls the tracker.
        tracker: the tracker; `saved` and `ended` may be missing.

    Raises:
        ConfigError: it lacks another method.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._lost = False
        missing = [method for method in _METHODS if not callable(getattr(tracker, method, None))]
        if missing:
            raise ConfigError(
                f"tracker.{name}: {type(tracker).__name__} is no tracker, it has no "
                f"{', '.join(missing)}; see Tracker in trainer/protocols.py"
            )

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start it; an error that says what to change in the configuration ends the attempt."""
        try:
            self._tracker.start(facts)
        except PerdureError:
            raise
        except Exception as error:
            self._lose("start", error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass a line on."""
        self._call("log", line)

    def say(self, text: str) -> None:
        """Pass a sentence on."""
        self._call("say", text)

    def saved(self, save: Mapping[str, Any]) -> None:
        """Tell of a save, where it wants to know."""
        self._call("saved", save)

    def ended(self, outcome: str) -> None:
        """Tell the outcome, where it wants to know."""
        self._call("ended", outcome)

    def flush(self) -> None:
        """Flush it."""
        self._call("flush")

    def close(self) -> None:
        """Close it, also after it failed: it may have something to put back."""
        try:
            self._tracker.close()
        except Exception as error:
            if not self._lost:
                self._lose("close", error)

    def _call(self, method: str, *arguments: Any) -> None:
        act = getattr(self._tracker, method, None)
        if self._lost or act is None:
            return
        try:
            act(*arguments)
        except Exception as error:
            self._lose(method, error)

    def _lose(self, method: str, error: Exception) -> None:
        self._lost = True
        frame = traceback.extract_tb(error.__traceback__)[-1]
        with suppress(OSError):  # what failed may be the terminal
            print(
                f"TRACKER LOST: tracker.{self._name} gets nothing more, its {method}() failed: "
                f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}). "
                "Training goes on.",
                file=sys.stderr,
                flush=True,
            )
