"""A trace of a few steps, by torch.profiler."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.core.formatting import table

FOLDER = "profile"
_ROWS = 15


class Profiler:
    """Traces some steps of an attempt on one rank; leaves the trace in the run, and says the top.

    The trace is Chrome's format, compressed: https://ui.perfetto.dev opens it.

    Args:
        name: the trace's, before its steps.
        write: takes a key in the run's folder and bytes.
        first: the first step that is traced, counted from the attempt's beginning, from 1 on.
        count: how many are.
        on_gpu: whether kernels are traced too.
        say: called with the table of what took longest.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[str, bytes], object],
        *,
        first: int,
        count: int,
        on_gpu: bool,
        say: Callable[[str], None],
    ) -> None:
        self._name, self._write, self._say = name, write, say
        self._first, self._count, self._on_gpu = first, count, on_gpu
        self._seen = 0
        self._began_at = 0
        self._profile: Any = None

    def boundary(self, step: int) -> None:
        """Begin or end the trace, if it is time; a step follows that leads on from `step`."""
        self._seen += 1
        if self._seen == self._first:
            self._begin(step)
        elif self._seen == self._first + self._count:
            self.close(step)

    def _begin(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._began_at = step
        self._profile = profile(activities=kinds)
        self._profile.start()

    def close(self, step: int) -> None:
        """End the trace, if there is one: write it, and say what took longest. `step` is over."""
        if self._profile is None:
            if self._seen < self._first:
                self._say(
                    f"NOT PROFILED: the attempt ended before its step {self._first:,} "
                    "(trainer.profile_first_step)"
                )
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        made, self._profile = self._profile, None
        made.stop()
        key = f"{FOLDER}/{self._name}-steps-{self._began_at + 1}-{step}.json.gz"
        with tempfile.TemporaryDirectory(prefix="perdure-profile-") as folder:
            file = Path(folder, "trace.json.gz")
            made.export_chrome_trace(str(file))
            self._write(key, file.read_bytes())
        steps = f"{self._began_at + 1:,} to {step:,}"
        self._say(
            f"profile of steps {steps}, to be opened in https://ui.perfetto.dev: {key}\n"
            + _top(made.key_averages(), on_gpu=self._on_gpu)
        )


def _top(averages: Any, *, on_gpu: bool) -> str:
    """Return a table of the operators that took longest themselves."""
    kind = "device" if on_gpu else "cpu"
    own = [(getattr(each, f"self_{kind}_time_total"), each) for each in averages]
    own.sort(key=lambda pair: -pair[0])
    total_us = sum(time_us for time_us, _ in own) or 1.0
    rows = [["operator", "itself, ms", "share, %", "with what it calls, ms", "calls"]]
    for time_us, each in own[:_ROWS]:
        whole_us = getattr(each, f"{kind}_time_total")
        numbers = [f"{time_us / 1000:.3f}", f"{100 * time_us / total_us:.1f}"]
        rows.append([each.key[:40], *numbers, f"{whole_us / 1000:.3f}", f"{each.count:,}"])
    return table(rows)
