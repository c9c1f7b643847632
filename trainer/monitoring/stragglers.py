"""What of a step's time is a rank's own, and which rank keeps the others waiting."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.cluster.world import World

_RATIO, _MORE_S, _STEPS, _AGAIN_S = 1.3, 0.002, 20, 600.0
"""A rank is slow whose own time is so many medians and so much more, over so many steps; how long
after that it may be said again."""


class OwnTime:
    """What of this rank's time is its own: its losses, less where they wait for other ranks.

    DDP's forward begins with rank 0's buffers, and FSDP's gathers parameters in between, so that
    only what the task does besides is known to be its own. On a GPU it is between events.
    """

    def __init__(self, world: World) -> None:
        self._on_gpu = world.device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._since: Any = None
        self._waits_since: Any = None
        self._handles: list[Any] = []

    def hook(self, wrapped: Sequence[nn.Module]) -> None:
        """Leave out what these wait for in their forward, from now on."""
        for module in wrapped:
            is_ddp = isinstance(module, DistributedDataParallel)
            if is_ddp or hasattr(module, "set_requires_gradient_sync"):
                begin = module.register_forward_pre_hook(self._wait_begins, prepend=True)
                end = (
                    module.module.register_forward_pre_hook(self._wait_ends)
                    if isinstance(module, DistributedDataParallel)
                    else module.register_forward_hook(self._wait_ends)
                )
                self._handles += [begin, end]

    def unhook(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begins(self) -> None:
        """A loss is about to be computed."""
        self._since = self._mark()

    def ends(self) -> None:
        """It has been."""
        self._spans.append((self._since, self._mark()))
        self._since = None

    def _wait_begins(self, *_: Any) -> None:
        if self._since is not None:  # not in an evaluation
            self._waits_since = self._mark()

    def _wait_ends(self, *_: Any) -> None:
        if self._waits_since is not None:
            self._waits.append((self._waits_since, self._mark()))
            self._waits_since = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the GPU."""
        spans, waits, self._spans, self._waits = self._spans, self._waits, [], []
        return sum(map(self._between, spans)) - sum(map(self._between, waits))

    def _between(self, span: tuple[Any, Any]) -> float:
        if not self._on_gpu:
            return float(span[1] - span[0])
        span[1].synchronize()
        return float(span[0].elapsed_time(span[1])) / 1000


class Slowest:
    """Says which rank takes longest, when that is much longer than the others, now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.hosts: Sequence[str] = ()
        self._clock = clock
        self._sums: list[list[float]] = []
        self._steps = 0
        self._said: dict[int, float] = {}

    def add(self, ranks: Sequence[tuple[float, float]], steps: int) -> str:
        """Take (data, forward) in s a step of each rank; return what there is to say, or ""."""
        if not self._sums:
            self._sums = [[0.0, 0.0] for _ in ranks]
        for total, (data_s, forward_s) in zip(self._sums, ranks, strict=True):
            total[0] += data_s * steps
            total[1] += forward_s * steps
        self._steps += steps
        if self._steps < _STEPS:
            return ""
        means = [(data / self._steps, forward / self._steps) for data, forward in self._sums]
        self._sums, self._steps = [], 0
        whole = [sum(each) for each in means]
        usual_s, most_s = statistics.median_low(whole), max(whole)
        rank = whole.index(most_s)
        if most_s <= _RATIO * usual_s or most_s <= usual_s + _MORE_S:
            return ""
        if self._clock() - self._said.get(rank, -math.inf) < _AGAIN_S:
            return ""
        self._said[rank] = self._clock()
        data_s, forward_s = means[rank]
        return (
            f"rank {rank} ({self.hosts[rank]}) is slow: {most_s:.3g} s of its own in a step where "
            f"the median is {usual_s:.3g} s; its data takes {data_s:.3g} s, its forward "
            f"{forward_s:.3g} s"
        )
