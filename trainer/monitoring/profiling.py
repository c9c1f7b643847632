"""Traces of training steps with torch.profiler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.core.formatting import table
from trainer.core.scratch import scratch_folder

FOLDER = "profile"
"""Folder for traces in the run."""
_ROWS = 15
"""Operators in the table of the slowest ones."""


class Profiler:
    """Trace of some steps of an attempt on one rank, stored in the run.

    The format is Chrome's, compressed; open it in https://ui.perfetto.dev.

    Args:
        name: file name of the trace, without its steps.
        write: stores bytes under a key in the run.
        first: first step to trace, counted from 1 at the start of the attempt.
        count: number of steps to trace.
        on_gpu: also trace CUDA kernels.
        log: called with a table of the slowest operators.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[str, bytes], object],
        *,
        first: int,
        count: int,
        on_gpu: bool,
        log: Callable[[str], None],
    ) -> None:
        self._name, self._write, self._log = name, write, log
        self._first, self._count, self._on_gpu = first, count, on_gpu
        self._steps = 0
        self._first_step = 0
        self._profile: Any = None

    def boundary(self, step: int) -> None:
        """Start or stop the trace if it is due; the next step is `step` + 1."""
        self._steps += 1
        if self._steps == self._first:
            self._start(step)
        elif self._steps == self._first + self._count:
            self.close(step)

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._first_step = step
        self._profile = profile(activities=kinds)
        self._profile.start()

    def close(self, step: int) -> None:
        """Stop the trace, if any, after `step`: write it and log the slowest operators."""
        if self._profile is None:
            if self._steps < self._first:
                self._log(
                    f"warning: no profile, the attempt ended before its step {self._first:,} "
                    "(trainer.profile_first_step)"
                )
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        profile, self._profile = self._profile, None
        profile.stop()
        key = f"{FOLDER}/{self._name}-steps-{self._first_step + 1}-{step}.json.gz"
        with scratch_folder("profile") as folder:
            file = Path(folder, "trace.json.gz")
            profile.export_chrome_trace(str(file))
            self._write(key, file.read_bytes())
        steps = f"{self._first_step + 1:,} to {step:,}"
        self._log(
            f"profile of steps {steps}: {key} (open in https://ui.perfetto.dev)\n"
            + _top(profile.key_averages(), on_gpu=self._on_gpu)
        )


def _top(averages: Any, *, on_gpu: bool) -> str:
    """Return a table of the operators with the longest self time."""
    kind = "device" if on_gpu else "cpu"
    operators = [(getattr(row, f"self_{kind}_time_total"), row) for row in averages]
    operators.sort(key=lambda pair: -pair[0])
    total_us = sum(self_us for self_us, _ in operators) or 1.0
    rows = [["operator", "self ms", "self %", "total ms", "calls"]]
    for self_us, operator in operators[:_ROWS]:
        with_children_us = getattr(operator, f"{kind}_time_total")
        rows.append(
            [
                operator.key[:40],
                f"{self_us / 1000:.3f}",
                f"{100 * self_us / total_us:.1f}",
                f"{with_children_us / 1000:.3f}",
                f"{operator.count:,}",
            ]
        )
    return table(rows)
