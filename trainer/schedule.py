"""Learning-rate schedules: one that torch does not have in one word; any, on a longer road."""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

HORIZON_WORDS = ("total_steps", "total_epochs", "steps_per_epoch")
"""What stands for the run's numbers in the arguments of a schedule."""


def warmup_cosine(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    floor: float = 0.0,
    warmup_share: float = 0.0,
) -> LambdaLR:
    """Raise the learning rate linearly from 0, then lower it along half a cosine.

    A closed form of the step (I. Loshchilov and F. Hutter, SGDR, ICLR 2017, eq. 5, one cycle):
    only the step is kept in a checkpoint, so a longer run follows the longer curve from there.

    Args:
        optimizer: whose learning rates are scaled.
        total_steps: where the curve ends; the configuration's word `total_steps` stands for the
            run's length.
        warmup_steps: steps of the linear rise.
        floor: share of the learning rate that is left at the end, 0 … 1.
        warmup_share: the rise as a share of all steps, 0 … 1, where `warmup_steps` is 0.
    """
    warmup_steps = warmup_steps or round(warmup_share * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def steps(state: Mapping[str, Any]) -> int | None:
    """Return how many steps a schedule has taken, by its state; None: it is not known."""
    inner = state.get("_schedulers")  # of a ChainedScheduler
    own = state.get("last_epoch", inner[0].get("last_epoch") if inner else None)
    return own if isinstance(own, int) else None


@dataclass(frozen=True)
class Place:
    """Where a schedule is."""

    state: dict[str, Any]
    groups: list[dict[str, Any]]
    """What it has set of each of the optimizer's groups."""

    @classmethod
    def of(cls, scheduler: LRScheduler) -> "Place":
        """Return where it is now."""
        groups = scheduler.optimizer.param_groups
        values = [{key: group[key] for key in _SET if key in group} for group in groups]
        return cls(*copy.deepcopy((scheduler.state_dict(), values)))

    def take(self, scheduler: LRScheduler) -> None:
        """Bring a schedule like that one, and its optimizer, there."""
        scheduler.load_state_dict(copy.deepcopy(self.state))
        for group, values in zip(scheduler.optimizer.param_groups, self.groups, strict=True):
            group |= copy.deepcopy(values)


def replay(scheduler: LRScheduler, state: Mapping[str, Any]) -> Place | None:
    """Return where a schedule that is new would be after as many steps as a state tells of.

    A schedule of torch keeps its length in its state, so one that is loaded ends where the run was
    to end when it was saved. None: it is no function of the step, or hides how many it has taken.
    """
    taken, own = steps(state), steps(scheduler.state_dict())
    if taken is None or own is None or isinstance(scheduler, ReduceLROnPlateau):
        return None
    begins = Place.of(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer has not stepped
        for _ in range(taken - own):
            scheduler.step()
    found = Place.of(scheduler)
    begins.take(scheduler)
    return found


_SET = ("lr", "momentum", "betas")
"""What torch's schedules set."""
