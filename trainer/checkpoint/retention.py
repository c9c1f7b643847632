"""Retention: which checkpoints of a store are deleted after a commit."""

from collections.abc import Collection
from functools import partial

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.manifest import Manifest
from trainer.core import intervals
from trainer.errors import CheckpointError
from trainer.storage.store import Store


class Retention:
    """Deletes stale checkpoints and orphaned files from one store. Rank 0 only.

    Args:
        store: the run's store, or its mirror.
        attempt: this attempt.
        keep_last: number of newest checkpoints to keep.
        keep_best: number of best checkpoints to keep, if `metric` is set.
        keep_every_steps: keep checkpoints at multiples of this permanently, or None.
        metric: name of the evaluation metric for `keep_best`, or None.
        mode: `max` or `min`: which metric values are better.
    """

    def __init__(
        self,
        store: Store,
        attempt: Attempt,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_steps: int | None = None,
        metric: str | None = None,
        mode: str = "max",
    ) -> None:
        self._store, self._attempt, self._metric = store, attempt, metric
        self._stale = partial(
            intervals.stale,
            keep_last=keep_last,
            keep_best=keep_best if metric else 0,
            mode=mode,
            keep_every_steps=keep_every_steps,
        )
        self._measured: dict[Commit, float | None] = {}

    def apply(self, newest: Manifest, pinned: Collection[str] = ()) -> None:
        """Delete stale checkpoints after the commit of `newest`.

        Args:
            newest: a checkpoint of this attempt.
            pinned: folders to keep for now.

        Raises:
            CheckpointError, StoreError: a deletion failed; the next call tries again.
        """
        here = Commit(newest.step, newest.attempt, f"{lineage.FOLDER}/{newest.folder}")
        if self._metric is not None:
            self._measured[here] = lineage.measured(newest, self._metric)
        commits = lineage.commits(self._store)
        stale = set(self._stale({commit.step: self._metric_of(commit) for commit in commits}))
        for commit in commits:
            if commit.step in stale and commit.folder not in pinned:
                lineage.delete(self._store, commit.folder)
        lineage.clean(self._store, self._attempt, here)

    def _metric_of(self, commit: Commit) -> float | None:
        """Return the metric of a checkpoint's step. Each manifest is read once."""
        if self._metric is None:
            return None
        if commit not in self._measured:
            try:
                manifest = lineage.read_manifest(self._store, commit)
                self._measured[commit] = lineage.measured(manifest, self._metric)
            except CheckpointError:  # one damaged manifest must not block the other deletions
                self._measured[commit] = None
        return self._measured[commit]
