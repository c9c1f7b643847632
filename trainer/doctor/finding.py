"""What an examination comes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["green", "yellow", "red"]
_WORDS = {"green": "ok", "yellow": "look", "red": "BAD"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: State
    """green: as it should be. yellow: the run works, but worse than it could. red: it would not."""
    found: str
    advice: str = ""
    """What to do, where it is not green."""


def text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, aligned, with the advice below it."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        indent = "\n" + " " * (width + 8)
        lines.append(f"{_WORDS[finding.state]:<4}  {finding.topic:<{width}}  {finding.found}")
        if finding.advice:
            lines[-1] += indent + "-> " + finding.advice.replace("\n", indent + "   ")
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Return how many findings are of which kind."""
    counts = {word: sum(f.state == state for f in findings) for state, word in _WORDS.items()}
    verdict = "This would not work" if counts["BAD"] else "Nothing is in the way"
    return f"{verdict}: {', '.join(f'{count} {word}' for word, count in counts.items())}."
