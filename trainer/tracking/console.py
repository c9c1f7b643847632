"""What a person sees: a progress bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

_HIDDEN = ("step", "epoch", "samples", "time", "split", "lr")
"""And all that is measured by the clock, but for the rate."""


class Console:
    """Writes to standard output.

    Args:
        every_s: in a log file, seconds between lines of training figures; evaluations are always
            written.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._last_line_s = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._facts: Mapping[str, Any] = {}

    def start(self, facts: Mapping[str, Any]) -> None:
        """Show the bar, from the step that the attempt starts from."""
        self._facts = facts
        self._last_line_s = time.monotonic()
        if sys.stdout.isatty():
            self._open_bar(facts)

    def _open_bar(self, facts: Mapping[str, Any]) -> None:
        from rich import progress  # only where there is a terminal

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[figures]}", markup=False),
        )
        self._task = self._bar.add_task(
            _epoch_text(facts, facts["step"]),
            total=facts["max_steps"],
            completed=facts["step"],
            figures="",
        )
        self._bar.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Move the bar, or write a line when one is due."""
        is_eval = line["split"] == "eval"
        if self._bar is not None:
            description = _epoch_text(self._facts, line["step"])
            self._bar.update(self._task, completed=line["step"], description=description)
            if is_eval:
                self.say(_line_text(line, self._facts))
            else:
                self._bar.update(self._task, figures=_figures_text(line))
        elif is_eval or time.monotonic() - self._last_line_s >= self._every_s:
            self._last_line_s = time.monotonic()
            print(_line_text(line, self._facts), flush=True)

    def say(self, text: str) -> None:
        """Write a sentence, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _epoch_text(facts: Mapping[str, Any], step: int) -> str:
    per_epoch = facts["steps_per_epoch"]
    if per_epoch is None:  # a stream
        return "steps"
    current = min(step, facts["max_steps"] - 1) // per_epoch + 1
    return f"epoch {current}/{-(-facts['max_steps'] // per_epoch)}"


def _figures_text(line: Mapping[str, Any]) -> str:
    shown = [key for key in line if key not in _HIDDEN and not key.endswith("_s")]
    return "  ".join(f"{key} {line[key]:.4f}" for key in shown)


def _line_text(line: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    position = f"step {line['step']:,}/{facts['max_steps']:,}"
    rate = line.get("samples_per_s")
    tail = f"  {rate:,.0f} samples/s" if rate else ""
    peak = facts.get("peak_flops_per_s")
    if peak and "flops_per_s" in line:
        tail += f"  MFU {100 * line['flops_per_s'] / peak:.1f} %"
    return f"{line['split']:<5}  {position}  {_figures_text(line)}{tail}"
