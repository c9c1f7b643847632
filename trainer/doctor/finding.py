"""Findings of the doctor and their report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["green", "yellow", "red"]
_WORDS = {"green": "ok", "yellow": "warn", "red": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    topic: str
    state: State
    """green: no problem. yellow: the run works, but not as well as it could. red: it fails."""
    message: str
    advice: str = ""
    """Remedy, if not green."""

    def as_json(self) -> dict[str, str]:
        """Return it for --json."""
        return {
            "topic": self.topic, "state": self.state, "found": self.message, "advice": self.advice
        }  # fmt: skip


def text(findings: Sequence[Finding]) -> str:
    """Return one aligned line per finding, with its advice below."""
    width = max(len(finding.topic) for finding in findings)
    indent = "\n" + " " * (width + 8)
    lines = []
    for finding in findings:
        lines.append(f"{_WORDS[finding.state]:<4}  {finding.topic:<{width}}  {finding.message}")
        if finding.advice:
            lines[-1] += indent + "-> " + finding.advice.replace("\n", indent + "   ")
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Return a verdict with the number of findings per state."""
    counts = {state: sum(f.state == state for f in findings) for state in _WORDS}
    verdict = "This run would fail" if counts["red"] else "No problem found"
    return f"{verdict}: {', '.join(f'{n} {_WORDS[state]}' for state, n in counts.items())}."
