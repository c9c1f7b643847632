"""Detection of NaN and infinite losses and weights."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.checkpoint.saver import Saver
from trainer.core.state import State
from trainer.errors import TrainingError
from trainer.training import parallel
from trainer.training.job import Job


class Losses:
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
