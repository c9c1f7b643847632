"""Saves and evaluations that are due at a step boundary."""

from collections.abc import Sequence

from trainer.checkpoint.attempts import Record
from trainer.checkpoint.save_settings import SavePolicy
from trainer.core import intervals
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.training.job import Job


def is_due(every: Every, job: Job, state: State) -> bool:
    """Return whether a save or evaluation is due by its interval, or at the last step."""
    return intervals.due(
        every,
        step=state.step,
        epoch=state.epoch,
        epoch_ended=state.cursor["batch"] == 0,
        final=job.is_over(state),
    )


def is_saved_exactly(policy: SavePolicy, job: Job, state: State) -> bool:
    """Return whether this very step has to be saved, even if another save is in flight.

    True at the end of a due epoch, at a milestone, at the last step, and after an evaluation that
    is the best so far.
    """
    if policy.save_best and state.best is not None and state.best["step"] == state.step:
        return True
    if any(state.step % steps == 0 for steps in policy.milestones):
        return True
    return is_due(Every(epochs=policy.every.epochs), job, state)


def repeats_evaluation(job: Job, state: State) -> bool:
    """Return whether a resume at `state` first evaluates this step."""
    return _is_evaluation_missing(job, state) and not leaves_out_evaluation(job, state)


def leaves_out_evaluation(job: Job, state: State) -> bool:
    """Return whether a resume at `state` leaves out the evaluation that is due.

    It does if an attempt repeated it in vain, so that attempts that are shorter than an evaluation
    still take steps. The evaluation at the end is never left out.
    """
    is_in_vain = state.step == job.skipped_eval_step and not job.is_over(state)
    return is_in_vain and _is_evaluation_missing(job, state)


def _is_evaluation_missing(job: Job, state: State) -> bool:
    is_new = state.step > 0 and state.last_eval_step != state.step
    return is_new and is_due(job.eval_every, job, state)


def interrupted_eval_step(records: Sequence[Record]) -> int | None:
    """Return the step at which the newest attempt was preempted or killed without a step.

    Otherwise None. If an evaluation is due there, that attempt repeated it and was too short.
    """
    record = records[-1] if records else {}
    step = record.get("first_step")
    was_in_vain = step is not None and step == record.get("last_step")
    return step if was_in_vain and record.get("outcome") in ("preempted", None) else None
