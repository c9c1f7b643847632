"""Out of memory: which settings need less of it, in numbers."""

import traceback
from pathlib import Path

import torch

from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core.formatting import size
from trainer.errors import TrainingError
from trainer.monitoring.timing import peak_bytes
from trainer.training.evaluation import evaluate

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of errors that are no torch.OutOfMemoryError."""


def explain(error: BaseException, run: Run, world: World) -> TrainingError | None:
    """Return an error that tells what to change, if memory is what was short. Any rank."""
    text = str(error)
    sign = next((sign for sign in _SIGNS if sign in text), None)
    is_short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not is_short and not (isinstance(error, RuntimeError) and sign):
        return None
    line = next((line for line in text.splitlines() if sign is None or sign in line), "")
    evaluates = any(
        frame.f_code is evaluate.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    ways = _evaluation_ways(run, world) if evaluates else _training_ways(run, world)
    when = " in an evaluation" if evaluates else ""
    made = TrainingError(
        f"out of memory on rank {world.rank}{when}: {line.strip()[:200] or type(error).__name__}\n"
        f"  {_memory(world.device)}\n"
        f"  {_batch(run, world)}. What needs less, the cheapest first:\n"
        + "\n".join(f"    {way}" for way in ways)
    )
    if getattr(error, "agreed", False):
        made.agreed = True  # type: ignore[attr-defined]
    return made


def _share(run: Run, world: World) -> int:
    return run.trainer.global_batch_size // world.size


def _batch(run: Run, world: World) -> str:
    share, accumulate = _share(run, world), run.trainer.accumulate
    return (
        f"A microbatch is {share // accumulate:,} samples now: {share:,} a rank, "
        f"trainer.accumulate={accumulate}"
    )


def _training_ways(run: Run, world: World) -> list[str]:
    share, now = _share(run, world), run.trainer.accumulate
    ways = []
    further = [count for count in range(now + 1, share + 1) if share % count == 0]
    if further:
        ways.append(
            f"trainer.accumulate={further[0]}: microbatches of {share // further[0]:,}, the same "
            "mathematics"
        )
    if run.trainer.precision in ("fp32", "tf32"):
        ways.append("trainer.precision=bf16: what is kept for the backward is half as large")
    if not run.parallel.recompute:
        ways.append("parallel.recompute=true: of each block, only its input is kept")
    if run.parallel.strategy != "fsdp":
        ways.append(
            f"parallel=fsdp: a rank keeps 1/{world.size} of weights, gradients and optimizer state"
            if world.size > 1
            else "parallel=fsdp on several ranks: each keeps its part of weights, gradients and "
            "optimizer state"
        )
    smaller = world.size * now
    if not further and run.trainer.global_batch_size > smaller:
        ways.append(f"trainer.global_batch_size={smaller:,}: another run")
    return ways or ["a smaller model, or more ranks"]


def _evaluation_ways(run: Run, world: World) -> list[str]:
    share = max(_share(run, world) // run.trainer.accumulate, 1)
    now = run.trainer.eval_batch_size or share
    if now == 1:
        return ["a smaller model: its evaluation has one sample a rank"]
    return [f"trainer.eval_batch_size={now // 2}: it is {now:,} now; the figures stay the same"]


def _memory(device: torch.device) -> str:
    """Return what this process had, and what is left."""
    peak = f"At most {size(peak_bytes(device))} were in use by this rank"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{peak}; {size(free)} of the GPU's {size(total)} are free"
    free_bytes = _available_bytes()
    return peak if free_bytes is None else f"{peak}; {size(free_bytes)} of the machine's are free"


def _available_bytes() -> int | None:
    try:
        found = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        return int(found.split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None
