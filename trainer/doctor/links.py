"""Speed of the links between the ranks: all-reduce latency and bandwidth."""

import statistics
import time

import torch
import torch.distributed as dist

from trainer.cluster.world import World
from trainer.core.formatting import size
from trainer.doctor.finding import Finding

_LATENCY_REPEATS, _BANDWIDTH_REPEATS = 50, 5
_LARGE_BYTES = 64 << 20


def all_reduce(world: World, gradient_bytes: int | None) -> Finding:
    """Measure latency and bus bandwidth of the training group's all-reduce. Collective.

    Bus bandwidth is 2 (n - 1) / n times bytes per second, which is independent of the number of
    ranks n (nccl-tests, doc/PERFORMANCE.md).

    Args:
        world: the ranks.
        gradient_bytes: bytes the run reduces in a step, if known.
    """
    if world.size == 1:
        return Finding("all-reduce", "green", "one rank, no all-reduce")
    small = torch.ones(1, device=world.device)
    large = torch.ones(_LARGE_BYTES // 4, device=world.device)
    latency_s = statistics.median([_timed(small) for _ in range(_LATENCY_REPEATS)][5:])
    large_s = statistics.median([_timed(large) for _ in range(_BANDWIDTH_REPEATS)][1:])
    bus_bytes_per_s = 2 * (world.size - 1) / world.size * _LARGE_BYTES / large_s
    text = f"{latency_s * 1e3:.2f} ms latency, {size(bus_bytes_per_s)}/s bus bandwidth"
    if gradient_bytes is not None:
        step_s = latency_s + gradient_bytes / _LARGE_BYTES * large_s
        text += f"; gradients take about {step_s * 1e3:.3g} ms per step, minus overlap"
    return Finding("all-reduce", "green", text)


def _timed(values: torch.Tensor) -> float:
    if values.is_cuda:
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start_s
