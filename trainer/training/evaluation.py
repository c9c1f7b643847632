"""One evaluation of the model on all evaluation samples."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer.cluster.stop import Stop
from trainer.core import rng
from trainer.core.state import State
from trainer.data.source import Feed
from trainer.protocols import Batch
from trainer.training import parallel
from trainer.training.job import Job, Phase

_NAMED = 5
"""Damaged samples that are named; the others are only counted."""


def evaluate(job: Job, state: State, stop: Stop) -> dict[str, float] | None:
    """Measure the model on every evaluation sample, once. Collective.

    Where weights are averaged, it is the average that is measured. Uses rank 0's buffers and
    generators of its own, so that training goes on as if nothing had happened. Returns the
    figures, or None if the ranks agreed to stop meanwhile.
    """
    if job.evaluation is None:
        return {}
    metrics = _fresh_metrics(job)
    parallel.take_rank0_buffers(job.model, job.world)
    needs_all = parallel.is_sharded(job.phases[0].wrapped)  # in each forward, also without samples
    job.model.eval()
    try:
        averaged = job.ema.in_place() if job.ema is not None else nullcontext()
        own_rng = rng.forked(rng.derive("eval", job.seed, state.step, job.world.rank))
        with own_rng, averaged, torch.no_grad():
            batches = job.evaluation.batches()
            for _ in range(len(job.evaluation)):
                stop.agree(batches.has)
                if stop.reason:
                    return None
                batch = next(batches)
                if batch is None and not needs_all:
                    continue  # only other ranks have samples left
                given = job.evaluation.one() if batch is None else batch
                found = [_measure(job, phase, given) for phase in job.phases]
                if batch is not None:
                    _add(job, metrics, found, batch)
            figures = {name: float(metric.compute()) for name, metric in metrics.items()}
            if job.evaluation.skip_damaged:
                named = _NAMED if state.last_eval_step else 0  # the first one names them
                figures["damaged"] = float(count_damaged(job, batches, named=named))
            return figures
    finally:
        to_training(job)


def _fresh_metrics(job: Job) -> dict[str, Any]:
    if job.metrics is None:
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        names = dict.fromkeys(["loss", *(phase.key("loss") for phase in job.phases)])
        made = {**{name: MeanMetric() for name in names}, **job.task.metrics()}
        job.metrics = {name: metric.to(job.world.device) for name, metric in made.items()}
    for metric in job.metrics.values():
        metric.reset()
    return job.metrics


def _measure(job: Job, phase: Phase, batch: Batch) -> tuple[Tensor, Any]:
    with parallel.autocast(job.precision, job.world.device):
        found: tuple[Tensor, Any] = parallel.inside(
            phase.wrapped, job.model, job.task.loss, batch, *phase.words
        )
    return found


def _add(
    job: Job, metrics: dict[str, Any], found: Sequence[tuple[Tensor, Any]], batch: Batch
) -> None:
    """Add what the phases found of a batch to the metrics."""
    losses = {phase.key("loss"): loss for phase, (loss, _) in zip(job.phases, found, strict=True)}
    if "loss" not in losses:
        losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
    for name, loss in losses.items():
        metrics[name].update(loss, weight=_weight(job, batch))
    for phase, (_, outputs) in zip(job.phases, found, strict=True):
        job.task.update(metrics, outputs, batch, *phase.words)


def to_training(job: Job) -> None:
    """Put every phase's module in training mode."""
    for phase in job.phases:
        phase.wrapped.train()


def count_damaged(job: Job, batches: "Feed[Any]", *, named: int) -> int:
    """Return how many samples were skipped on all ranks; name the first few. Collective."""
    found = [text for texts in job.world.gather(batches.take_damaged()) for text in texts]
    for text in found[: max(_NAMED - named, 0)]:
        job.tracker.say(f"SKIPPED {text}")
    return len(found)


def _weight(job: Job, batch: Batch) -> float:
    weight = job.options.weight or _sample_count
    return float(weight(batch))


def _sample_count(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return _sample_count(next(iter(batch.values())))
    return _sample_count(batch[0])
