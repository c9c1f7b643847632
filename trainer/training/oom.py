"""Out-of-memory errors: the memory in use, and the settings that reduce it."""

import traceback
from pathlib import Path

import torch

from trainer.cluster.world import World
from trainer.config.schema import Run
from trainer.core.formatting import size
from trainer.errors import TrainingError
from trainer.monitoring.timing import peak_bytes
from trainer.training.evaluation import evaluate

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts of out-of-memory errors that torch raises as plain RuntimeErrors."""


def explain(error: BaseException, run: Run, world: World) -> TrainingError | None:
    """Return an error with advice if `error` is out of memory, else None. Any rank."""
    text = str(error)
    message = next((message for message in _MESSAGES if message in text), None)
    is_plain = isinstance(error, RuntimeError) and message is not None
    if not is_plain and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return None
    line = next((line for line in text.splitlines() if message is None or message in line), "")
    frames = traceback.walk_tb(error.__traceback__)
    is_evaluation = any(frame.f_code is evaluate.__code__ for frame, _ in frames)
    per_rank, accumulate = run.trainer.global_batch_size // world.size, run.trainer.accumulate
    advice = (_evaluation_advice if is_evaluation else _training_advice)(run, world, per_rank)
    explained = TrainingError(
        "\n".join(
            [
                f"out of memory on rank {world.rank}{' in an evaluation' if is_evaluation else ''}:"
                f" {line.strip()[:200] or type(error).__name__}",
                f"  {_memory(world.device)}",
                f"  Microbatch: {per_rank // accumulate:,} samples ({per_rank:,} per rank, "
                f"trainer.accumulate={accumulate}). To use less memory, cheapest first:",
                *(f"    {setting}" for setting in advice),
            ]
        )
    )
    if getattr(error, "agreed", False):
        explained.agreed = True  # type: ignore[attr-defined]
    return explained


def _training_advice(run: Run, world: World, per_rank: int) -> list[str]:
    now = run.trainer.accumulate
    advice = []
    more = next((n for n in range(now + 1, per_rank + 1) if per_rank % n == 0), None)
    if more is not None:
        advice.append(
            f"trainer.accumulate={more}: microbatches of {per_rank // more:,}, same gradients"
        )
    if run.trainer.precision in ("fp32", "tf32"):
        advice.append("trainer.precision=bf16: activations take half the memory")
    if not run.parallel.recompute:
        advice.append("parallel.recompute=true: keeps only the input of each block")
    if run.parallel.strategy != "fsdp":
        fraction = f"1/{world.size}" if world.size > 1 else "on several ranks, a part"
        advice.append(
            f"parallel=fsdp: each rank keeps {fraction} of weights, gradients and optimizer state"
        )
    smaller = world.size * now
    if more is None and run.trainer.global_batch_size > smaller:
        advice.append(f"trainer.global_batch_size={smaller:,}: needs a new run")
    return advice or ["a smaller model, or more ranks"]


def _evaluation_advice(run: Run, world: World, per_rank: int) -> list[str]:
    now = run.trainer.eval_batch_size or max(per_rank // run.trainer.accumulate, 1)
    if now == 1:
        return ["a smaller model: its evaluation already has one sample per rank"]
    return [f"trainer.eval_batch_size={now // 2}: it is {now:,} now; the metrics stay the same"]


def _memory(device: torch.device) -> str:
    peak = f"Peak use of this rank: {size(peak_bytes(device))}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{peak}; {size(free)} of the GPU's {size(total)} are free"
    try:
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        return f"{peak}; {size(int(available.split()[0]) * 1024)} of memory are free"
    except (OSError, IndexError, ValueError):  # not Linux
        return peak
