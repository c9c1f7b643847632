"""The way between the ranks: how long an all-reduce takes."""

import statistics
import time

import torch
import torch.distributed as dist

from trainer.cluster.world import World
from trainer.core.formatting import size
from trainer.doctor.finding import Finding

_SMALL, _LARGE_BYTES = 50, 64 << 20
_LARGE = 5


def all_reduce(world: World, gradient_bytes: int | None) -> Finding:
    """Measure latency and bus bandwidth of the training group's all-reduce. Collective.

    Bus bandwidth is 2 (n - 1) / n of the bytes over the time, which does not depend on the number
    of ranks n (nccl-tests, doc/PERFORMANCE.md).

    Args:
        world: the ranks.
        gradient_bytes: what the run reduces in a step, if that is known.
    """
    if world.size == 1:
        return Finding("all-reduce", "green", "one rank, nothing to reduce")
    small = torch.ones(1, device=world.device)
    large = torch.ones(_LARGE_BYTES // 4, device=world.device)
    latency_s = statistics.median([_timed(small) for _ in range(_SMALL)][5:])
    large_s = statistics.median([_timed(large) for _ in range(_LARGE)][1:])
    bus_bytes_per_s = 2 * (world.size - 1) / world.size * _LARGE_BYTES / large_s
    text = f"{latency_s * 1e3:.2f} ms for a number, {size(bus_bytes_per_s)}/s on the bus"
    if gradient_bytes is not None:
        step_s = latency_s + gradient_bytes / _LARGE_BYTES * large_s
        text += f"; the gradients of a step take about {step_s * 1e3:.3g} ms, less what overlaps"
    return Finding("all-reduce", "green", text)


def _timed(values: torch.Tensor) -> float:
    if values.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
