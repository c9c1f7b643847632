"""Target, intervals, limits and hooks of an attempt's saves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint.lineage import Attempt
from trainer.cluster.world import World
from trainer.core import intervals
from trainer.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class SaveTarget:
    """The run that checkpoints belong to, and the attempt that writes them."""

    store: Store
    """The run's store."""
    world: World
    attempt: Attempt
    config: Mapping[str, Any]
    """Configuration stored in every manifest."""
    is_shared: bool = True
    """True if all nodes see the same files in `store`."""
    resumed_step: int | None = None
    """Step of this run's checkpoint that the attempt resumed from."""
    last_save_s: float | None = None
    """Duration of the last save of an earlier attempt, seconds."""


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """Save intervals, time limits, and the reaction to a failed save."""

    every: intervals.Every = field(default_factory=intervals.Every)
    """Interval in steps and epochs. Epochs are saved at their last step; a save by steps starts
    later if another one is in flight."""
    milestones: tuple[int, ...] = ()
    """Intervals in steps whose checkpoints are kept permanently, and saved at their own step."""
    save_best: bool = False
    """Save each step whose evaluation is the best so far."""
    every_s: float | None = None
    """Interval by rank 0's clock, seconds; None: no interval."""
    timeout_s: float = 1800.0
    """Seconds after which an unfinished save ends the attempt."""
    grace_s: float = math.inf
    """Seconds between a signal and SIGKILL; slower saves cause a warning."""
    stop_on_error: bool = False
    """Raise at the first failed save; the third consecutive failure always raises."""


@dataclass(frozen=True, kw_only=True)
class SaveHooks:
    """Functions that a saver calls on rank 0."""

    before_commit: Callable[[], None] = lambda: None
    """Called before each manifest is written, on the save thread."""
    log: Callable[[str], None] = print
    """Called with messages for the user."""
    saved: Callable[[Mapping[str, Any]], None] = lambda save: None
    """Called once a save is committed, with `step`, `attempt`, `time` (start, seconds since 1970),
    `save_s`, `stall_s` and `bytes`."""
