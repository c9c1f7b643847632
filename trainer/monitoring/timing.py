"""Step times, waiting times and stragglers of one attempt."""

import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.cluster.world import World
from trainer.monitoring.stragglers import ForwardTimer, StragglerDetector

_MEMORY_INTERVAL_S = 1.0
"""Minimum time between two readings of this rank's peak memory, seconds."""
_BUCKET_RATIO = 1.02
"""Ratio of neighboring buckets in the histogram of step times."""
_RANK_VALUES = 3
"""Values that each rank reports: data and forward seconds per step, peak memory in bytes."""


@dataclass(frozen=True)
class Totals:
    """Timing totals of one attempt, measured on rank 0 (peak memory: all ranks)."""

    seconds: float
    """Time since the first step began, evaluations and saves included."""
    steps: int
    samples: int
    step_s: float
    """Time in steps, waiting for data included, without evaluations and saves between steps."""
    step_p50_s: float
    step_p95_s: float
    data_wait_s: float
    eval_s: float
    save_stall_s: float
    peak_bytes: tuple[int, ...]
    """Peak memory of each rank: allocated on its GPU, or resident."""
    mfu: float | None
    """Model FLOPs of the steps divided by the device's peak FLOPs in their time, 0 … 1: A.
    Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022, appendix B."""


class Timing:
    """Ledger of the time that one attempt spends on this rank: two clock reads per step.

    A step lasts from one step boundary to the next, without evaluations and without the saver's
    work between steps. Nothing waits for a GPU: there a step ends when its kernels are queued, so
    a step that logs, which does wait for them, includes the time of the steps before it. With
    several ranks, each also measures its own data and forward time, and the ranks exchange these in
    the reduction that computes the logged metrics. The constructor is collective.

    Args:
        world: the ranks.
        samples: samples consumed before this attempt.
        waits: total seconds measured elsewhere. `data_wait`: some rank had no data. `save_stall`:
            saves blocked the training thread between steps. `update_stall`: they blocked updates.
        wrapped: the modules that training calls. Hooks there exclude waiting for other ranks.
        log: called with a message about a straggler, on every rank.
        items: plural noun for what the task's weights count.
        flops_per_step: model FLOPs per step on one rank; None: unknown.
        peak_flops_per_s: peak of one rank's device; None: unknown.
        clock: returns seconds.
    """

    def __init__(
        self,
        world: World,
        samples: int,
        waits: Mapping[str, Callable[[], float]],
        *,
        wrapped: Sequence[nn.Module] = (),
        log: Callable[[str], None] = print,
        items: str = "items",
        flops_per_step: int | None = None,
        peak_flops_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world, self._clock, self._log, self._item_name = world, clock, log, items
        self._flops_per_step, self._peak_flops_per_s = flops_per_step, peak_flops_per_s
        self.forward = ForwardTimer(world, wrapped) if world.size > 1 else None
        """Timer of this rank's forward passes; None: there is only one rank."""
        self._stragglers: StragglerDetector | None = None
        if world.size > 1:
            self._stragglers = StragglerDetector(world.gather(socket.gethostname()), clock)
        self._waits = waits
        self._seconds = dict.fromkeys(("data", "starved", "eval", "wait_inside"), 0.0)
        self._steps: list[float] = []  # seconds per step, since the last lap
        self._is_open = False  # a step has started
        self._items: Tensor | None = None
        self._histogram: Counter[int] = Counter()
        self._step_count, self._step_s, self._laps = 0, 0.0, 0
        self._peak_bytes = [0] * world.size
        self._memory_read_at = -math.inf
        self._first_samples = self._samples = samples
        self._at_start = self._at_lap = self._read()
        self._outside_s = self._outside()
        self._started_at = self._step_began = self._lap_began = clock()

    # --- called by the training loop -------------------------------------------------------------

    def begin_step(self) -> None:
        """Record that a step begins and the one before has ended."""
        if self._is_open:
            self._end_step(self._clock())
        self._is_open = True

    @contextmanager
    def times(self, name: str) -> Iterator[None]:
        """Add the time of the block to the ledger as `data` (fetching a batch) or `eval`."""
        began, waited_s = self._clock(), self._waits["data_wait"]()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - began
            self._seconds["wait_inside"] += self._waits["data_wait"]() - waited_s

    def _end_step(self, now: float) -> None:
        outside_s = self._outside()
        self._steps.append(now - self._step_began - (outside_s - self._outside_s))
        self._step_began, self._outside_s, self._is_open = now, outside_s, False

    def _outside(self) -> float:
        """Return the total seconds between steps that belong to none."""
        return self._seconds["eval"] + self._waits["save_stall"]()

    def count_items(self, mean: Tensor) -> None:
        """Add a step's items, as the mean over the ranks (0-dim, float64)."""
        self._items = mean if self._items is None else self._items + mean

    # --- results ---------------------------------------------------------------------------------

    def rank_values(self, starved_s: float) -> list[float]:
        """Return the values that this rank reports with the next log line; waits for the GPU.

        Args:
            starved_s: total seconds in which this rank's data was late.
        """
        now = self._clock()
        if now - self._memory_read_at >= _MEMORY_INTERVAL_S:
            self._memory_read_at = now
            self._peak_bytes[self._world.rank] = peak_bytes(self._world.device)
        if self.forward is None:
            return []
        self._seconds["starved"] = starved_s
        lap = self._since(self._at_lap)
        steps = max(len(self._steps) + self._is_open, 1)
        data_s = lap["data"] + lap["starved"]
        peak = self._peak_bytes[self._world.rank]
        return [data_s / steps, self.forward.take() / steps, peak]

    def lap(self, samples: int, rank_values: Sequence[float]) -> dict[str, float]:
        """Return the metrics since the last lap; begin the next one.

        Args:
            samples: samples consumed so far.
            rank_values: `rank_values` of all ranks, in rank order.
        """
        now = self._clock()
        if self._is_open:
            self._end_step(now)
        elapsed_s = max(now - self._lap_began, 1e-9)
        steps, lap = sorted(self._steps), self._since(self._at_lap)
        metrics = {"samples_per_s": round((samples - self._samples) / elapsed_s, 1)}
        if self._items is not None:
            items = float(self._items) * self._world.size
            metrics[f"{self._item_name}_per_s"] = round(items / elapsed_s, 1)
        if steps:
            metrics |= {
                "step_p50_s": round(_quantile(steps, 0.5), 6),
                "step_p95_s": round(_quantile(steps, 0.95), 6),
                "step_max_s": round(steps[-1], 6),
            }
        metrics["data_wait_s"] = round(_data_wait_s(lap), 6)
        metrics["save_stall_s"] = round(_save_stall_s(lap), 6)
        if self._flops_per_step is not None:
            metrics["flops_per_s"] = round(self._flops_per_step * len(steps) / elapsed_s)
        self._lap_began, self._items = now, None
        self._close_lap(samples)
        self._compare_ranks(rank_values, len(steps))
        return metrics

    def _close_lap(self, samples: int) -> None:
        """Add the lap's steps to the attempt's totals."""
        self._histogram.update(map(_bucket, self._steps))
        self._step_count += len(self._steps)
        self._step_s += sum(self._steps)
        self._steps, self._samples, self._at_lap = [], samples, self._read()

    def _compare_ranks(self, values: Sequence[float], steps: int) -> None:
        self._laps += 1
        if self._stragglers is None:
            return
        ranks = [
            values[start : start + _RANK_VALUES] for start in range(0, len(values), _RANK_VALUES)
        ]
        self._peak_bytes = [int(peak) for _, _, peak in ranks]
        if self._laps == 1:
            return  # its steps compile, allocate, and fill the caches
        if text := self._stragglers.add([(data, forward) for data, forward, _ in ranks], steps):
            self._log(text)

    def totals(self) -> Totals:
        """Return the attempt's totals so far; safe at any time and on any thread."""
        steps, seconds = list(self._steps), self._since(self._at_start)
        count, step_s = self._step_count + len(steps), self._step_s + sum(steps)
        histogram = self._histogram + Counter(map(_bucket, steps))
        mfu = None
        if self._flops_per_step is not None and self._peak_flops_per_s and step_s > 0:
            mfu = self._flops_per_step * count / step_s / self._peak_flops_per_s
        peaks = list(self._peak_bytes)
        peaks[self._world.rank] = peak_bytes(self._world.device)
        return Totals(
            seconds=self._clock() - self._started_at,
            steps=count,
            samples=self._samples - self._first_samples,
            step_s=step_s,
            step_p50_s=_histogram_quantile(histogram, 0.5),
            step_p95_s=_histogram_quantile(histogram, 0.95),
            data_wait_s=_data_wait_s(seconds),
            eval_s=seconds["eval"],
            save_stall_s=_save_stall_s(seconds),
            peak_bytes=tuple(peaks),
            mfu=mfu,
        )

    def close(self, samples: int) -> None:
        """End the last lap, if it is not yet logged; remove the hooks."""
        if self._is_open:
            self._end_step(self._clock())
        self._close_lap(samples)
        if self.forward is not None:
            self.forward.unhook()

    def _read(self) -> dict[str, float]:
        """Return the total seconds by name."""
        return {**self._seconds, **{name: wait() for name, wait in self._waits.items()}}

    def _since(self, before: Mapping[str, float]) -> dict[str, float]:
        return {name: seconds - before[name] for name, seconds in self._read().items()}


def _data_wait_s(seconds: Mapping[str, float]) -> float:
    return seconds["data"] + seconds["data_wait"] - seconds["wait_inside"]


def _save_stall_s(seconds: Mapping[str, float]) -> float:
    return seconds["save_stall"] + seconds["update_stall"]


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the GPU, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss starts at the peak of the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quantile(ascending: Sequence[float], fraction: float) -> float:
    """Return the smallest value that at least this fraction of all values does not exceed."""
    return ascending[max(math.ceil(fraction * len(ascending)) - 1, 0)]


def _bucket(seconds: float) -> int:
    return math.floor(math.log(max(seconds, 1e-9)) / math.log(_BUCKET_RATIO))


def _histogram_quantile(histogram: Counter[int], fraction: float) -> float:
    target, count = fraction * histogram.total(), 0
    for bucket in sorted(histogram):
        count += histogram[bucket]
        if count >= target:
            return float(_BUCKET_RATIO ** (bucket + 0.5))
    return 0.0
