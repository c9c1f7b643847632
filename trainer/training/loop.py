"""The story: train, step by step; evaluate; save. Knows no Hydra, tracker library or scheduler."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.checkpoint import state_tree
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.core import intervals, rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import EvalStream, Feed, TrainStream
from trainer.data.streams import Streamed
from trainer.errors import ConfigError, TrainingError, closest
from trainer.monitoring.profiling import Profiler
from trainer.monitoring.timing import Pace
from trainer.protocols import Batch, Task, Tracker
from trainer.training import parallel
from trainer.training.ema import PREFIX, Ema

_NAMED = 5
"""Damaged samples that are named; the others are only counted."""
_SPARE_S = 1.0
"""What leaving takes after the last save, of the time between a signal and SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One update of a step: what is called for it, and what trains which parameters.

    An ordinary step has one, without a name. Where the task has phases, each has its own, in their
    order, and no parameter is in two of them.
    """

    name: str = ""
    wrapped: nn.Module
    """What training calls: the model, or a wrapper of it; of a named phase, the `Inside` of it
    that `parallel.wrap_phases` gives."""
    optimizer: Optimizer
    scheduler: LRScheduler | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What the task's methods are told besides: the name, if there is one."""
        return (self.name,) if self.name else ()

    def key(self, figure: str) -> str:
        """Return the name of one of its figures."""
        return f"{self.name}_{figure}" if self.name else figure

    def loss(self, task: Task, batch: Batch) -> tuple[Tensor, Any]:
        """Return the task's loss and outputs in training: one forward of what is wrapped."""
        if self.name:
            found: tuple[Tensor, Any] = self.wrapped(task.loss, batch, self.name)
            return found
        return task.loss(self.wrapped, batch)

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which a backward reaches a named phase's own parameters only."""
        if not self.name:
            return parallel.NOTHING
        return parallel.training_only(model, self.parameters(model))

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what is clipped together: all of the model, or what a named phase trains."""
        if not self.name:
            return list(model.parameters())
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(kw_only=True)
class Job:
    """The objects of a training run. `build.py` makes one from a configuration; so can you."""

    world: World
    model: nn.Module
    """The plain module: what is saved, evaluated and exported."""
    task: Task
    phases: Sequence[Phase]
    """The updates of a step: one, or those that the task has, in their order."""
    scheduler_interval: str = "step"
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    precision: str = "fp32"
    data: TrainStream | Streamed
    evaluation: EvalStream | None = None
    tracker: Tracker
    max_steps: int
    max_epochs: int | None = None
    """Also the end, where it is not known how many steps an epoch has."""
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
    pace: Pace | None = None
    """What times the steps; `train` makes one, if need be."""
    profiler: Profiler | None = None
    """What traces some steps."""

    @property
    def may_skip(self) -> bool:
        """Whether a step may be taken without an update."""
        return self.skip_nonfinite or self.scaler.is_enabled()

    def is_over(self, state: State) -> bool:
        """Return whether the run is at its end: of its steps, or of the patience with it."""
        is_stale = self.patience_evals is not None and state.stale_evals >= self.patience_evals
        is_through = self.max_epochs is not None and state.epoch >= self.max_epochs
        return state.step >= self.max_steps or is_stale or is_through


def train(job: Job, state: State, saver: Saver, stop: Stop) -> bool:
    """Take steps until the run's end or an agreed stop. Collective, main thread.

    Returns whether the run is finished. Either way the last step is committed on return, unless
    saves failed and `saver` goes on after failures.
    """
    stop.save_due, stop.saves_ended = saver.due_by_clock, saver.ended
    _to_training(job)
    pace, losses = _start_pace(job, state, saver, stop), _Losses(job)
    evaluated = state.last_eval_step
    interrupted = False  # an evaluation, cut short by a stop
    if state.step and _due(job.eval_every, state, final=job.is_over(state)):
        interrupted = not _evaluate_once(job, state, stop, pace)
    if state.last_eval_step != evaluated:
        saver.committed_step = None  # the checkpoint of this step has not got its evaluation
    batches = pace.feed = job.data.batches(state.cursor)
    look = partial(_look, job, state, losses, saver, batches)  # before a line
    judge = partial(look, weights=True)  # before what is made of the weights
    content = partial(_content, job, state, judge)
    while not job.is_over(state) and not interrupted:
        vote = stop.agree(batches.has)
        if stop.reason:
            break
        if job.profiler is not None:
            job.profiler.boundary(state.step)
        pace.begin()
        microbatches, cursor = next(batches)
        pace.fed()
        log_due = (state.step + 1) % job.log_every_steps == 0 or state.step + 1 == job.max_steps
        lrs = [float(phase.optimizer.param_groups[0]["lr"]) for phase in job.phases]
        figures, applied = train_step(job, microbatches, want_figures=log_due)
        state.advance(cursor, samples=job.data.global_batch_size, applied=all(applied))
        _schedule(job, state, applied)
        losses.add(state.step, lrs, figures, applied)
        final = job.is_over(state)
        save_due = vote.save_due or _due(saver.every, state, final=final)
        eval_due = _due(job.eval_every, state, final=final)
        if log_due or save_due or eval_due or losses.are_many:
            look(weights=save_due or eval_due)
        if log_due:
            _log_steps(job, state, lrs, figures, pace)
        if eval_due:
            interrupted = not _evaluate_once(job, state, stop, pace)
        if not interrupted:
            saver.at_boundary(state, content, due=save_due, ended=vote.saves_ended)
    judge()
    stop.settle()
    pace.close(state.samples)
    if job.profiler is not None:
        job.profiler.close(state.step)
    finished = job.is_over(state) and not interrupted
    within_s = None if finished else _least(job.world.gather(stop.left_s))
    if not saver.save(state, content, within_s=within_s) and finished:
        saver.save(state, content)  # the last one is worth another try
    return finished


def _start_pace(job: Job, state: State, saver: Saver, stop: Stop) -> Pace:
    pace = job.pace = job.pace or Pace(job.world)
    pace.start(
        state.samples,
        saver,
        stop,
        wrapped=[phase.wrapped for phase in job.phases],
        say=job.tracker.say,
        items=getattr(job.task, "items", "items"),
    )
    return pace


def _least(seconds: list[float | None]) -> float | None:
    """Return the least of what ranks say that they have left, with some to spare, if any do."""
    known = [each for each in seconds if each is not None]
    return max(min(known) - _SPARE_S, 0.0) if known else None


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
                named |= job.task.figures(outputs, batch, *phase.words)
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
    weigh = getattr(job.task, "weight", None)
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


class _Losses:
    """This rank's losses since they were last looked at; to look, one waits for the device.

    They are looked at before anything is made of them: a line, an evaluation, a checkpoint.
    """

    _many = 1000

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kept: list[tuple[int, str, float, Tensor]] = []
        self._are_weights_new = False  # since they were last looked at

    @property
    def are_many(self) -> bool:
        """Whether it is time to look, so that they do not fill the memory."""
        return len(self._kept) >= self._many

    def add(
        self,
        step: int,
        lrs: Sequence[float],
        figures: Mapping[str, Tensor],
        applied: Sequence[bool],
    ) -> None:
        """Keep the losses of a step's phases that changed the weights."""
        if not self._job.skip_nonfinite:
            for phase, lr, was_applied in zip(self._job.phases, lrs, applied, strict=True):
                if was_applied:
                    self._kept.append((step, phase.name, lr, figures[phase.key("loss")]))
                    self._are_weights_new = True

    def look(self, saver: Saver, state: State, *, weights: bool) -> None:
        """Refuse to go on after a loss that is not finite on any rank. Collective.

        With `weights`, also after an update by a gradient that was not, though the loss was.
        """
        kept, self._kept = self._kept, []
        finite = not kept or bool(torch.stack([each[-1] for each in kept]).isfinite().all())
        world = self._job.world
        if world.all(finite):
            if weights and self._are_weights_new:
                self._are_weights_new = False
                if not world.all(parallel.are_finite(self._job.model)):
                    saver.finish()
                    at = saver.committed_step
                    world.from_rank0(partial(_refuse_weights, state.step, at))
            return
        bad = next((each for each in kept if not finite and not each[-1].isfinite()), None)
        found = world.gather(None if bad is None else (*bad[:-1], float(bad[-1])))
        saver.finish()  # what was looked at before is whole

        def refuse() -> None:
            first = min((each for each in found if each is not None), key=lambda each: each[0])
            at = saver.committed_step
            newest = "none" if at is None else f"step {at:,}"
            step, phase, lr, loss = first
            whose = f"the {phase} loss" if phase else "the loss"
            raise TrainingError(
                f"{whose} of step {step:,} is {loss} on rank {found.index(first)} "
                f"(learning rate {lr:g}). Newest checkpoint, from before: {newest}; the same "
                "command would come to the same. Lower optimizer.lr, clip the gradient "
                "(trainer.clip_norm=1), look at the data, or leave such steps out and count them: "
                "trainer.on_nonfinite=skip"
            )

        world.from_rank0(refuse)


def _refuse_weights(step: int, committed: int | None) -> None:
    newest = "none" if committed is None else f"step {committed:,}"
    raise TrainingError(
        f"the weights are no numbers after step {step:,}: a gradient was not finite, though the "
        f"loss was. Newest checkpoint, from before: {newest}. Clip the gradient "
        "(trainer.clip_norm=1), look at what the model divides by, or leave such steps out and "
        "count them: trainer.on_nonfinite=skip"
    )


def _look(
    job: Job,
    state: State,
    losses: _Losses,
    saver: Saver,
    batches: "Feed[Any]",
    *,
    weights: bool = False,
) -> None:
    """Look at what the steps since the last look left behind. Collective."""
    losses.look(saver, state, weights=weights)
    if job.data.skip_damaged:
        state.damaged_samples += _count_damaged(job, batches, named=state.damaged_samples)


def _content(job: Job, state: State, look: Callable[[], None]) -> Content:
    look()  # a save may begin at any boundary, once the one before it has ended
    return collect(job, state)


def _count_damaged(job: Job, batches: "Feed[Any]", *, named: int) -> int:
    """Return how many samples were skipped on all ranks; name the first few. Collective."""
    found = [text for texts in job.world.gather(batches.take_damaged()) for text in texts]
    for text in found[: max(_NAMED - named, 0)]:
        job.tracker.say(f"SKIPPED {text}")
    return len(found)


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
                figures["damaged"] = float(_count_damaged(job, batches, named=named))
            return figures
    finally:
        _to_training(job)


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
        metrics[name].update(loss, weight=_weight(job.task, batch))
    for phase, (_, outputs) in zip(job.phases, found, strict=True):
        job.task.update(metrics, outputs, batch, *phase.words)


def _to_training(job: Job) -> None:
    for phase in job.phases:
        phase.wrapped.train()


def _evaluate_once(job: Job, state: State, stop: Stop, pace: Pace) -> bool:
    """Evaluate this step, unless it is done; return False if a stop interrupted it."""
    if state.last_eval_step == state.step:
        return True
    if job.evaluation is None:
        state.last_eval_step = state.step  # all that there is to measure
        return True
    began = time.monotonic()
    with pace.evaluating():
        figures = evaluate(job, state, stop)
    if figures is None:
        return False
    if job.metric is not None and job.metric not in figures:
        raise ConfigError(
            f"checkpoint.metric={job.metric!r} is not measured by the evaluation"
            + closest(job.metric, figures)
        )
    state.evaluated(figures, metric=job.metric, mode=job.metric_mode)
    for phase in job.phases:
        if isinstance(phase.scheduler, ReduceLROnPlateau):
            phase.scheduler.step(figures[job.metric or "loss"])
    _log(job, state, "eval", {**figures, "eval_s": time.monotonic() - began})
    return True


def _due(every: Every, state: State, *, final: bool) -> bool:
    epoch, ended = state.epoch, state.cursor["batch"] == 0
    return intervals.due(every, step=state.step, epoch=epoch, epoch_ended=ended, final=final)


def _schedule(job: Job, state: State, applied: Sequence[bool]) -> None:
    epoch_ended = state.cursor["batch"] == 0
    for phase, was_applied in zip(job.phases, applied, strict=True):
        if phase.scheduler is None or isinstance(phase.scheduler, ReduceLROnPlateau):
            continue  # a plateau is judged after each evaluation
        if epoch_ended if job.scheduler_interval == "epoch" else was_applied:
            phase.scheduler.step()


def _lrs(job: Job, lrs: Sequence[float]) -> dict[str, float]:
    named = zip(job.phases, lrs, strict=True)
    return {f"lr_{phase.name}": lr for phase, lr in named if phase.name}


def _mean(
    job: Job, figures: Mapping[str, Tensor], own: Sequence[float]
) -> tuple[dict[str, float], list[float]]:
    """Return the means over the ranks, and what each rank has of its own. Collective, once."""
    world, first = job.world, job.world.rank * len(own)
    slots = torch.zeros(world.size * len(own), dtype=torch.float64)
    slots[first : first + len(own)] = torch.tensor(own, dtype=torch.float64) * world.size
    values = torch.stack([value.double() for value in figures.values()])
    means = world.mean(torch.cat([values, slots.to(values.device)])).tolist()
    return dict(zip(figures, means, strict=False)), means[len(figures) :]


def _log_steps(
    job: Job, state: State, lrs: Sequence[float], figures: Mapping[str, Tensor], pace: Pace
) -> None:
    """Log this step's figures, and what the steps since the last line came to. Collective."""
    means, told = _mean(job, figures, pace.own())
    given = {"lr": lrs[0], **_lrs(job, lrs)}
    if job.may_skip:
        given["skipped"] = float(state.skipped)
    if job.data.skip_damaged:
        given["damaged"] = float(state.damaged_samples)
    _log(job, state, "train", {**means, **given, **pace.lap(state.samples, told)})


def _log(job: Job, state: State, split: str, figures: Mapping[str, float]) -> None:
    position = {"step": state.step, "epoch": state.epoch, "samples": state.samples}
    job.tracker.log({**position, "time": round(time.time(), 3), "split": split, **figures})


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
    state_tree.add_model(content, job.model, with_buffers=job.world.rank == 0)
    state_tree.add_optimizers(content, job.model, [phase.optimizer for phase in job.phases])
    for name, average in job.ema.averages.items() if job.ema is not None else ():
        content.tensors[PREFIX + name] = average
        content.late.add(PREFIX + name)  # it changes just after the weights
    rank0s = content.own if job.world.rank == 0 else {}
    for name, value in rng.capture().items():
        content.own[f"rng.{job.world.rank}.{name}"] = value
    schedules = {
        phase.name: phase.scheduler.state_dict()
        for phase in job.phases
        if phase.scheduler is not None
    }
    if schedules:
        stored = schedules.get("", schedules)  # by the phase's name, if it has one
        content.objects["scheduler"] = state_tree.split(stored, "scheduler", rank0s)
    if job.phases[0].name:
        content.objects["phases"] = [[p.name, len(p.optimizer.param_groups)] for p in job.phases]
    content.objects["scaler"] = state_tree.split(job.scaler.state_dict(), "scaler", rank0s)
    content.objects["run"] = state.state_dict()
    if job.data.samples is not None:
        content.objects["data"] = {"samples": job.data.samples}
    return content


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
