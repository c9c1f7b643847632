"""Several trackers as one, and a tracker that does nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.protocols import Tracker


class Silent:
    """Tracker of every rank but 0: accepts all calls and does nothing."""

    def start(self, facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def saved(self, save: Mapping[str, Any]) -> None:
        """Do nothing."""

    def ended(self, outcome: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Several:
    """Forwards every call to each of its trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._saved = [act for tracker in trackers if (act := getattr(tracker, "saved", None))]
        self._ended = [act for tracker in trackers if (act := getattr(tracker, "ended", None))]

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start every tracker."""
        for tracker in self._trackers:
            tracker.start(facts)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line of metrics to every tracker."""
        for tracker in self._trackers:
            tracker.log(line)

    def message(self, text: str) -> None:
        """Write a message with every tracker."""
        for tracker in self._trackers:
            tracker.message(text)

    def saved(self, save: Mapping[str, Any]) -> None:
        """Report a committed checkpoint to the trackers that accept it."""
        for act in self._saved:
            act(save)

    def ended(self, outcome: str) -> None:
        """Report the outcome to the trackers that accept it."""
        for act in self._ended:
            act(outcome)

    def flush(self) -> None:
        """Flush every tracker."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close()
