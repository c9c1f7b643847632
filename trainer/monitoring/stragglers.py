"""Detection of ranks that keep the others waiting."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.cluster.world import World

_MIN_RATIO = 1.3
"""Minimum ratio of a straggler's own time per step to the ranks' median."""
_MIN_EXCESS_S = 0.002
"""Minimum excess of a straggler's own time per step over the ranks' median, seconds."""
_WINDOW_STEPS = 20
"""Steps over which the ranks' times are averaged."""
_REPEAT_S = 600.0
"""Minimum time between two messages about the same rank, seconds."""


class ForwardTimer:
    """Time of this rank's forward passes, without waiting for other ranks.

    DDP's forward begins with a broadcast of rank 0's buffers, and FSDP's gathers parameters, so
    only the rest of the task's loss is this rank's own time. On a GPU, CUDA events measure it.

    Args:
        world: the ranks.
        wrapped: the modules that training calls; hooks there exclude their waits.
    """

    def __init__(self, world: World, wrapped: Sequence[nn.Module]) -> None:
        self._on_gpu = world.device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._wait_began: Any = None
        self._handles: list[Any] = []
        for module in wrapped:
            is_ddp = isinstance(module, DistributedDataParallel)
            if is_ddp or hasattr(module, "set_requires_gradient_sync"):
                begin = module.register_forward_pre_hook(self._begin_wait, prepend=True)
                end = (
                    module.module.register_forward_pre_hook(self._end_wait)
                    if isinstance(module, DistributedDataParallel)
                    else module.register_forward_hook(self._end_wait)
                )
                self._handles += [begin, end]

    def unhook(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> None:
        self._began = self._mark()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._began, self._mark()))
        self._began = None

    def _begin_wait(self, *_: Any) -> None:
        if self._began is not None:  # not in an evaluation
            self._wait_began = self._mark()

    def _end_wait(self, *_: Any) -> None:
        if self._wait_began is not None:
            self._waits.append((self._wait_began, self._mark()))
            self._wait_began = None

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the GPU."""
        spans, waits, self._spans, self._waits = self._spans, self._waits, [], []
        return sum(map(self._length_s, spans)) - sum(map(self._length_s, waits))

    def _length_s(self, span: tuple[Any, Any]) -> float:
        if not self._on_gpu:
            return float(span[1] - span[0])
        span[1].synchronize()
        return float(span[0].elapsed_time(span[1])) / 1000


class StragglerDetector:
    """Detection of the rank whose own time per step exceeds the others'.

    Args:
        hosts: host name of each rank.
        clock: returns seconds.
    """

    def __init__(self, hosts: Sequence[str], clock: Callable[[], float]) -> None:
        self._hosts, self._clock = hosts, clock
        self._sums = [[0.0, 0.0] for _ in hosts]
        self._steps = 0
        self._reported_at: dict[int, float] = {}

    def add(self, ranks: Sequence[tuple[float, float]], steps: int) -> str:
        """Add some steps; return a message about a straggler, or an empty string.

        Args:
            ranks: data and forward seconds per step of each rank.
            steps: number of steps.
        """
        for total, (data_s, forward_s) in zip(self._sums, ranks, strict=True):
            total[0] += data_s * steps
            total[1] += forward_s * steps
        self._steps += steps
        if self._steps < _WINDOW_STEPS:
            return ""
        means = [(data / self._steps, forward / self._steps) for data, forward in self._sums]
        self._sums, self._steps = [[0.0, 0.0] for _ in means], 0
        times = [data_s + forward_s for data_s, forward_s in means]
        median_s, max_s = statistics.median_low(times), max(times)
        rank = times.index(max_s)
        if max_s <= _MIN_RATIO * median_s or max_s <= median_s + _MIN_EXCESS_S:
            return ""
        if self._clock() - self._reported_at.get(rank, -math.inf) < _REPEAT_S:
            return ""
        self._reported_at[rank] = self._clock()
        data_s, forward_s = means[rank]
        return (
            f"straggler: rank {rank} ({self._hosts[rank]}) takes {max_s:.3g} s per step, the "
            f"median rank {median_s:.3g} s (its data: {data_s:.3g} s, its forward: "
            f"{forward_s:.3g} s)"
        )
