"""Detection of NaN and infinite losses and weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from trainer.checkpoint.saver import Saver
from trainer.core.state import State
from trainer.errors import TrainingError
from trainer.training import parallel
from trainer.training.job import Job

_MAX_LOSSES = 1000
"""Unchecked losses at which a check is due, so that they do not fill the memory."""
_MAX_SKIPPED = 50
"""Consecutive skipped updates that end the run. The loss scale of fp16 has then been divided by
2 ** 50, so that the scaling does not cause them."""


class _Loss(NamedTuple):
    step: int
    phase: str
    lr: float
    value: Tensor


class LossCheck:
    """This rank's losses since the last check, which waits for the device.

    They are checked before each log line, evaluation and checkpoint.

    Args:
        job: the training run.
        saver: source of the newest checkpoint, for the error.
    """

    def __init__(self, job: Job, saver: Saver) -> None:
        self._job, self._saver = job, saver
        self._losses: list[_Loss] = []
        self._weights_changed = False  # since their last check
        self._skipped_in_a_row = [0] * len(job.phases)

    @property
    def is_due(self) -> bool:
        """True if so many losses are unchecked that a check is due."""
        return len(self._losses) >= _MAX_LOSSES

    def add(
        self,
        step: int,
        lrs: Sequence[float],
        metrics: Mapping[str, Tensor],
        applied: Sequence[bool],
    ) -> None:
        """Add the losses of the phases that updated the weights; count skipped updates."""
        self._skipped_in_a_row = [
            0 if was_applied else count + 1
            for count, was_applied in zip(self._skipped_in_a_row, applied, strict=True)
        ]
        if self._job.skip_nonfinite:
            return
        for phase, lr, was_applied in zip(self._job.phases, lrs, applied, strict=True):
            if was_applied:
                loss = metrics[phase.metric_name("loss")]
                self._losses.append(_Loss(step, phase.name, lr, loss))
                self._weights_changed = True

    def run(self, state: State, *, weights: bool) -> None:
        """Check the losses since the last check. Collective.

        Args:
            state: the current step.
            weights: also check the weights, if a step has changed them.

        Raises:
            TrainingError: on every rank, if a loss or weight is NaN or infinite on any, or every
                update of the last steps was skipped.
        """
        if self._job.may_skip:
            few = max(self._skipped_in_a_row) < _MAX_SKIPPED
            if not self._job.world.all(few):
                self._raise_for_skipped(state.step)
        losses, self._losses = self._losses, []
        finite = not losses or bool(torch.stack([loss.value for loss in losses]).isfinite().all())
        if not self._job.world.all(finite):
            self._raise_for_losses([] if finite else losses)
        if weights and self._weights_changed:
            self._weights_changed = False
            if not self._job.world.all(parallel.are_finite(self._job.model)):
                self._raise_for_weights(state.step)

    def _raise_for_losses(self, losses: Sequence[_Loss]) -> NoReturn:
        bad = next((loss for loss in losses if not loss.value.isfinite()), None)
        values = None if bad is None else (bad.step, bad.phase, bad.lr, float(bad.value))
        ranks = {
            rank: loss
            for rank, loss in enumerate(self._job.world.gather(values))
            if loss is not None
        }
        rank, (step, phase, lr, value) = min(ranks.items(), key=lambda item: item[1][0])
        self._raise(
            f"the {phase + ' ' if phase else ''}loss of step {step:,} is {value} on rank {rank} "
            f"(learning rate {lr:g})",
            "Running the same command again will fail in the same way. Lower optimizer.lr, clip "
            "gradients with trainer.clip_norm=1, check the data, or skip these steps with "
            "trainer.on_nonfinite=skip",
        )

    def _raise_for_weights(self, step: int) -> NoReturn:
        self._raise(
            f"weights became NaN or infinite at step {step:,}: the loss was finite but a gradient "
            "was not",
            "Clip gradients with trainer.clip_norm=1, check the model for divisions, or skip these "
            "steps with trainer.on_nonfinite=skip",
        )

    def _raise_for_skipped(self, step: int) -> NoReturn:
        count = max(self._skipped_in_a_row)
        phase = self._job.phases[self._skipped_in_a_row.index(count)].name
        self._raise(
            f"the last {count:,} updates{f' of phase {phase!r}' if phase else ''} were skipped up "
            f"to step {step:,}, because each gradient was NaN or infinite: the weights no longer "
            "change",
            "Lower optimizer.lr, check the data and the model for divisions, or use "
            "trainer.precision=bf16 in place of fp16",
        )

    def _raise(self, problem: str, advice: str) -> NoReturn:
        self._saver.finish()  # the step of the save in flight has passed its check
        step = self._saver.committed_step
        checkpoint = "none" if step is None else f"step {step:,}"

        def reject() -> NoReturn:
            raise TrainingError(f"{problem}. Last good checkpoint: {checkpoint}. {advice}")

        self._job.world.run_on_rank0(reject)
        raise AssertionError  # run_on_rank0 raises on every rank
