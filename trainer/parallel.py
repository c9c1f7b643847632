"""How the model is spread over ranks: DistributedDataParallel, its warm-up, mixed precision."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer import rng
from trainer.distributed import World

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WARM_UP_PASSES = 2  # static_graph rebuilds its buckets after the second


@dataclass(frozen=True)
class DdpOptions:
    """DistributedDataParallel's own options, with its own names."""

    bucket_cap_mb: float = 25.0
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    find_unused_parameters: bool = False


def wrap(model: nn.Module, world: World, options: DdpOptions) -> nn.Module:
    """Return what training calls: `model` itself on one rank, else DDP around it. Collective."""
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=options.bucket_cap_mb,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        static_graph=options.static_graph,
        find_unused_parameters=options.find_unused_parameters,
    )


def settle_buckets(
    wrapped: nn.Module, model: nn.Module, world: World, passes: Callable[[], None]
) -> None:
    """Bring DDP's reducer to its final buckets before any state is loaded. Collective.

    The first iteration of every reducer sums gradients in other buckets, and so in another order,
    than all later ones. With two ranks a sum is the same either way round; with three or more, a
    resumed run would differ from its first step on. So every attempt, fresh or resumed, first
    runs `passes` (a forward and a backward on the run's first batch) without an update; then
    buffers, gradients and generators are put back.
    """
    if world.size < 3 or not isinstance(wrapped, DistributedDataParallel):
        return
    generators = rng.capture()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for _ in range(_WARM_UP_PASSES):
        passes()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    rng.restore(generators)
    rebuilds_by_now = not (wrapped.find_unused_parameters or wrapped.static_graph)
    if rebuilds_by_now and not has_rebuilt_buckets(wrapped):
        raise RuntimeError("DDP kept its first buckets after the warm-up; resume is not exact")


def has_rebuilt_buckets(wrapped: DistributedDataParallel) -> bool:
    """Return whether the reducer has its final buckets.

    torch has no public word for it; a test fails when this attribute changes. Without unused
    parameters the reducer rebuilds at the second forward, with a static graph at the third, and
    with find_unused_parameters never.
    """
    return bool(wrapped._has_rebuilt_buckets)


def take_rank0_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers, as DDP's next forward would. Collective."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def reducing(wrapped: nn.Module, *, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks only in the last microbatch of a step."""
    if last or not isinstance(wrapped, DistributedDataParallel):
        yield
    else:
        with wrapped.no_sync():
            yield


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler; it does nothing unless `precision` is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
