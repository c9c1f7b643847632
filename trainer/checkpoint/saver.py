"""Schedule, progress and failures of one attempt's saves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.checkpoint import lineage
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.save_settings import SaveHooks, SavePolicy, SaveTarget
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import PendingSave, Writer
from trainer.core.state import State
from trainer.errors import CheckpointError, PerdureError, SaveHangsError, StoreError

_MAX_CONSECUTIVE_FAILURES = 3
"""Consecutive failed saves that end the attempt."""


class _OutOfTime(PerdureError):
    """The time for the last save is over."""


@dataclass(frozen=True)
class _Flight:
    """A save in progress."""

    step: int
    started_s: float
    save: PendingSave
    stall_s: float
    """Time for which starting the save blocked training."""
    updates_s: float
    """Total time for which earlier saves had blocked updates."""


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
        self._mirror, self._aside = mirror, target.world.for_background_thread()
        self._hooks, self._clock = hooks or SaveHooks(), clock
        self._fitted_grace = True
        self._last_save_s = clock()
        self._failures = 0
        self._flight: _Flight | None = None
        self._started = 0
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
        """Total time that updates waited for a save to copy their tensors, seconds."""
        return self._writer.stall_s

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.stall_s += time.monotonic() - began

    def due_by_clock(self) -> bool:
        """Return True if `every_s` has passed since the last save; rank 0 decides."""
        every_s = self.policy.every_s
        return every_s is not None and self._clock() - self._last_save_s >= every_s

    def ended(self) -> int:
        """Return the number of this rank's saves that have ended or exceeded their time limit."""
        if self._flight is None:
            return self._started
        is_late = self._clock() - self._flight.started_s > self.policy.timeout_s
        return self._started if is_late or self._flight.save.is_done else self._started - 1

    def at_boundary(
        self,
        state: State,
        collect: Callable[[], Content],
        *,
        due: bool,
        exact: bool = False,
        ended: int,
    ) -> None:
        """Finish a save that has ended on every rank; start one that is due or overdue.

        Args:
            state: the state after this step.
            collect: returns this rank's contents of a checkpoint of this step.
            due: True if a save is due, at this step or once the save in flight has ended; the same
                on every rank.
            exact: True if this very step must be saved; waits for a save in flight. The same on
                every rank.
            ended: the minimum of `ended()` over all ranks.

        Raises:
            CheckpointError, StoreError: a save failed and `stop_on_error` is set, or it was the
                third consecutive failure. Earlier checkpoints are intact.
            SaveHangsError: a save took longer than `timeout_s`.
            SupersededError: a newer attempt owns the run.
        """
        if self._flight is not None and (exact or ended == self._started):
            with self._stalling():
                self._finish(self._flight)
        elif self._mirror is not None and self._mirror.notes:
            self._log_notes()
        self._is_due = self._is_due or due or exact
        if self._is_due and self._flight is None:
            with self._stalling():
                self._start(state, collect)

    def save(
        self, state: State, collect: Callable[[], Content], *, within_s: float | None = None
    ) -> bool:
        """Save this step unless it is committed, and wait; return True if it is committed.

        Raises the same errors as `at_boundary`.

        Args:
            state: the state after this step.
            collect: as in `at_boundary`.
            within_s: time limit in seconds, the same on every rank; a save that is expected to take
                longer is not started. None: no limit.
        """
        until_s = None if within_s is None else self._clock() + within_s
        with self._stalling():
            try:
                self._save_now(state, collect, until_s)
            except _OutOfTime as error:
                if self._world.rank == 0:
                    self._hooks.log(str(error))
        return self.committed_step == state.step

    def _save_now(
        self, state: State, collect: Callable[[], Content], until_s: float | None
    ) -> None:
        self.finish(until_s)
        if self.committed_step != state.step:
            self._check_time(state.step, until_s)
            self._start(state, collect, is_blocking=True)
            self.finish(until_s)
        self._await_mirror(until_s)

    def finish(self, until_s: float | None = None) -> None:
        """Wait for the save in flight, if any. Collective; raises the errors of `at_boundary`."""
        if self._flight is not None:
            self._finish(self._flight, until_s)

    def _await_mirror(self, until_s: float | None) -> None:
        """Wait until the mirror has the newest checkpoint, its copy fails, or time is over."""
        if self._mirror is None:
            return
        if not self._mirror.wait(0.0):
            step = self.committed_step or 0
            if self._world.rank == 0:
                self._hooks.log(f"copying step {step:,} to {self._mirror.url}")
            remaining_s = None if until_s is None else max(until_s - self._clock(), 0.0)
            if not self._mirror.wait(remaining_s) and self._world.rank == 0:
                self._hooks.log(
                    f"warning: step {step:,} is not copied to the mirror and exists only in "
                    f"{self._store.url}. The next attempt copies it if it can read that store"
                )
        self._log_notes()

    def _check(self) -> None:
        """Check that a commit is still allowed. Rank 0, on the save thread."""
        self._hooks.before_commit()
        if self._mirror is not None and self._mirror.superseded is not None:
            raise self._mirror.superseded

    def _check_time(self, step: int, until_s: float | None) -> None:
        """Raise `_OutOfTime` on every rank if rank 0 expects a save to take too long."""
        if until_s is None:
            return

        def compare() -> None:
            remaining_s = until_s - self._clock()
            if self.save_s is not None and self.save_s > remaining_s:
                raise _OutOfTime(
                    f"warning: step {step:,} is not saved: {remaining_s:.0f} s remain, but a save "
                    f"takes {self.save_s:.0f} s"
                )

        self._world.run_on_rank0(compare)

    def _start(
        self, state: State, collect: Callable[[], Content], *, is_blocking: bool = False
    ) -> None:
        self._is_due = False
        started_s = self._last_save_s = self._clock()
        content = collect()
        try:
            save = self._writer.start_save(
                content,
                step=state.step,
                epoch=state.epoch,
                samples=state.samples,
                config=self._config,
                before_commit=self._check,
                after_commit=self._delete_expired,
                is_blocking=is_blocking,
            )
        except (CheckpointError, StoreError) as error:
            self._handle_failure(state.step, error)
            return
        stall_s = self._clock() - started_s
        self._flight = _Flight(state.step, started_s, save, stall_s, self._writer.stall_s)
        self._started += 1

    def _finish(self, flight: _Flight, until_s: float | None = None) -> None:
        """Wait for a save to end on every rank; record and report its result."""
        self._flight = None
        began_s = self._clock()
        try:
            manifest = self._world.run_on_all(lambda: self._await_result(flight, until_s))
        except (SaveHangsError, _OutOfTime):
            raise
        except (CheckpointError, StoreError) as error:
            self._handle_failure(flight.step, error)
        else:
            self.committed_step = flight.step
            self.save_s = flight.save.duration_s
            self._failures = 0
            self._report(flight, manifest, self._clock() - began_s)
            self.compare_with_grace()
        self._log_notes()

    def _report(self, flight: _Flight, manifest: Manifest, waited_s: float) -> None:
        """Pass the facts about a committed save to the hook. Rank 0 only."""
        if self._world.rank != 0:
            return
        stall_s = flight.stall_s + self._writer.stall_s - flight.updates_s + waited_s
        self._hooks.saved(
            {
                "step": flight.step,
                "attempt": self._attempt.number,
                "time": round(time.time() - (self._clock() - flight.started_s), 3),
                "save_s": round(flight.save.duration_s, 4),
                "stall_s": round(stall_s, 4),
                "bytes": sum(file.bytes for file in manifest.files.values()),
            }
        )

    def _log_notes(self) -> None:
        """Log messages from other threads."""
        for notes in (self._notes, self._mirror.notes if self._mirror is not None else []):
            while notes:
                self._hooks.log(notes.pop(0))

    def compare_with_grace(self) -> None:
        """Log a warning on rank 0 when saves start to take longer than the grace time."""
        fits = self.save_s is None or self.save_s <= self.policy.grace_s
        if not fits and self._fitted_grace and self._world.rank == 0:
            self._hooks.log(
                f"warning: a save takes {self.save_s:.0f} s, longer than preemption.grace_s="
                f"{self.policy.grace_s:.0f}, so a preempted attempt may end without a last save. "
                "Increase the scheduler's lead time, or lower checkpoint.every_s"
            )
        self._fitted_grace = fits

    def _await_result(self, flight: _Flight, until_s: float | None) -> Manifest:
        timeout_at_s = flight.started_s + self.policy.timeout_s
        end_s = timeout_at_s if until_s is None else min(timeout_at_s, until_s)
        try:
            return flight.save.result(max(end_s - self._clock(), 0.0))
        except TimeoutError:
            if end_s != timeout_at_s:
                raise _OutOfTime(
                    f"warning: step {flight.step:,} is not saved: the save has not ended in the "
                    "remaining time"
                ) from None
            raise SaveHangsError(
                f"the save of step {flight.step:,} has not ended after "
                f"{self.policy.timeout_s:,.0f} s (checkpoint.timeout_s). Check whether "
                f"{self._store.url} hangs. Earlier checkpoints are intact"
            ) from None

    def _handle_failure(self, step: int, error: PerdureError) -> None:
        self._failures += 1
        if self.policy.stop_on_error or self._failures >= _MAX_CONSECUTIVE_FAILURES:
            raise error
        if self._world.rank == 0:
            self._hooks.log(
                f"warning: saving step {step:,} failed ({self._failures} consecutive; "
                f"{_MAX_CONSECUTIVE_FAILURES} end the attempt): {error}. Training continues; "
                "earlier checkpoints are intact"
            )

    # --- after the commit, on the save thread ----------------------------------------------------

    def _delete_expired(self, manifest: Manifest) -> None:
        """Pass the commit to the mirror; delete expired checkpoints. Failures are retried."""
        if self._mirror is not None:
            self._mirror.submit(manifest)

        def delete() -> list[str]:
            pinned = self._mirror.pinned() if self._mirror is not None else ()
            self._retention.apply(manifest, pinned)
            return [commit.folder for commit in lineage.commits(self._store, damaged=True)]

        try:
            if self._is_shared:
                if self._world.rank == 0:
                    delete()
                return
            folders = self._aside.run_on_rank0(delete)
            if self._world.local_rank == 0 and self._world.rank > 0:
                lineage.delete_except(self._store, self._attempt, folders)
        except (CheckpointError, StoreError) as error:
            self._notes.append(
                f"warning: expired checkpoints were not deleted after step {manifest.step:,}: "
                f"{error}"
            )
