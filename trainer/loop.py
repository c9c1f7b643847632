"""The story: train, step by step; evaluate; save. Knows no Hydra, tracker library or scheduler."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from trainer.ema import PREFIX, Ema
from trainer.errors import ConfigError, TrainingError, closest
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
    skip_nonfinite: bool = False
    """Leave out updates whose gradient is not finite, and count them; otherwise, stop."""
    ema: Ema | None = None
    patience_evals: int | None = None
    notes: Sequence[str] = ()
    """Lines to say at the start, of how the job was made."""
    metric: str | None = None
    metric_mode: str = "max"
    seed: int = 0
    metrics: dict[str, Any] | None = None
    """torchmetrics of the evaluation, made when it is first needed."""

    @property
    def may_skip(self) -> bool:
        """Whether a step may be taken without an update."""
        return self.skip_nonfinite or self.scaler.is_enabled()

    def is_over(self, state: State) -> bool:
        """Return whether the run is at its end: of its steps, or of the patience with it."""
        is_stale = self.patience_evals is not None and state.stale_evals >= self.patience_evals
        return state.step >= self.max_steps or is_stale


def train(job: Job, state: State, saver: Saver, stop: Stop) -> bool:
    """Take steps until the run's end or an agreed stop. Collective, main thread.

    Returns whether the run is finished. Either way the last step is committed on return, unless
    saves failed and `saver` goes on after failures.
    """
    stop.save_due, stop.saves_ended = saver.due_by_clock, saver.ended
    job.wrapped.train()
    pace, losses = _Pace(state), _Losses(job)
    evaluated = state.last_eval_step
    interrupted = not _evaluate_if_due(job, state, stop)  # an evaluation that a stop cut short
    if state.last_eval_step != evaluated:
        saver.committed_step = None  # the checkpoint of this step has not got its evaluation
    batches = job.data.batches(state.cursor)
    while not job.is_over(state) and not interrupted:
        vote = stop.agree(batches.has)
        if stop.reason:
            break
        microbatches, cursor = next(batches)
        log_due = (state.step + 1) % job.log_every_steps == 0 or state.step + 1 == job.max_steps
        lr = job.optimizer.param_groups[0]["lr"]
        figures, applied = train_step(job, microbatches, want_figures=log_due)
        state.advance(cursor, samples=job.data.global_batch_size, applied=applied)
        _schedule(job, state, applied)
        losses.add(state.step, lr, figures["loss"], applied)
        save_due = vote.save_due or _due(saver.every, state, job) is not None
        if log_due or save_due or _due(job.eval_every, state, job) or losses.are_many:
            losses.look(saver)
        if log_due:
            counted = {"skipped": float(state.skipped)} if job.may_skip else {}
            lap = {"lr": float(lr), **counted, **pace.lap(state)}
            _log(job, state, "train", {**_mean(job, figures), **lap})
        interrupted = not _evaluate_if_due(job, state, stop)
        if not interrupted:
            content = partial(collect, job, state)
            saver.at_boundary(state, content, due=save_due, ended=vote.saves_ended)
    losses.look(saver)
    stop.settle()
    finished = job.is_over(state) and not interrupted
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

    Returns this rank's loss and, where wanted, other figures (0-dim tensors on the device; their
    means over the ranks are the global batch's), and whether the update was applied.
    """
    figures: dict[str, Tensor] = {}
    last = len(microbatches) - 1
    shares = _shares(job, microbatches)
    for index, (batch, share) in enumerate(zip(microbatches, shares, strict=True)):
        with parallel.reducing(job.wrapped, last=index == last):
            with parallel.autocast(job.precision, job.world.device):
                loss, outputs = job.task.loss(job.wrapped, batch)
            job.scaler.scale(loss if share is None else loss * share).backward()
        with torch.no_grad():
            named = {"loss": loss.detach()}
            if want_figures:
                named |= job.task.figures(outputs, batch)
            for name, value in named.items():
                part = value.float() if share is None else value.float() * share
                figures[name] = figures[name] + part if name in figures else part
    norm = None
    if job.clip_norm is not None or (job.skip_nonfinite and not job.scaler.is_enabled()):
        job.scaler.unscale_(job.optimizer)
        norm = parallel.clip(job.model, math.inf if job.clip_norm is None else job.clip_norm)
        if want_figures:
            figures["grad_norm"] = norm
    applied = _update(job, norm)
    job.optimizer.zero_grad(set_to_none=True)
    return figures, applied


def _shares(job: Job, microbatches: list[Batch]) -> Sequence[float | Tensor | None]:
    """Return what each microbatch's loss counts for, None where there is but one that counts.

    Ranks' gradients are averaged, so a share is of a rank's mean part of the global batch: with
    weights (tokens, say) the sum is exactly the mean over the global batch's, wherever they lie.
    Collective where the task weighs.
    """
    weigh = getattr(job.task, "weight", None)
    if weigh is None:
        count = len(microbatches)
        return [None] if count == 1 else [1 / count] * count
    numbers = [torch.as_tensor(weigh(batch), dtype=torch.float64) for batch in microbatches]
    weights = torch.stack([number.to(job.world.device) for number in numbers])
    mean = job.world.mean(weights.sum())
    return list((weights / mean.clamp(min=torch.finfo(torch.float64).tiny)).float())


def _update(job: Job, norm: Tensor | None) -> bool:
    """Update the weights and their average, unless the gradient is not finite and may be left."""
    if job.scaler.is_enabled():
        before = job.scaler.get_scale()
        job.scaler.step(job.optimizer)
        job.scaler.update()
        applied = job.scaler.get_scale() >= before
    else:
        applied = not job.skip_nonfinite or norm is None or bool(norm.isfinite())
        if applied:
            job.optimizer.step()
    if applied and job.ema is not None:
        job.ema.update()
    return applied


class _Losses:
    """This rank's losses since they were last looked at; to look, one waits for the device.

    They are looked at before anything is made of them: a line, an evaluation, a checkpoint.
    """

    _many = 1000

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kept: list[tuple[int, float, Tensor]] = []

    @property
    def are_many(self) -> bool:
        """Whether it is time to look, so that they do not fill the memory."""
        return len(self._kept) >= self._many

    def add(self, step: int, lr: float, loss: Tensor, applied: bool) -> None:
        """Keep the loss of a step, if it changed the weights."""
        if applied and not self._job.skip_nonfinite:
            self._kept.append((step, float(lr), loss))

    def look(self, saver: Saver) -> None:
        """Refuse to go on after a loss that is not finite on any rank. Collective."""
        kept, self._kept = self._kept, []
        finite = not kept or bool(torch.stack([loss for _, _, loss in kept]).isfinite().all())
        world = self._job.world
        if world.all(finite):
            return
        bad = next((each for each in kept if not finite and not each[2].isfinite()), None)
        found = world.gather(None if bad is None else (*bad[:2], float(bad[2])))
        saver.finish()  # what was looked at before is whole

        def refuse() -> None:
            first = min((each for each in found if each is not None), key=lambda each: each[0])
            at = saver.committed_step
            newest = "none" if at is None else f"step {at:,}"
            raise TrainingError(
                f"the loss of step {first[0]:,} is {first[2]} on rank {found.index(first)} "
                f"(learning rate {first[1]:g}). Newest checkpoint, from before: {newest}; the same "
                "command would come to the same. Lower optimizer.lr, clip the gradient "
                "(trainer.clip_norm=1), look at the data, or leave such steps out and count them: "
                "trainer.on_nonfinite=skip"
            )

        world.from_rank0(refuse)


def evaluate(job: Job, state: State, stop: Stop) -> dict[str, float] | None:
    """Measure the model on every evaluation sample, once. Collective.

    Where weights are averaged, it is the average that is measured. Uses rank 0's buffers and
    generators of its own, so that training goes on as if nothing had happened. Returns the
    figures, or None if the ranks agreed to stop meanwhile.
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
                with parallel.autocast(job.precision, job.world.device):
                    loss, outputs = job.task.loss(job.model, given)
                if batch is not None:
                    job.metrics["loss"].update(loss, weight=_weight(job.task, batch))
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
        final=job.is_over(state),
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


def _weight(task: Task, batch: Batch) -> float:
    weigh = getattr(task, "weight", _sample_count)
    return float(weigh(batch))


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
    for name, average in job.ema.averages.items() if job.ema is not None else ():
        content.tensors[PREFIX + name] = average
        content.late.add(PREFIX + name)  # it changes just after the weights
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
