"""Several trackers as one, and none at all."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.protocols import Tracker


class Silent:
    """Takes everything and does nothing: the tracker of the ranks other than 0."""

    def start(self, facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
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
    """Passes every call on to each of its trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start each."""
        for tracker in self._trackers:
            tracker.start(facts)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(line)

    def say(self, text: str) -> None:
        """Tell each."""
        for tracker in self._trackers:
            tracker.say(text)

    def saved(self, save: Mapping[str, Any]) -> None:
        """Tell each that wants to know of a save."""
        for tracker in self._trackers:
            if act := getattr(tracker, "saved", None):
                act(save)

    def ended(self, outcome: str) -> None:
        """Tell each that wants to know the outcome."""
        for tracker in self._trackers:
            if act := getattr(tracker, "ended", None):
                act(outcome)

    def flush(self) -> None:
        """Flush each."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()
