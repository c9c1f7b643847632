"""One training step: forward, backward, clipping and update."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.protocols import Batch
from trainer.training import parallel
from trainer.training.job import Job, Phase


def train_step(
    job: Job, microbatches: list[Batch], *, want_figures: bool = False
) -> tuple[dict[str, Tensor], list[bool]]:
    """Take one step, phase by phase: forward and backward, clip, update. Collective.

    Returns this rank's loss and, where wanted, other figures (0-dim tensors on the device; their
    means over the ranks are the global batch's), and whether each phase's update was applied.
    """
    figures: dict[str, Tensor] = {}
    applied = []
    shares = _shares(job, microbatches)
    for phase in job.phases:
        with phase.alone(job.model):
            found = _backward(job, phase, microbatches, shares, want_figures)
        norm = _clip(job, phase)
        if norm is not None and want_figures:
            found["grad_norm"] = norm
        applied.append(_update(job, phase, norm))
        (job.model if phase.name else phase.optimizer).zero_grad(set_to_none=True)
        figures |= {phase.key(name): value for name, value in found.items()}
    if job.ema is not None and any(applied):
        job.ema.update()
    if len(job.phases) > 1:
        total = torch.stack([figures[phase.key("loss")] for phase in job.phases]).sum()
        figures = {"loss": total, **figures}
    return figures, applied


def _backward(
    job: Job,
    phase: Phase,
    microbatches: list[Batch],
    shares: Sequence[float | Tensor | None],
    want_figures: bool,
) -> dict[str, Tensor]:
    """Leave the gradient of the global batch; return the phase's loss and figures."""
    figures: dict[str, Tensor] = {}
    own = job.pace.own_time if job.pace is not None else None
    last = len(microbatches) - 1
    for index, (batch, share) in enumerate(zip(microbatches, shares, strict=True)):
        with parallel.reducing(phase.wrapped, last=index == last):
            if own is not None:
                own.begins()
            with parallel.autocast(job.precision, job.world.device):
                loss, outputs = phase.loss(job.task, batch)
            if own is not None:
                own.ends()
            job.scaler.scale(loss if share is None else loss * share).backward()
        named = {"loss": loss.detach()}
        if want_figures:
            with torch.no_grad():
                named |= job.options.train_metrics(outputs, batch, *phase.words)
        for name, value in named.items():
            part = value.float() if share is None else value.float() * share
            figures[name] = figures[name] + part if name in figures else part
    return figures


def _clip(job: Job, phase: Phase) -> Tensor | None:
    """Clip the gradient, if it is to be; return its norm before, if it is of use."""
    if job.clip_norm is None and (not job.skip_nonfinite or job.scaler.is_enabled()):
        return None
    job.scaler.unscale_(phase.optimizer)
    most = math.inf if job.clip_norm is None else job.clip_norm
    return parallel.clip(phase.parameters(job.model), most)


def _shares(job: Job, microbatches: list[Batch]) -> Sequence[float | Tensor | None]:
    """Return what each microbatch's loss counts for, None where there is but one that counts.

    Ranks' gradients are averaged, so a share is of a rank's mean part of the global batch: with
    weights (tokens, say) the sum is exactly the mean over the global batch's, wherever they lie.
    Collective where the task weighs.
    """
    weigh = job.options.weight
    if weigh is None:
        count = len(microbatches)
        return [None] if count == 1 else [1 / count] * count
    numbers = [torch.as_tensor(weigh(batch), dtype=torch.float64) for batch in microbatches]
    weights = torch.stack([number.to(job.world.device) for number in numbers])
    mean = job.world.mean(weights.sum())
    if job.pace is not None:
        job.pace.weighed(mean)
    return list((weights / mean.clamp(min=torch.finfo(torch.float64).tiny)).float())


def _update(job: Job, phase: Phase, norm: Tensor | None) -> bool:
    """Update the weights, unless the gradient is not finite and may be left."""
    if job.scaler.is_enabled():
        before = job.scaler.get_scale()
        job.scaler.step(phase.optimizer)
        job.scaler.update()
        return job.scaler.get_scale() >= before
    applied = not job.skip_nonfinite or norm is None or bool(norm.isfinite())
    if applied:
        phase.optimizer.step()
    return applied


def warm_up(job: Job) -> None:
    """Bring DDP to its final buckets; call it before state is loaded. Collective."""

    def passes(phase: Phase) -> None:
        microbatches = job.data.first()
        with phase.alone(job.model):
            with parallel.autocast(job.precision, job.world.device):
                loss, _ = phase.loss(job.task, microbatches[0])
            loss.backward()

    for phase in job.phases:
        parallel.settle_buckets(phase.wrapped, job.model, job.world, partial(passes, phase))
