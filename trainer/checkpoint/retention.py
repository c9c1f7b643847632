"""Which checkpoints of one store go after a commit: what policy no longer wants, and litter."""

from collections.abc import Collection
from functools import partial

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Attempt, Commit
from trainer.checkpoint.manifest import Manifest
from trainer.core import intervals
from trainer.errors import CheckpointError
from trainer.storage.store import Store


class Retention:
    """Deletes from one store what it is not to keep. Rank 0 only.

    Args:
        store: of the run, or its mirror.
        attempt: this attempt.
        keep_last: newest checkpoints to keep.
        keep_best: best checkpoints to keep, where `metric` is set.
        keep_every_steps: checkpoints at multiples of this are kept for good, or None.
        metric: name of the evaluation's metric that decides, or None.
        mode: `max` or `min`.
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
        """Delete what is no longer wanted after the commit of `newest`.

        Args:
            newest: of this attempt.
            pinned: folders that stay for now.

        Raises:
            CheckpointError, StoreError: not everything could be deleted; the next time may.
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
        """Return the metric measured at a checkpoint's own step; each manifest is read once."""
        if self._metric is None:
            return None
        if commit not in self._measured:
            try:
                manifest = lineage.read_manifest(self._store, commit)
                self._measured[commit] = lineage.measured(manifest, self._metric)
            except CheckpointError:  # it must not keep all others from going
                self._measured[commit] = None
        return self._measured[commit]
