"""The training loop: take steps, evaluate, save. Independent of Hydra, trackers and schedulers."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state_tree import Content
from trainer.cluster.stop import Stop
from trainer.core import intervals
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import Feed
from trainer.errors import ConfigError, closest
from trainer.monitoring.timing import Pace
from trainer.training.contents import collect
from trainer.training.evaluation import count_damaged, evaluate, to_training
from trainer.training.job import Job
from trainer.training.nonfinite import Losses
from trainer.training.step import train_step

_SPARE_S = 1.0
"""What leaving takes after the last save, of the time between a signal and SIGKILL."""


def train(job: Job, state: State, saver: Saver, stop: Stop) -> bool:
    """Take steps until the run's end or an agreed stop. Collective, main thread.

    Returns whether the run is finished. Either way the last step is committed on return, unless
    saves failed and `saver` goes on after failures.
    """
    stop.save_due, stop.saves_ended = saver.due_by_clock, saver.ended
    to_training(job)
    pace, losses = _start_pace(job, state, saver, stop), Losses(job)
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
        items=job.options.items,
    )
    return pace


def _least(seconds: list[float | None]) -> float | None:
    """Return the least of what ranks say that they have left, with some to spare, if any do."""
    known = [each for each in seconds if each is not None]
    return max(min(known) - _SPARE_S, 0.0) if known else None


def _look(
    job: Job,
    state: State,
    losses: Losses,
    saver: Saver,
    batches: "Feed[Any]",
    *,
    weights: bool = False,
) -> None:
    """Look at what the steps since the last look left behind. Collective."""
    losses.look(saver, state, weights=weights)
    if job.data.skip_damaged:
        state.damaged_samples += count_damaged(job, batches, named=state.damaged_samples)


def _content(job: Job, state: State, look: Callable[[], None]) -> Content:
    look()  # a save may begin at any boundary, once the one before it has ended
    return collect(job, state)


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
