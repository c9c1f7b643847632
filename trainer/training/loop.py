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
from trainer.core.state import State
from trainer.data.feed import Feed
from trainer.monitoring.profiling import Profiler
from trainer.monitoring.timing import Timing
from trainer.training import boundary
from trainer.training.contents import collect
from trainer.training.evaluation import check_name, count_damaged, evaluate, to_training
from trainer.training.job import Job
from trainer.training.nonfinite import LossCheck
from trainer.training.step import train_step

_EXIT_S = 1.0
"""Time reserved for the exit after the last save, within the grace time, seconds."""


def train(
    job: Job,
    state: State,
    saver: Saver,
    stop: Stop,
    *,
    timing: Timing | None = None,
    profiler: Profiler | None = None,
) -> bool:
    """Train until the run is complete or the ranks agree to stop. Collective, main thread.

    Args:
        job: the training run.
        state: the current position; updated in place.
        saver: saves the checkpoints of this attempt.
        stop: the ranks' decision to stop.
        timing: from `start_timing`, to read the totals afterwards.
        profiler: traces some steps; the caller closes it.

    Returns:
        True if the run is complete. Either way the last step is committed on return, unless a save
        failed and the saver's policy tolerates that.
    """
    timing = timing or start_timing(job, state, saver, stop)
    to_training(job)
    batches = job.data.batches(state.cursor)
    losses = LossCheck(job, saver)
    check = partial(_check, job, state, losses, batches)
    content = partial(_content, job, state, check)
    interrupted = _evaluate_on_resume(job, state, saver, stop, timing, content)
    while not job.is_over(state) and not interrupted:
        vote = stop.agree(batches.has, saver)
        if stop.reason:
            break
        if profiler is not None:
            profiler.boundary(state.step)
        timing.begin_step()
        with timing.times("data"):
            microbatches, cursor = next(batches)
        log_due = (state.step + 1) % job.log_every_steps == 0 or state.step + 1 == job.max_steps
        lrs = [float(phase.optimizer.param_groups[0]["lr"]) for phase in job.phases]
        metrics, applied = train_step(job, microbatches, with_metrics=log_due, timing=timing)
        state.advance(cursor, samples=job.data.global_batch_size, applied=all(applied))
        _step_schedulers(job, state, applied)
        losses.add(state.step, lrs, metrics, applied)

        save_due = vote.save_due or boundary.is_due(saver.policy.every, job, state)
        eval_due = boundary.is_due(job.eval_every, job, state)
        if log_due or save_due or eval_due or losses.is_due:
            check(weights=save_due or eval_due)
        if log_due:
            _log_step(job, state, lrs, metrics, timing, batches)
        if eval_due:
            interrupted = not _evaluate_once(job, state, stop, timing, saver)
        if not interrupted:
            _save_if_due(job, state, saver, content, due=save_due, ended=vote.saves_ended)
    check(weights=True)
    stop.settle()
    timing.close(state.samples)
    return _save_last_step(job, state, saver, stop, content, interrupted=interrupted)


def start_timing(job: Job, state: State, saver: Saver, stop: Stop) -> Timing:
    """Start to measure the attempt's times. Collective."""
    return Timing(
        job.world,
        state.samples,
        {
            "data_wait": lambda: stop.waited_s,
            "save_stall": lambda: saver.stall_s,
            "update_stall": lambda: saver.update_stall_s,
        },
        wrapped=[phase.wrapped for phase in job.phases],
        log=job.tracker.message,
        items=job.options.items,
        flops_per_step=job.flops_per_step,
        peak_flops_per_s=job.peak_flops_per_s,
    )


def _evaluate_on_resume(
    job: Job, state: State, saver: Saver, stop: Stop, timing: Timing, content: Callable[[], Content]
) -> bool:
    """Evaluate the resumed step if that is still due; return True if a stop interrupted it."""
    if not boundary.repeats_evaluation(job, state):
        return False
    if not _evaluate_once(job, state, stop, timing, saver):
        return True
    saver.discard_commit()  # the checkpoint of this step is missing its evaluation
    _save_if_due(job, state, saver, content, due=False, ended=0)
    return False


def _save_if_due(
    job: Job, state: State, saver: Saver, content: Callable[[], Content], *, due: bool, ended: int
) -> None:
    exact = boundary.is_saved_exactly(saver.policy, job, state)
    saver.at_boundary(state, content, due=due, exact=exact, ended=ended)


def _save_last_step(
    job: Job, state: State, saver: Saver, stop: Stop, content: Any, *, interrupted: bool
) -> bool:
    """Save the current step unless it is committed; return True if the run is complete."""
    is_complete = job.is_over(state) and not interrupted
    within_s = None if is_complete else _remaining_s(job.world.gather(stop.remaining_s))
    if not saver.save(state, content, within_s=within_s) and is_complete:
        saver.save(state, content)  # retry once, since this is the run's result
    return is_complete


def _remaining_s(ranks: Sequence[float | None]) -> float | None:
    """Return the time for the last save: the shortest grace time of any rank, less the exit."""
    limits = [seconds for seconds in ranks if seconds is not None]
    return max(min(limits) - _EXIT_S, 0.0) if limits else None


def _check(
    job: Job, state: State, losses: LossCheck, batches: "Feed[Any]", *, weights: bool
) -> None:
    """Check the losses since the last check; count damaged samples. Collective."""
    losses.run(state, weights=weights)
    if job.data.skip_damaged:
        state.damaged_samples += count_damaged(job, batches, reported=state.damaged_samples)


def _content(job: Job, state: State, check: Callable[..., None]) -> Content:
    check(weights=True)  # a pending save may start at any boundary
    return collect(job, state)


def _evaluate_once(job: Job, state: State, stop: Stop, timing: Timing, saver: Saver) -> bool:
    """Evaluate the current step unless that is done; return False if a stop interrupted it."""
    if state.last_eval_step == state.step:
        return True
    if job.evaluation is None:
        state.last_eval_step = state.step
        return True
    began = time.monotonic()
    with timing.times("eval"):
        metrics = evaluate(job, state, stop, saver)
    if metrics is None:
        return False
    check_name(job, metrics)
    state.evaluated(metrics, metric=job.metric, mode=job.metric_mode or "max")
    for phase in job.phases:
        if isinstance(phase.scheduler, ReduceLROnPlateau):
            phase.scheduler.step(metrics[job.metric or "loss"])
    _log(job, state, "eval", {**metrics, "eval_s": time.monotonic() - began})
    return True


def _step_schedulers(job: Job, state: State, applied: Sequence[bool]) -> None:
    epoch_ended = state.cursor["batch"] == 0
    for phase, was_applied in zip(job.phases, applied, strict=True):
        if phase.scheduler is None or isinstance(phase.scheduler, ReduceLROnPlateau):
            continue  # a plateau schedule steps after each evaluation
        if epoch_ended if job.scheduler_interval == "epoch" else was_applied:
            phase.scheduler.step()


def _log_step(
    job: Job,
    state: State,
    lrs: Sequence[float],
    metrics: Mapping[str, Tensor],
    timing: Timing,
    batches: "Feed[Any]",
) -> None:
    """Log this step's metrics and the timing since the last log line. Collective."""
    means, rank_values = _reduce(job, metrics, timing.rank_values(batches.starved_s))
    values = {"lr": lrs[0]}
    values |= {f"lr_{p.name}": lr for p, lr in zip(job.phases, lrs, strict=True) if p.name}
    if job.may_skip:
        values["skipped"] = float(state.skipped)
    if job.data.skip_damaged:
        values["damaged"] = float(state.damaged_samples)
    _log(job, state, "train", {**means, **values, **timing.lap(state.samples, rank_values)})


def _reduce(
    job: Job, metrics: Mapping[str, Tensor], rank_values: Sequence[float]
) -> tuple[dict[str, float], list[float]]:
    """Return the metrics' means over ranks, and all ranks' values, in one all-reduce."""
    world, first = job.world, job.world.rank * len(rank_values)
    slots = torch.zeros(world.size * len(rank_values), dtype=torch.float64)
    slots[first : first + len(rank_values)] = (
        torch.tensor(rank_values, dtype=torch.float64) * world.size
    )
    values = torch.stack([value.double() for value in metrics.values()])
    means = world.mean(torch.cat([values, slots.to(values.device)])).tolist()
    return dict(zip(metrics, means, strict=False)), means[len(metrics) :]


def _log(job: Job, state: State, split: str, metrics: Mapping[str, float]) -> None:
    position = {"step": state.step, "epoch": state.epoch, "samples": state.samples}
    job.tracker.log({**position, "time": round(time.time(), 3), "split": split, **metrics})
