"""Evaluation of the model on all evaluation samples."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from trainer.cluster.stop import NO_SAVES, Saves, Stop
from trainer.core import metric_mode, rng
from trainer.core.state import State
from trainer.data.feed import Feed
from trainer.errors import ConfigError, closest
from trainer.protocols import Batch
from trainer.training import metric_states, modes, parallel
from trainer.training.job import Job, Phase

_DAMAGED = "damaged"
"""Metric with the number of skipped samples."""
_TOO_FEW_SAMPLES = (RuntimeError, ValueError, IndexError, ZeroDivisionError)
"""Errors of metrics that need more than one batch."""
_MAX_DAMAGED_NAMES = 5
"""Damaged samples that are named in the log; later ones are only counted."""


def evaluate(
    job: Job, state: State, stop: Stop, saves: Saves = NO_SAVES
) -> dict[str, float] | None:
    """Evaluate the model on every evaluation sample, once. Collective.

    Uses `modes.evaluation_weights`, rank 0's buffers, and a separate random generator,
    so that training is unaffected.

    Args:
        job: the training run.
        state: the current position.
        stop: the ranks' decision to stop.
        saves: this rank's save state, for the votes meanwhile.

    Returns:
        The metrics; empty without evaluation data; None if the ranks agreed to stop.
    """
    if job.evaluation is None:
        return {}
    metrics = _reset_metrics(job)
    parallel.take_rank0_buffers(job.model, job.world)
    is_collective = parallel.is_sharded(job.phases[0].wrapped)  # all ranks join every forward
    job.model.eval()
    try:
        forked_rng = rng.forked(rng.derive("eval", job.seed, state.step, job.world.rank))
        with forked_rng, modes.evaluation_weights(job), torch.no_grad():
            batches = job.evaluation.batches()
            for _ in range(len(job.evaluation)):
                stop.agree(batches.has, saves)
                if stop.reason:
                    return None
                batch = next(batches)
                if batch is None and not is_collective:
                    continue  # only other ranks have samples left
                inputs = job.evaluation.one() if batch is None else batch
                results = [forward(job, phase, inputs) for phase in job.phases]
                if batch is not None:
                    update_metrics(job, metrics, results, batch, samples=batches.samples)
            values = compute(job, metrics)
            if job.evaluation.skip_damaged:
                # Every evaluation meets the same samples, so only the first one names them.
                reported = _MAX_DAMAGED_NAMES if state.last_eval_step else 0
                values[_DAMAGED] = float(count_damaged(job, batches, reported=reported))
            return values
    finally:
        to_training(job)


def create_metrics(job: Job) -> dict[str, Any]:
    """Return the metrics of an evaluation, created at the first call.

    Sets `job.metric_mode`.

    Raises:
        ConfigError: metrics cannot be merged over ranks, or the mode contradicts the metric.
    """
    if job.metrics is None:
        from torchmetrics import MeanMetric  # slow to import, so only with evaluation data

        names = dict.fromkeys(["loss", *(phase.metric_name("loss") for phase in job.phases)])
        metrics = {  # by default, MeanMetric leaves NaN out of the mean
            **{name: MeanMetric(nan_strategy=math.nan) for name in names},
            **job.task.metrics(),
        }
        if job.world.size > 1:
            check_mergeable(metrics)
        for metric in metrics.values():
            metric_states.disable_sync(metric)
            if isinstance(metric, nn.Module):
                metric.to(job.world.device)
        check_name(job, metrics, uncertain=metrics)
        _resolve_mode(job, metrics)
        job.metrics = metrics
    return job.metrics


def check_mergeable(metrics: Mapping[str, Any]) -> None:
    """Check that metrics can be merged over ranks.

    Raises:
        ConfigError: one of them cannot.
    """
    for name, metric in metrics.items():
        if problem := metric_states.merge_problem(metric):
            raise ConfigError(f"task: the metric {name!r} {problem}")


def check_name(job: Job, names: Collection[str], *, uncertain: Collection[str] = ()) -> None:
    """Check that an evaluation measures `checkpoint.metric`.

    Args:
        job: the training run.
        names: the measured metrics.
        uncertain: metrics that may still turn out to be several, called `<metric>_<key>`.

    Raises:
        ConfigError: it is not measured.
    """
    metric = job.metric
    if metric is None or metric in (*names, *uncertain, _DAMAGED):
        return
    if any(metric.startswith(f"{name}_") for name in uncertain):
        return
    hint = closest(metric, [*names, *uncertain])
    raise ConfigError(f"checkpoint.metric={metric!r} is not measured by the evaluation{hint}")


def _resolve_mode(job: Job, metrics: Mapping[str, Any]) -> None:
    """Set the mode of the metric that selects the best checkpoint."""
    if job.metric is None:
        return
    higher_is_better = getattr(_find_metric(metrics, job.metric), "higher_is_better", None)
    if text := metric_mode.contradiction(job.metric, job.metric_mode, higher_is_better):
        raise ConfigError(f"checkpoint.mode: {text}")
    job.metric_mode = metric_mode.resolve(job.metric, job.metric_mode, higher_is_better)


def _find_metric(metrics: Mapping[str, Any], name: str) -> Any:
    """Return the metric whose value is logged under `name`, also one in a collection, or None."""
    if name in metrics:
        return metrics[name]
    for prefix, metric in metrics.items():
        members = dict(metric.items()) if hasattr(metric, "items") else {}
        key = name.removeprefix(f"{prefix}_")
        if key != name and key in members:
            return members[key]
    return None


def _reset_metrics(job: Job) -> dict[str, Any]:
    metrics = create_metrics(job)
    for metric in metrics.values():
        metric.reset()
    return metrics


def compute(
    job: Job, metrics: Mapping[str, Any], *, is_rehearsal: bool = False
) -> dict[str, float]:
    """Return the metrics of all ranks' samples, computed on rank 0. Collective.

    Ranks of different machines could round differently, and then disagree about the best step.

    Args:
        job: the training run.
        metrics: its metrics, updated with this rank's samples.
        is_rehearsal: leave out metrics that cannot be computed, since they may need more samples.
    """
    ranks = job.world.gather_on_rank0(metric_states.collect(metrics) if job.world.size > 1 else [])

    def compute() -> dict[str, float]:
        if job.world.size > 1:
            metric_states.merge(metrics, ranks)
        values = {}
        for name, metric in metrics.items():
            with suppress(*_TOO_FEW_SAMPLES) if is_rehearsal else nullcontext():
                values[name] = metric.compute()
        return dict(_scalars(values))

    return job.world.run_on_rank0(compute)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield names and numbers; a result of several metrics as `<name>_<key>`.

    Raises:
        ConfigError: a value is not a number.
    """
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{full}_")
            continue
        try:
            yield full, float(value)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise ConfigError(
                f"task: the metric {full!r} computes a {type(value).__name__}{shape}, not a "
                "number; average it, or return a mapping of numbers from compute()"
            ) from None


def forward(job: Job, phase: Phase, batch: Batch) -> tuple[Tensor, Any]:
    """Return a phase's loss and outputs of a batch. Collective if the model is sharded."""
    with parallel.autocast(job.precision, job.world.device):
        result: tuple[Tensor, Any] = parallel.inside(
            phase.wrapped, job.model, job.task.loss, batch, *phase.task_arguments
        )
    return result


def update_metrics(
    job: Job,
    metrics: dict[str, Any],
    results: Sequence[tuple[Tensor, Any]],
    batch: Batch,
    *,
    samples: int,
) -> None:
    """Add each phase's loss and outputs of a batch of `samples` to the metrics."""
    losses = {
        phase.metric_name("loss"): loss
        for phase, (loss, _) in zip(job.phases, results, strict=True)
    }
    if "loss" not in losses:
        losses = {"loss": torch.stack(list(losses.values())).sum(), **losses}
    item_count = job.options.weight
    weight = float(samples if item_count is None else item_count(batch))
    for name, loss in losses.items() if weight else ():  # a mean over no item is NaN
        metrics[name].update(loss, weight=weight)
    for phase, (_, outputs) in zip(job.phases, results, strict=True):
        job.task.update(metrics, outputs, batch, *phase.task_arguments)


def to_training(job: Job) -> None:
    """Put every phase's module in training mode, except modules that stay in evaluation mode."""
    for phase in job.phases:
        phase.wrapped.train()
    for module in job.frozen:
        module.eval()


def count_damaged(job: Job, batches: "Feed[Any]", *, reported: int) -> int:
    """Return the number of newly skipped samples on all ranks; name the first few. Collective."""
    names = [name for names in job.world.gather(batches.take_damaged()) for name in names]
    for name in names[: max(_MAX_DAMAGED_NAMES - reported, 0)]:
        job.tracker.message(f"SKIPPED {name}")
    return len(names)
