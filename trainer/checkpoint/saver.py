"""When a save happens, what follows it, and what a failed one means."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.replicas import Mirror
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import PendingSave, Writer
from trainer.cluster.world import World
from trainer.core import intervals
from trainer.core.state import State
from trainer.errors import CheckpointError, PerdureError, SaveHangsError, StoreError
from trainer.storage.store import Store

_MAX_FAILURES_IN_A_ROW = 3


class _OutOfTime(PerdureError):
    """The grace time is over."""


@dataclass(frozen=True)
class _Flight:
    """The save that is being written."""

    step: int
    began_s: float
    save: PendingSave
    stall_s: float
    """How long the training had to wait until the save was begun."""
    updates_s: float
    """How long updates had waited for earlier saves, all together."""


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
    """Interval in steps and epochs."""
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
    say: Callable[[str], None] = print
    """Called with messages for the user."""
    saved: Callable[[Mapping[str, Any]], None] = lambda save: None
    """Called once a save is committed, with `step`, `attempt`, `time` (start, seconds since 1970),
    `save_s`, `stall_s` and `bytes`."""


class Saver:
    """Saves the checkpoints of one attempt and deletes expired ones.

    At most one save is in flight. It finishes on its own thread; all ranks learn its result at the
    first boundary after it has ended on every rank. Every method is collective and runs on the
    training thread.

    Args:
        target: store, ranks, attempt and configuration.
        policy: intervals and time limits.
        retention: deletes expired checkpoints; None: keep the two newest.
        mirror: copies committed checkpoints to a second store.
        hooks: functions called on rank 0.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        target: SaveTarget,
        policy: SavePolicy,
        retention: Retention | None = None,
        mirror: Mirror | None = None,
        hooks: SaveHooks | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.committed_step = target.resumed_step
        """Step of the newest checkpoint that this attempt committed or resumed from."""
        self.save_s = target.last_save_s
        """Duration of the last save, seconds; None: unknown."""
        self.stall_s = 0.0
        """Total time that saves blocked the training thread between steps, seconds."""
        self._store, self._world, self._attempt = target.store, target.world, target.attempt
        self._writer = Writer(target.store, target.world, target.attempt)
        self._config, self._is_shared = target.config, target.is_shared
        self._retention = retention or Retention(target.store, target.attempt)
        self._mirror, self._aside = mirror, target.world.aside()
        self._hooks, self._clock = hooks or SaveHooks(), clock
        self._fitted_grace = True
        self._last_save_s = clock()
        self._failures = 0
        self._flight: _Flight | None = None
        self._begun = 0
        self._is_due = False
        self._notes: list[str] = []  # messages from the save thread

    @property
    def reserve_s(self) -> float:
        """Seconds to reserve before a deadline: two saves, and two copies to the mirror."""
        copy_s = self._mirror.copy_s if self._mirror is not None else 0.0
        return 2 * ((self.save_s or 0.0) + copy_s)

    def discard_commit(self) -> None:
        """Mark the current step as unsaved, because its state has changed since the commit."""
        self.committed_step = None

    @property
    def update_stall_s(self) -> float:
        """For how long updates waited until what they change was copied, all together."""
        return self._writer.stall_s

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.stall_s += time.monotonic() - began

    def due_by_clock(self) -> bool:
        """Return whether `every_s` has passed since the last save. Rank 0's answer counts."""
        return (
            self.policy.every_s is not None
            and self._clock() - self._last_save_s >= self.policy.every_s
        )

    def ended(self) -> int:
        """Return how many saves of this attempt have ended on this rank, or take too long."""
        if self._flight is None:
            return self._begun
        late = self._clock() - self._flight.began_s > self.policy.timeout_s
        return self._begun if late or self._flight.save.is_done else self._begun - 1

    def at_boundary(
        self, state: State, collect: Callable[[], Content], *, due: bool, ended: int
    ) -> None:
        """Take note of a save that has ended; begin the one that is due, or was meanwhile.

        Args:
            state: of this step.
            collect: returns what this rank brings to a checkpoint of this step.
            due: whether a save is due; the same on every rank.
            ended: the least `ended()` of all ranks.

        Raises:
            CheckpointError, StoreError: a save failed and `stop_on_error`, or it was the third
                failure in a row. Earlier checkpoints stand.
            SaveHangsError: a save took longer than `timeout_s`.
            SupersededError: a newer attempt owns the run.
        """
        if self._flight is not None and ended == self._begun:
            with self._stalling():
                self._settle(self._flight)
        elif self._mirror is not None and self._mirror.notes:
            self._tell()
        self._is_due = self._is_due or due
        if self._is_due and self._flight is None:
            with self._stalling():
                self._begin(state, collect)

    def save(
        self, state: State, collect: Callable[[], Content], *, within_s: float | None = None
    ) -> bool:
        """Save this step, unless it is committed; wait; return whether it is. Raises as above.

        Args:
            state: of this step.
            collect: as for `at_boundary`.
            within_s: seconds that there are for it; the same on every rank. What is known not to
                be done in time is not begun. None: as long as it takes.
        """
        until_s = None if within_s is None else self._clock() + within_s
        with self._stalling():
            self._save_now(state, collect, until_s)
        return self.committed_step == state.step

    def _save_now(
        self, state: State, collect: Callable[[], Content], until_s: float | None
    ) -> None:
        try:
            if self._flight is not None:
                self._settle(self._flight, until_s)
            if self.committed_step != state.step and self._fits(until_s):
                self._begin(state, collect, is_awaited=True)
                if self._flight is not None:
                    self._settle(self._flight, until_s)
            self._await_mirror(until_s)
        except _OutOfTime as error:
            if self._world.rank == 0:
                self._hooks.say(str(error))

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one. Collective; raises as above."""
        if self._flight is not None:
            self._settle(self._flight)

    def _await_mirror(self, until_s: float | None) -> None:
        """Wait until the mirror has the newest checkpoint, or time is over, or it cannot be."""
        if self._mirror is None:
            return
        if not self._mirror.wait(0.0):
            step = self.committed_step or 0
            if self._world.rank == 0:
                self._hooks.say(f"copying step {step:,} to {self._mirror.url}")
            left_s = None if until_s is None else max(until_s - self._clock(), 0.0)
            if not self._mirror.wait(left_s) and self._world.rank == 0:
                self._hooks.say(
                    f"NOT COPIED: step {step:,} is in {self._store.url} alone; the next attempt "
                    "copies it, if it finds it there"
                )
        self._tell()

    def _check(self) -> None:
        """Refuse a commit that must not be. Rank 0, on the save's thread."""
        self._hooks.before_commit()
        if self._mirror is not None and self._mirror.superseded is not None:
            raise self._mirror.superseded

    def _fits(self, until_s: float | None) -> bool:
        """Return whether a save is likely to be done in time; rank 0 decides. Collective."""
        if until_s is None:
            return True

        def judge() -> None:
            left_s = until_s - self._clock()
            if self.save_s is not None and self.save_s > left_s:
                raise _OutOfTime(
                    f"NOT SAVED: {left_s:.0f} s are left, and a save takes {self.save_s:.0f} s"
                )

        self._world.from_rank0(judge)
        return True

    def _begin(
        self, state: State, collect: Callable[[], Content], *, is_awaited: bool = False
    ) -> None:
        self._is_due = False
        began_s = self._last_save_s = self._clock()
        content = collect()
        try:
            save = self._writer.start_save(
                content,
                step=state.step,
                epoch=state.epoch,
                samples=state.samples,
                config=self._config,
                before_commit=self._check,
                after_commit=self._committed,
                is_blocking=is_awaited,
            )
        except (CheckpointError, StoreError) as error:
            self._failed(state.step, error)
            return
        self._flight = _Flight(
            state.step, began_s, save, self._clock() - began_s, self._writer.stall_s
        )
        self._begun += 1

    def _settle(self, flight: _Flight, until_s: float | None = None) -> None:
        """Wait for a save to end on every rank; take note of what came of it."""
        self._flight = None
        waits_from = self._clock()
        try:
            made = self._world.together(lambda: self._result(flight, until_s))
        except (SaveHangsError, _OutOfTime):
            raise
        except (CheckpointError, StoreError) as error:
            self._failed(flight.step, error)
        else:
            self.committed_step = flight.step
            self.save_s = flight.save.duration_s
            self._failures = 0
            self._tell_of(flight, made, self._clock() - waits_from)
            self.compare_with_grace()
        self._tell()

    def _tell_of(self, flight: _Flight, made: Manifest, waited_s: float) -> None:
        """Tell what a save was, and what it has cost. Any rank; rank 0 speaks."""
        if self._world.rank != 0:
            return
        stall_s = flight.stall_s + self._writer.stall_s - flight.updates_s + waited_s
        self._hooks.saved(
            {
                "step": flight.step,
                "attempt": self._attempt.number,
                "time": round(time.time() - (self._clock() - flight.began_s), 3),
                "save_s": round(flight.save.duration_s, 4),
                "stall_s": round(stall_s, 4),
                "bytes": sum(file.bytes for file in made.files.values()),
            }
        )

    def _tell(self) -> None:
        """Say what came up on other threads."""
        for notes in (self._notes, self._mirror.notes if self._mirror is not None else []):
            while notes:
                self._hooks.say(notes.pop(0))

    def compare_with_grace(self) -> None:
        """Say so, when a save no longer fits into the grace time. Any rank; rank 0 speaks."""
        fits = self.save_s is None or self.save_s <= self.policy.grace_s
        if not fits and self._fitted_grace and self._world.rank == 0:
            self._hooks.say(
                f"warning: a save takes {self.save_s:.0f} s, longer than preemption.grace_s="
                f"{self.policy.grace_s:.0f}, so a preempted attempt may end without a last save. "
                "Increase the scheduler's lead time, or lower checkpoint.every_s"
            )
        self._fitted_grace = fits

    def _result(self, flight: _Flight, until_s: float | None) -> Manifest:
        hangs_s = flight.began_s + self.policy.timeout_s
        end_s = hangs_s if until_s is None else min(hangs_s, until_s)
        try:
            return flight.save.result(max(end_s - self._clock(), 0.0))
        except TimeoutError:
            if end_s != hangs_s:
                raise _OutOfTime(
                    f"NOT SAVED: the save of step {flight.step:,} has not ended in the time that "
                    "was left"
                ) from None
            raise SaveHangsError(
                f"the save of step {flight.step:,} has not ended after "
                f"{self.policy.timeout_s:,.0f} s (checkpoint.timeout_s). Check whether "
                f"{self._store.url} hangs. Earlier checkpoints are intact"
            ) from None

    def _failed(self, step: int, error: PerdureError) -> None:
        self._failures += 1
        if self.policy.stop_on_error or self._failures >= _MAX_FAILURES_IN_A_ROW:
            raise error
        if self._world.rank == 0:
            self._hooks.say(
                f"SAVE FAILED at step {step:,} ({self._failures} in a row; "
                f"{_MAX_FAILURES_IN_A_ROW} stop the run): {error}. Training goes on; earlier "
                "checkpoints stand."
            )

    # --- after the commit, on the save's thread --------------------------------------------------

    def _committed(self, made: Manifest) -> None:
        """Hand it to the mirror; delete old ones. If that fails, the next save tries again."""
        if self._mirror is not None:
            self._mirror.submit(made)

        def prune() -> list[str]:
            pinned = self._mirror.pinned() if self._mirror is not None else ()
            self._retention.apply(made, pinned)
            return [commit.folder for commit in lineage.commits(self._store, damaged=True)]

        try:
            if self._is_shared:
                if self._world.rank == 0:
                    prune()
                return
            kept = self._aside.from_rank0(prune)
            if self._world.local_rank == 0 and self._world.rank > 0:
                lineage.delete_except(self._store, self._attempt, kept)
        except (CheckpointError, StoreError) as error:
            self._notes.append(f"OLD CHECKPOINTS WERE NOT DELETED at step {made.step:,}: {error}")
