"""Console output: progress bars on a terminal, plain lines in a log file."""

import os
import sys
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from trainer.tracking.estimate import Estimate
from trainer.tracking.jsonl import POSITION

_HIDDEN = (*POSITION, "lr", "skipped")  # the last two are added in a shorter form
_REFRESH_PER_S = 2.0


class Console:
    """Writes to standard output.

    Args:
        every_s: minimum seconds between training lines in a log file; evaluations are always
            written.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._last_line_s = 0.0
        self._facts: Mapping[str, Any] = {}
        self._estimate: Estimate | None = None
        self._step = 0
        self._metrics = ""
        self._saved_s: float | None = None  # time of the state in the newest checkpoint
        self._live: Any = None
        self._bars: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        """Show the progress bars from the attempt's first step."""
        self._facts, self._step = facts, facts["step"]
        self._estimate = Estimate(facts)
        self._last_line_s = time.monotonic()
        if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
            self._open_bars()

    def _open_bars(self) -> None:
        from rich import progress  # only needed on a terminal
        from rich.console import Console as Terminal
        from rich.live import Live

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False, style="default"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[position]}", justify="right", style="default"),
            progress.TextColumn("{task.fields[remaining]}", justify="right", style="default"),
            expand=True,
        )
        if self._facts["steps_per_epoch"]:
            self._bars.add_task("", total=self._facts["steps_per_epoch"], position="", remaining="")
        self._bars.add_task("run", total=self._facts["max_steps"], position="", remaining="")
        streams = sys.stdout, sys.stderr
        live = self._live = Live(
            get_renderable=self._screen, refresh_per_second=_REFRESH_PER_S, console=Terminal()
        )
        live.start()
        live.console.show_cursor(True)  # a killed process could not restore it
        _restore_streams_in_children(live, streams)

    def _screen(self) -> Any:
        """Return the current display; called periodically by a thread of rich."""
        from rich.console import Group
        from rich.text import Text

        facts, step = self._facts, self._step
        *epochs, run = self._bars.task_ids
        for epoch in epochs:
            per_epoch = facts["steps_per_epoch"]
            steps_in_epoch = step - min(step, facts["max_steps"] - 1) // per_epoch * per_epoch
            self._bars.update(
                epoch,
                completed=steps_in_epoch,
                description=_epoch_text(facts, step),
                position=f"{steps_in_epoch:,}/{per_epoch:,}",
            )
        position = f"{step:,}/{facts['max_steps']:,}"
        self._bars.update(run, completed=step, position=position, remaining=self._remaining_text())
        text = "  ".join(filter(None, (self._metrics, self._checkpoint_age_text())))
        return Group(self._bars.get_renderable(), Text(text, no_wrap=True, overflow="ellipsis"))

    def log(self, line: Mapping[str, Any]) -> None:
        """Update the bars, or write a line if one is due."""
        is_eval = line["split"] == "eval"
        now_s = time.monotonic()
        self._step = max(self._step, line["step"])
        if self._estimate is not None:
            self._estimate.add(line, now_s)
        if not is_eval:
            self._metrics = "  ".join(filter(None, (_metrics_text(line), _rate_text(line))))
        if is_eval:
            self.message(_line_text(line, self._facts))
        elif self._live is None and now_s - self._last_line_s >= self._every_s:
            self._last_line_s = now_s
            parts = (
                _line_text(line, self._facts),
                self._remaining_text(),
                self._checkpoint_age_text(),
            )
            self.message("  ".join(filter(None, parts)))

    def saved(self, save: Mapping[str, Any]) -> None:
        """Record the time and cost of the newest checkpoint."""
        age_s = max(time.time() - save["time"], 0.0)
        self._saved_s = time.monotonic() - age_s  # its state is from the start of the save
        if self._estimate is not None:
            self._estimate.saved(save)

    def message(self, text: str) -> None:
        """Write a message, above the bars if they are shown."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Do nothing; output is not buffered."""

    def close(self) -> None:
        """Stop the bars in their current state."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _remaining_text(self) -> str:
        remaining_s = self._estimate.remaining_s(self._step) if self._estimate is not None else None
        return "" if remaining_s is None else f"{timedelta(seconds=round(remaining_s))} left"

    def _checkpoint_age_text(self) -> str:
        if self._saved_s is None:
            return ""
        return f"saved {timedelta(seconds=int(time.monotonic() - self._saved_s))} ago"


def _restore_streams_in_children(live: Any, streams: tuple[Any, Any]) -> None:
    """Restore the original streams in forked processes (data workers).

    While bars are shown, `sys.stdout` takes a lock that another thread may hold during a fork.
    """
    alive = weakref.ref(live)

    def restore() -> None:
        if alive() is not None:
            sys.stdout, sys.stderr = streams

    os.register_at_fork(after_in_child=restore)


def _epoch_text(facts: Mapping[str, Any], step: int) -> str:
    per_epoch = facts["steps_per_epoch"]
    if per_epoch is None:  # a stream
        return "steps"
    current = min(step, facts["max_steps"] - 1) // per_epoch + 1
    return f"epoch {current}/{-(-facts['max_steps'] // per_epoch)}"


def _metrics_text(line: Mapping[str, Any]) -> str:
    hidden = {key for key in line if key in _HIDDEN or key.endswith(("_s", "_per_s"))}
    parts = [f"{key} {_number(value)}" for key, value in line.items() if key not in hidden]
    if line["split"] == "train":
        parts += [f"lr {line['lr']:.3g}"] if "lr" in line else []
        parts += [f"skipped {line['skipped']:,.0f}"] if line.get("skipped") else []
    return "  ".join(parts)


def _number(value: float) -> str:
    is_plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if is_plain else f"{value:.3g}"


def _rate_text(line: Mapping[str, Any]) -> str:
    for key, unit in (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s")):
        if line.get(key):
            return f"{line[key]:,.0f} {unit}"
    return ""


def _line_text(line: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    position = f"step {line['step']:,}/{facts['max_steps']:,}"
    parts = (
        f"{line['split']:<5}", position, _metrics_text(line), _rate_text(line),
        _mfu_text(line, facts),
    )  # fmt: skip
    return "  ".join(filter(None, parts))


def _mfu_text(line: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    peak = facts.get("peak_flops_per_s")
    if not peak or "flops_per_s" not in line:
        return ""
    return f"MFU {100 * line['flops_per_s'] / peak:.1f} %"
