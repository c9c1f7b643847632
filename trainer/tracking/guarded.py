"""Tracker wrapper that disables a tracker after its first error instead of stopping training."""

import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer.errors import ConfigError, PerdureError
from trainer.protocols import Tracker

_REQUIRED = ("start", "log", "message", "flush", "close")
_OPTIONAL = ("saved", "ended")


class Guarded:
    """Forward every call to a tracker until one fails; report that failure once.

    Args:
        name: the tracker's name in the configuration.
        tracker: the tracker; `saved` and `ended` are optional. The old name `say` of `message` is
            still accepted, with a warning.

    Raises:
        ConfigError: a required method is missing.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._is_lost = False
        methods = {method: getattr(tracker, method, None) for method in (*_REQUIRED, *_OPTIONAL)}
        if methods["message"] is None and (old_method := getattr(tracker, "say", None)):
            methods["message"] = old_method
            _print(
                f"warning: tracker.{name}: {type(tracker).__name__} has "
                'a method "say", which is now called "message"; '
                "rename the method, the old name will stop working"
            )
        missing = [method for method in _REQUIRED if not callable(methods[method])]
        if missing:
            raise ConfigError(
                f"tracker.{name}: {type(tracker).__name__} is not a tracker, it has no "
                f"{', '.join(missing)}; see Tracker in trainer/protocols.py"
            )
        self._methods = {method: act or _ignore for method, act in methods.items()}

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start the tracker.

        Raises:
            PerdureError: an error of the tracker that the user can fix, which ends the attempt.
        """
        try:
            self._methods["start"](facts)
        except PerdureError:
            raise
        except Exception as error:
            self._disable("start", error)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line of metrics."""
        self._call("log", line)

    def message(self, text: str) -> None:
        """Write a message for the user."""
        self._call("message", text)

    def saved(self, save: Mapping[str, Any]) -> None:
        """Report a committed checkpoint."""
        self._call("saved", save)

    def ended(self, outcome: str) -> None:
        """Report the outcome of the attempt."""
        self._call("ended", outcome)

    def flush(self) -> None:
        """Flush the tracker."""
        self._call("flush")

    def close(self) -> None:
        """Close the tracker, also after a failure: it may have a terminal to restore."""
        try:
            self._methods["close"]()
        except Exception as error:
            if not self._is_lost:
                self._disable("close", error)

    def _call(self, method: str, *arguments: Any) -> None:
        if self._is_lost:
            return
        try:
            self._methods[method](*arguments)
        except Exception as error:
            self._disable(method, error)

    def _disable(self, method: str, error: Exception) -> None:
        self._is_lost = True
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _print(
            f"warning: tracker.{self._name} is disabled for this attempt: {method}() raised "
            f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno}). "
            "Training continues."
        )


def _ignore(*_: Any) -> None:
    pass


def _print(text: str) -> None:
    with suppress(OSError):  # the terminal itself may have failed
        print(text, file=sys.stderr, flush=True)
