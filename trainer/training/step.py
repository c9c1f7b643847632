"""Training step: forward, backward, gradient clipping, optimizer update."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from trainer.monitoring.timing import Timing
from trainer.protocols import Batch
from trainer.training import parallel
from trainer.training.job import Job, Phase


def train_step(
    job: Job,
    microbatches: list[Batch],
    *,
    with_metrics: bool = False,
    timing: Timing | None = None,
) -> tuple[dict[str, Tensor], list[bool]]:
    """Take one step: forward, backward, clip and update, phase by phase. Collective.

    Args:
        job: the training run.
        microbatches: this rank's part of the global batch, on its device.
        with_metrics: return the task's training metrics and the gradient norm, not only the loss.
        timing: times the forward passes.

    Returns:
        This rank's metrics (0-dim tensors on its device; their means over the ranks are the global
        batch's), and for each phase True if its update was applied.
    """
    metrics: dict[str, Tensor] = {}
    applied = []
    loss_weights = _loss_weights(job, microbatches, timing)
    for phase in job.phases:
        with phase.own_gradients(job.model):
            values = _backward(job, phase, microbatches, loss_weights, with_metrics, timing)
        grad_norm = _clip(job, phase)
        if grad_norm is not None and with_metrics:
            values["grad_norm"] = grad_norm
        applied.append(_update(job, phase, grad_norm))
        (job.model if phase.name else phase.optimizer).zero_grad(set_to_none=True)
        metrics |= {phase.metric_name(name): value for name, value in values.items()}
    if job.ema is not None and any(applied):
        job.ema.update()
    if len(job.phases) > 1:
        losses = [metrics[phase.metric_name("loss")] for phase in job.phases]
        metrics = {"loss": torch.stack(losses).sum(), **metrics}
    return metrics, applied


def _backward(
    job: Job,
    phase: Phase,
    microbatches: list[Batch],
    loss_weights: Sequence[float | Tensor | None],
    with_metrics: bool,
    timing: Timing | None,
) -> dict[str, Tensor]:
    """Accumulate the gradient of the global batch; return the phase's loss and metrics."""
    totals: dict[str, Tensor] = {}
    forward_timer = timing.forward if timing is not None else None
    last = len(microbatches) - 1
    for index, (batch, weight) in enumerate(zip(microbatches, loss_weights, strict=True)):
        with parallel.reducing(phase.wrapped, last=index == last):
            with forward_timer or nullcontext(), parallel.autocast(job.precision, job.world.device):
                loss, outputs = phase.loss(job.task, batch)
            job.scaler.scale(loss if weight is None else loss * weight).backward()
        metrics = {"loss": loss.detach()}
        if with_metrics:
            with torch.no_grad():
                metrics |= job.options.train_metrics(outputs, batch, *phase.task_arguments)
        for name, value in metrics.items():
            term = value.float() if weight is None else value.float() * weight
            totals[name] = totals[name] + term if name in totals else term
    return totals


def _loss_weights(
    job: Job, microbatches: list[Batch], timing: Timing | None
) -> Sequence[float | Tensor | None]:
    """Return the factor of each microbatch's loss; None: a single microbatch, factor 1.

    DDP and FSDP average gradients over ranks, so a weight is relative to the mean number of items
    per rank. The sum is then exactly the mean over all items (tokens, for example) of the global
    batch, however they are distributed over ranks. Collective if the task has weights.
    """
    item_count = job.options.weight
    if item_count is None:
        count = len(microbatches)
        return [None] if count == 1 else [1 / count] * count
    counts = [torch.as_tensor(item_count(batch), dtype=torch.float64) for batch in microbatches]
    items = torch.stack([count.to(job.world.device) for count in counts])
    mean = job.world.mean(items.sum())
    if timing is not None:
        timing.count_items(mean)
    return list((items / mean.clamp(min=torch.finfo(torch.float64).tiny)).float())


def _clip(job: Job, phase: Phase) -> Tensor | None:
    """Clip the gradient norm; return the norm before clipping, or None if it is not needed."""
    if job.clip_norm is None and (not job.skip_nonfinite or job.scaler.is_enabled()):
        return None
    job.scaler.unscale_(phase.optimizer)
    max_norm = math.inf if job.clip_norm is None else job.clip_norm
    return parallel.clip(phase.parameters(job.model), max_norm)


def _update(job: Job, phase: Phase, grad_norm: Tensor | None) -> bool:
    """Step the optimizer; return False if the step was skipped for a non-finite gradient."""
    if job.scaler.is_enabled():
        scale = job.scaler.get_scale()
        job.scaler.step(phase.optimizer)
        job.scaler.update()
        return job.scaler.get_scale() >= scale
    applied = not job.skip_nonfinite or grad_norm is None or bool(grad_norm.isfinite())
    if applied:
        phase.optimizer.step()
    return applied


def warm_up(job: Job) -> None:
    """Run the passes after which DDP's buckets are final; call before loading. Collective."""

    first_batches = cache(job.data.first)

    def forward_backward(phase: Phase) -> None:
        microbatches = first_batches()
        with phase.own_gradients(job.model):
            with parallel.autocast(job.precision, job.world.device):
                loss, _ = phase.loss(job.task, microbatches[0])
            loss.backward()

    for phase in job.phases:
        run = partial(forward_backward, phase)
        parallel.settle_buckets(phase.wrapped, job.model, job.world, run)
