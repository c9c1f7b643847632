"""When a save happens, what follows it, and what a failed one means."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from trainer import policy
from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.tree import Content
from trainer.checkpoint.writer import Writer
from trainer.distributed import World
from trainer.errors import CheckpointError, PerdureError, StoreError
from trainer.state import State
from trainer.storage import Store

_MAX_FAILURES_IN_A_ROW = 3


class Saver:
    """Saves the checkpoints of one attempt and deletes those that are no longer wanted.

    Args:
        store: the run's store.
        world: the ranks; every method but `due_by_clock` is collective.
        attempt: this attempt.
        config: the configuration as it is stored in every manifest.
        every: intervals in steps and epochs.
        every_s: seconds between saves by rank 0's clock, or None.
        keep_last: newest checkpoints to keep.
        keep_best: best checkpoints to keep, where `metric` is set.
        metric: name of the evaluation's metric that decides, or None.
        mode: `max` or `min`.
        stop_on_error: raise when a save fails, instead of going on (three in a row always raise).
        before_commit: called on rank 0 before each manifest is written.
        say: called on rank 0 with what a person should know.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: Store,
        world: World,
        attempt: Attempt,
        *,
        config: Mapping[str, Any],
        every: policy.Every,
        every_s: float | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str | None = None,
        mode: str = "max",
        stop_on_error: bool = False,
        before_commit: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every = every
        self.committed_step: int | None = None
        """The step of the newest checkpoint that this attempt committed or resumed from."""
        self._store, self._world, self._attempt = store, world, attempt
        self._writer = Writer(store, world, attempt)
        self._config = config
        self._every_s = every_s
        self._keep = {"keep_last": keep_last, "keep_best": keep_best if metric else 0}
        self._metric, self._mode = metric, mode
        self._stop_on_error = stop_on_error
        self._before_commit, self._say, self._clock = before_commit, say, clock
        self._last_save_s = clock()
        self._failures = 0
        self._measured: dict[tuple[int, int], float | None] = {}

    def due_by_clock(self) -> bool:
        """Return whether `every_s` has passed since the last save. Rank 0's answer counts."""
        return self._every_s is not None and self._clock() - self._last_save_s >= self._every_s

    def save(self, state: State, content: Content) -> bool:
        """Save this step, unless it is committed already; return whether it is. Collective.

        Raises:
            CheckpointError, StoreError: the save failed and `stop_on_error`, or it was the third
                failure in a row. Earlier checkpoints stand.
            SupersededError: a newer attempt owns the run.
        """
        if self.committed_step == state.step:
            return True
        self._last_save_s = self._clock()
        try:
            self._writer.write(
                content,
                step=state.step,
                epoch=state.epoch,
                samples=state.samples,
                config=self._config,
                before_commit=self._before_commit,
            )
        except (CheckpointError, StoreError) as error:
            self._failed(state.step, error)
            return False
        self.committed_step = state.step
        self._failures = 0
        if self._world.rank == 0:
            self._prune(state)
        return True

    def _failed(self, step: int, error: PerdureError) -> None:
        self._failures += 1
        if self._stop_on_error or self._failures >= _MAX_FAILURES_IN_A_ROW:
            raise error
        if self._world.rank == 0:
            self._say(
                f"SAVE FAILED at step {step:,} ({self._failures} in a row; "
                f"{_MAX_FAILURES_IN_A_ROW} stop the run): {error}. Training goes on; earlier "
                "checkpoints stand."
            )

    def _prune(self, state: State) -> None:
        """Delete what is no longer wanted; if that fails, the next save tries again."""
        try:
            self._delete_stale(state)
        except (CheckpointError, StoreError) as error:
            self._say(f"OLD CHECKPOINTS WERE NOT DELETED at step {state.step:,}: {error}")

    def _delete_stale(self, state: State) -> None:
        newest = Commit(state.step, self._attempt.number, "")
        commits = lineage.commits(self._store)
        steps = {commit.step: self._metric_of(commit) for commit in commits}
        stale = set(policy.stale(steps, mode=self._mode, **self._keep))
        for commit in commits:
            if commit.step in stale:
                lineage.delete(self._store, commit.folder)
        lineage.clean(self._store, self._attempt, newest)

    def _metric_of(self, commit: Commit) -> float | None:
        """Return the metric measured at a checkpoint's own step; each manifest is read once."""
        if self._metric is None:
            return None
        key = (commit.step, commit.attempt)
        if key not in self._measured:
            try:
                self._measured[key] = lineage.measured(self._store, commit, self._metric)
            except CheckpointError:  # it must not keep all others from going
                self._measured[key] = None
        return self._measured[key]
