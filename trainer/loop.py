"""The story: train, step by step; evaluate; save. Knows no Hydra, tracker library or scheduler."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer import parallel, policy, rng
from trainer.checkpoint import tree
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.tree import Content
from trainer.data.source import EvalStream, TrainStream
from trainer.distributed import World
from trainer.errors import ConfigError, closest
from trainer.policy import Every
from trainer.preemption import Stop
from trainer.protocols import Batch, Task, Tracker
from trainer.state import State

_SPARE_S = 1.0
"""What leaving takes after the last save, of the time between a signal and SIGKILL."""


@dataclass(kw_only=True)
class Job:
    """The objects of a training run. `build.py` makes one from a configuration; so can you."""

    world: World
    model: nn.Module
    """The plain module: what is saved, evaluated and exported."""
    wrapped: nn.Module
    """What training calls: `model`, or a wrapper of it."""
    task: Task
    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    scheduler_interval: str = "step"
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    precision: str = "fp32"
    data: TrainStream
    evaluation: EvalStream | None = None
    tracker: Tracker
    max_steps: int
    eval_every: Every
    log_every_steps: int = 10
    clip_norm: float | None = None
    metric: str | None = None
    metric_mode: str = "max"
    seed: int = 0
    metrics: dict[str, Any] | None = None
    """torchmetrics of the evaluation, made when it is first needed."""


def train(job: Job, state: State, saver: Saver, stop: Stop) -> bool:
    """Take steps until the run's end or an agreed stop. Collective, main thread.

    Returns whether the run is finished. Either way the last step is committed on return, unless
    saves failed and `saver` goes on after failures.
    """
    stop.save_due, stop.saves_ended = saver.due_by_clock, saver.ended
    job.wrapped.train()
    pace = _Pace(state)
    evaluated = state.last_eval_step
    interrupted = not _evaluate_if_due(job, state, stop)  # an evaluation that a stop cut short
    if state.last_eval_step != evaluated:
        saver.committed_step = None  # the checkpoint of this step has not got its evaluation
    batches = job.data.batches(state.cursor)
    while state.step < job.max_steps and not interrupted:
        vote = stop.agree(batches.has)
        if stop.reason:
            break
        microbatches, cursor = next(batches)
        log_due = (state.step + 1) % job.log_every_steps == 0 or state.step + 1 == job.max_steps
        lr = job.optimizer.param_groups[0]["lr"]
        figures, applied = train_step(job, microbatches, want_figures=log_due)
        state.advance(cursor, samples=job.data.global_batch_size, applied=applied)
        _schedule(job, state, applied)
        if log_due:
            _log(job, state, "train", {**_mean(job, figures), "lr": float(lr), **pace.lap(state)})
        interrupted = not _evaluate_if_due(job, state, stop)
        if not interrupted:
            due = vote.save_due or _due(saver.every, state, job) is not None
            content = partial(collect, job, state)
            saver.at_boundary(state, content, due=due, ended=vote.saves_ended)
    stop.settle()
    finished = state.step >= job.max_steps and not interrupted
    content = partial(collect, job, state)
    within_s = None if finished else _least(job.world.gather(stop.left_s))
    if not saver.save(state, content, within_s=within_s) and finished:
        saver.save(state, content)  # the last one is worth another try
    return finished


def _least(seconds: list[float | None]) -> float | None:
    """Return the least of what ranks say that they have left, with some to spare, if any do."""
    known = [each for each in seconds if each is not None]
    return max(min(known) - _SPARE_S, 0.0) if known else None


def train_step(
    job: Job, microbatches: list[Batch], *, want_figures: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Take one step: forward and backward of each microbatch, clip, update. Collective.

    Returns this rank's mean loss and, where wanted, figures (0-dim tensors on the device), and
    whether the update was applied (a gradient scaler skips one with infinite gradients).
    """
    figures: dict[str, Tensor] = {}
    count = len(microbatches)
    for index, batch in enumerate(microbatches):
        with parallel.reducing(job.wrapped, last=index == count - 1):
            with parallel.autocast(job.precision, job.world.device):
                loss, outputs = job.task.loss(job.wrapped, batch)
            job.scaler.scale(loss / count if count > 1 else loss).backward()
        if want_figures:
            with torch.no_grad():
                named = {"loss": loss.detach(), **job.task.figures(outputs, batch)}
                for name, value in named.items():
                    figures[name] = figures.get(name, 0.0) + value.float() / count
    if job.clip_norm is not None:
        job.scaler.unscale_(job.optimizer)
        norm = parallel.clip(job.model, job.clip_norm)
        if want_figures:
            figures["grad_norm"] = norm
    applied = _update(job)
    job.optimizer.zero_grad(set_to_none=True)
    return figures, applied


def _update(job: Job) -> bool:
    if not job.scaler.is_enabled():
        job.optimizer.step()
        return True
    before = job.scaler.get_scale()
    job.scaler.step(job.optimizer)
    job.scaler.update()
    return job.scaler.get_scale() >= before


def evaluate(job: Job, state: State, stop: Stop) -> dict[str, float] | None:
    """Measure the model on every evaluation sample, once. Collective.

    Uses rank 0's buffers and generators of its own, so that training goes on as if nothing had
    happened. Returns the figures, or None if the ranks agreed to stop meanwhile.
    """
    if job.evaluation is None:
        return {}
    if job.metrics is None:
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        made = {"loss": MeanMetric(), **job.task.metrics()}
        job.metrics = {name: metric.to(job.world.device) for name, metric in made.items()}
    for metric in job.metrics.values():
        metric.reset()
    parallel.take_rank0_buffers(job.model, job.world)
    needs_all = parallel.is_sharded(job.model)  # in each forward, those without a sample too
    job.model.eval()
    try:
        with rng.forked(rng.derive("eval", job.seed, state.step, job.world.rank)), torch.no_grad():
            batches = job.evaluation.batches()
            for _ in range(len(job.evaluation)):
                stop.agree(batches.has)
                if stop.reason:
                    return None
                batch = next(batches)
                if batch is None and not needs_all:
                    continue  # only other ranks have samples left
                given = job.evaluation.one() if batch is None else batch
                with parallel.autocast(job.precision, job.world.device):
                    loss, outputs = job.task.loss(job.model, given)
                if batch is not None:
                    job.metrics["loss"].update(loss, weight=_sample_count(batch))
                    job.task.update(job.metrics, outputs, batch)
            return {name: float(metric.compute()) for name, metric in job.metrics.items()}
    finally:
        job.wrapped.train()


def _evaluate_if_due(job: Job, state: State, stop: Stop) -> bool:
    """Evaluate if this step is due and not done yet; return False if a stop interrupted it."""
    if state.step == 0 or state.last_eval_step == state.step:
        return True
    if not _due(job.eval_every, state, job):
        return True
    if job.evaluation is None:
        state.last_eval_step = state.step  # all that there is to measure
        return True
    began = time.monotonic()
    figures = evaluate(job, state, stop)
    if figures is None:
        return False
    if job.metric is not None and job.metric not in figures:
        raise ConfigError(
            f"checkpoint.metric={job.metric!r} is not measured by the evaluation"
            + closest(job.metric, figures)
        )
    state.evaluated(figures, metric=job.metric, mode=job.metric_mode)
    if isinstance(job.scheduler, ReduceLROnPlateau):
        job.scheduler.step(figures[job.metric or "loss"])
    _log(job, state, "eval", {**figures, "eval_s": time.monotonic() - began})
    return True


def _due(every: Every, state: State, job: Job) -> str | None:
    return policy.due(
        every,
        step=state.step,
        epoch=state.epoch,
        epoch_ended=state.cursor["batch"] == 0,
        final=state.step >= job.max_steps,
    )


def _schedule(job: Job, state: State, applied: bool) -> None:
    if job.scheduler is None or isinstance(job.scheduler, ReduceLROnPlateau):
        return  # a plateau is judged after each evaluation
    epoch_ended = state.cursor["batch"] == 0
    if epoch_ended if job.scheduler_interval == "epoch" else applied:
        job.scheduler.step()


def _mean(job: Job, figures: Mapping[str, Tensor]) -> dict[str, float]:
    values = job.world.mean(torch.stack([value.double() for value in figures.values()]))
    return dict(zip(figures, values.tolist(), strict=True))


def _log(job: Job, state: State, split: str, figures: Mapping[str, float]) -> None:
    position = {"step": state.step, "epoch": state.epoch, "samples": state.samples}
    job.tracker.log({**position, "time": round(time.time(), 3), "split": split, **figures})


class _Pace:
    """Samples per second since the last lap."""

    def __init__(self, state: State) -> None:
        self._samples, self._at = state.samples, time.monotonic()

    def lap(self, state: State) -> dict[str, float]:
        now = time.monotonic()
        rate = (state.samples - self._samples) / max(now - self._at, 1e-9)
        self._samples, self._at = state.samples, now
        return {"samples_per_s": round(rate, 1)}


def _sample_count(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return _sample_count(next(iter(batch.values())))
    return _sample_count(batch[0])


def collect(job: Job, state: State) -> Content:
    """Return what this rank brings to a checkpoint: live tensors by name, and plain values."""
    content = Content()
    tree.add_model(content, job.model, with_buffers=job.world.rank == 0)
    tree.add_optimizer(content, job.model, job.optimizer)
    rank0s = content.own if job.world.rank == 0 else {}
    for name, value in rng.capture().items():
        content.own[f"rng.{job.world.rank}.{name}"] = value
    if job.scheduler is not None:
        content.objects["scheduler"] = tree.split(job.scheduler.state_dict(), "scheduler", rank0s)
    content.objects["scaler"] = tree.split(job.scaler.state_dict(), "scaler", rank0s)
    content.objects["run"] = state.state_dict()
    return content


def warm_up(job: Job) -> None:
    """Bring DDP to its final buckets; call it before state is loaded. Collective."""

    def passes() -> None:
        microbatches, _ = next(replace(job.data, workers=0).batches(State().cursor))
        with parallel.autocast(job.precision, job.world.device):
            loss, _ = job.task.loss(job.wrapped, microbatches[0])
        loss.backward()

    parallel.settle_buckets(job.wrapped, job.model, job.world, passes)
