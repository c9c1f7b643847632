"""How fast steps are taken, what they wait for, and which rank keeps the others waiting."""

import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.data.source import Feed
from trainer.monitoring.stragglers import OwnTime, Slowest

_MEMORY_EVERY_S = 1.0
_RESOLUTION = 1.02
"""Of the step times that are kept over an attempt."""
_OWN = 3
"""Numbers that a rank tells of itself: data and forward (s a step), and its peak memory (bytes)."""


@dataclass(frozen=True)
class Totals:
    """What an attempt's steps came to; all of rank 0, but for the memory."""

    seconds: float
    """From the first step's beginning on, with evaluations and saves."""
    steps: int
    samples: int
    step_s: float
    """Spent in steps, their data included; evaluations and what saves do between steps are not."""
    step_p50_s: float
    step_p95_s: float
    data_wait_s: float
    eval_s: float
    save_stall_s: float
    peak_bytes: tuple[int, ...]
    """The most memory that each rank had: allocated on its GPU, or resident."""
    mfu: float | None
    """Model FLOPs of the steps over what the device could have done in their time, 0 … 1: A.
    Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022, appendix B."""


class Pace:
    """Times the steps of one attempt on this rank: two looks at the clock a step.

    A step lasts from one boundary to the next, less evaluations and what the saver does between
    steps. Nothing waits for a GPU: there a step is over when its kernels are queued, so that the
    one that logs, which waits for them, takes the time of those before it. With several ranks,
    each also times what is its own, its data and its forward, and the ranks tell each other in the
    sum that makes a line of figures anyway.

    Args:
        world: the ranks.
        flops_per_step: of the model, on one rank; None: unknown.
        peak_flops_per_s: of one rank's device; None: unknown.
        clock: returns seconds.
    """

    def __init__(
        self,
        world: World,
        *,
        flops_per_step: int | None = None,
        peak_flops_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.flops_per_step, self.peak_flops_per_s = flops_per_step, peak_flops_per_s
        self._world, self._clock = world, clock
        self.own_time = OwnTime(world) if world.size > 1 else None
        """Told where a loss begins and ends; None: there is no other rank."""
        self._slow = Slowest(clock)
        self._steps: list[float] = []  # seconds, since the last lap
        self._is_open = False
        self._away_s = self._data_s = self._stall_s = self._waited_s = self._starved_s = 0.0
        self._items: Tensor | None = None
        self._durations: Counter[int] = Counter()
        self._count, self._step_s, self._data_all_s, self._eval_s = 0, 0.0, 0.0, 0.0
        self._peak_bytes = [0] * world.size
        self._memory_at = -math.inf
        self._laps = 0
        self.is_started = False

    # --- what the loop tells ---------------------------------------------------------------------

    def start(
        self,
        samples: int,
        saver: Saver,
        stop: Stop,
        *,
        wrapped: Sequence[nn.Module] = (),
        say: Callable[[str], None] = print,
        items: str = "items",
    ) -> None:
        """Begin to count. Collective.

        Args:
            samples: consumed before this attempt.
            saver: knows what saves keep the training from.
            stop: knows how long ranks waited until each of them had its data.
            wrapped: what training calls; hooks there leave out what waits for other ranks.
            say: called with a sentence about a slow rank. Any rank; rank 0's is heard.
            items: what the task weighs by, in the plural.
        """
        self._saver, self._stop, self._say, self._item_name = saver, stop, say, items
        self.feed: Feed[Any] | None = None
        self._first_samples = self._samples = samples
        self._stalls_before = saver.stall_s + saver.update_stall_s
        self._stall_s, self._waited_s, self._stalled_s = (
            saver.stall_s, stop.waited_s, self._stalls_before,
        )  # fmt: skip
        self._first = self._began = self._lap_at = self._clock()
        if self.own_time is not None:
            self.own_time.hook(wrapped)
            self._slow.hosts = self._world.gather(socket.gethostname())
        self.is_started = True

    def begin(self) -> None:
        """Take note that a step begins, the next thing being its data."""
        now = self._clock()
        if self._is_open:
            self._close(now)
        self._is_open, self._fetch_at = True, now

    def fed(self) -> None:
        """Take note that the step has its data."""
        self._data_s += self._clock() - self._fetch_at

    def _close(self, now: float) -> None:
        stall_s = self._saver.stall_s
        self._steps.append(now - self._began - self._away_s - (stall_s - self._stall_s))
        self._began, self._stall_s, self._away_s = now, stall_s, 0.0

    def weighed(self, mean: Tensor) -> None:
        """Take note of a step's items, as the mean over the ranks (0-dim, float64)."""
        self._items = mean if self._items is None else self._items + mean

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave out what is done inside."""
        began, waited_s = self._clock(), self._stop.waited_s
        try:
            yield
        finally:
            spent = self._clock() - began
            self._away_s += spent
            self._eval_s += spent
            self._waited_s += self._stop.waited_s - waited_s

    # --- what comes of it ------------------------------------------------------------------------

    def own(self) -> list[float]:
        """Return what this rank tells the others with the next line; waits for the GPU."""
        now = self._clock()
        if now - self._memory_at >= _MEMORY_EVERY_S:
            self._memory_at = now
            self._peak_bytes[self._world.rank] = peak_bytes(self._world.device)
        if self.own_time is None:
            return []
        steps = max(len(self._steps) + self._is_open, 1)
        starved_s = self.feed.starved_s if self.feed is not None else 0.0
        data_s = self._data_s + starved_s - self._starved_s
        self._starved_s = starved_s
        return [data_s / steps, self.own_time.take() / steps, self._peak_bytes[self._world.rank]]

    def lap(self, samples: int, told: Sequence[float]) -> dict[str, float]:
        """Return the figures since the last lap; begin the next one.

        Args:
            samples: consumed so far.
            told: what `own` returned, of all ranks in order.
        """
        now = self._clock()
        if self._is_open:
            self._close(now)
            self._is_open = False  # what follows is the next step's
        elapsed_s = max(now - self._lap_at, 1e-9)
        taken = sorted(self._steps)
        data_s = self._data_s + self._stop.waited_s - self._waited_s
        stalled_s = self._saver.stall_s + self._saver.update_stall_s
        figures = {"samples_per_s": round((samples - self._samples) / elapsed_s, 1)}
        if self._items is not None:
            items = float(self._items) * self._world.size
            figures[f"{self._item_name}_per_s"] = round(items / elapsed_s, 1)
        if taken:
            figures |= {
                "step_p50_s": round(_quantile(taken, 0.5), 6),
                "step_p95_s": round(_quantile(taken, 0.95), 6),
                "step_max_s": round(taken[-1], 6),
            }
        figures["data_wait_s"] = round(data_s, 6)
        figures["save_stall_s"] = round(stalled_s - self._stalled_s, 6)
        if self.flops_per_step is not None:
            figures["flops_per_s"] = round(self.flops_per_step * len(taken) / elapsed_s)
        self._fold(data_s)
        self._samples, self._lap_at, self._items = samples, now, None
        self._waited_s, self._stalled_s = self._stop.waited_s, stalled_s
        self._hear(told, len(taken))
        return figures

    def _fold(self, data_s: float) -> None:
        """Add the lap's steps to the attempt's."""
        self._durations.update(map(_bucket, self._steps))
        self._count += len(self._steps)
        self._step_s += sum(self._steps)
        self._data_all_s += data_s
        self._steps, self._data_s = [], 0.0

    def _hear(self, told: Sequence[float], steps: int) -> None:
        self._laps += 1
        if not told:
            return
        ranks = [told[start : start + _OWN] for start in range(0, len(told), _OWN)]
        self._peak_bytes = [int(peak) for _, _, peak in ranks]
        if self._laps == 1:
            return  # its steps compile, allocate, and fill the caches
        if text := self._slow.add([(data, forward) for data, forward, _ in ranks], steps):
            self._say(text)

    def totals(self) -> Totals:
        """Return the attempt so far; call it at any time after `start`, on any thread."""
        taken = list(self._steps)
        count, step_s = self._count + len(taken), self._step_s + sum(taken)
        buckets = self._durations + Counter(map(_bucket, taken))
        mfu = None
        if self.flops_per_step is not None and self.peak_flops_per_s and step_s > 0:
            mfu = self.flops_per_step * count / step_s / self.peak_flops_per_s
        peaks = list(self._peak_bytes)
        peaks[self._world.rank] = peak_bytes(self._world.device)
        stalls_s = self._saver.stall_s + self._saver.update_stall_s - self._stalls_before
        return Totals(
            seconds=self._clock() - self._first,
            steps=count,
            samples=self._samples - self._first_samples,
            step_s=step_s,
            step_p50_s=_of_buckets(buckets, 0.5),
            step_p95_s=_of_buckets(buckets, 0.95),
            data_wait_s=self._data_all_s + self._data_s,
            eval_s=self._eval_s,
            save_stall_s=stalls_s,
            peak_bytes=tuple(peaks),
            mfu=mfu,
        )

    def close(self, samples: int) -> None:
        """End the last lap, if no line has; take the hooks away."""
        if self._is_open:
            self._close(self._clock())
            self._is_open = False
        self._fold(self._data_s + self._stop.waited_s - self._waited_s)
        self._waited_s, self._samples = self._stop.waited_s, samples
        if self.own_time is not None:
            self.own_time.unhook()


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this process has had: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss begins with what the process had that started us
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Return the least value that so large a share of all does not exceed."""
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)]


def _bucket(seconds: float) -> int:
    return math.floor(math.log(max(seconds, 1e-9)) / math.log(_RESOLUTION))


def _of_buckets(buckets: Counter[int], share: float) -> float:
    wanted, seen = share * buckets.total(), 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= wanted:
            return float(_RESOLUTION ** (bucket + 0.5))
    return 0.0
