"""The thread that copies an attempt's checkpoints from the run's store to its mirror."""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import FOLDER, MANIFEST, Attempt
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.shard_reader import ShardReader
from trainer.checkpoint.transfer import copy_shard
from trainer.cluster.world import World
from trainer.errors import CheckpointError, PerdureError, StoreError, SupersededError
from trainer.storage.store import Store, has_size

_RETRY_S = 60.0
"""Seconds from a failed copy to the next try, unless a checkpoint is committed before."""
_QUEUE_LENGTH = 2
"""Manifests in the queue; ranks receive a commit at different times, so the last but one may be
the newest that all ranks have."""


class Mirror:
    """Thread that copies an attempt's checkpoints from the run's store to the mirror, verified.

    Every rank copies its own shard and rank 0 commits. Of checkpoints that are committed during a
    copy, only the newest is copied next.

    Args:
        source: the run's store; with node-local stores, each has the shards of that node.
        target: the mirror.
        world: the ranks. The constructor is collective, on the main thread.
        attempt: this attempt.
        retention: retention policy of the mirror.
        also: returns other keys to write to the mirror, with their bytes; called on rank 0, on the
            mirror's thread, before each commit.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        world: World,
        attempt: Attempt,
        *,
        retention: Retention,
        also: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        self.url = target.url
        self.notes: list[str] = []
        """Messages for the log, on rank 0; the reader removes them."""
        self.superseded: SupersededError | None = None
        """Set when a newer attempt owns the run; nothing is committed after that."""
        self.copy_s = 0.0
        """Duration of the last copy."""
        self._source, self._target, self._attempt = source, target, attempt
        self._world = world.with_own_group()
        self._retention, self._also = retention, also
        self._changed = threading.Condition()
        self._queue: dict[int, Manifest] = {}  # by number, counted from 1
        self._offered: dict[int, Manifest] = {}  # the ranks agree on one of these and copy it
        self._submitted = 0  # number of the newest commit
        self._tried = 0  # number of the newest commit whose copy was started
        self._done = 0  # number of the newest commit that was copied
        self._failures = 0
        self._is_urgent = False
        self._is_stopped = self._is_behind = False
        threading.Thread(target=self._run, name="mirror", daemon=True).start()

    def submit(self, manifest: Manifest) -> None:
        """Copy a checkpoint next. Every rank, once for each commit, in the same order."""
        with self._changed:
            self._submitted += 1
            self._queue[self._submitted] = manifest
            for number in sorted(self._queue)[:-_QUEUE_LENGTH]:
                del self._queue[number]
            self._changed.notify_all()

    def pinned(self) -> set[str]:
        """Return the checkpoint folders that are still needed in the run's store."""
        with self._changed:
            return {_folder(item) for item in [*self._queue.values(), *self._offered.values()]}

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until everything is copied or a try fails; return whether it is copied. Every rank.

        Args:
            timeout_s: seconds to wait at most; None: no limit.
        """
        with self._changed:
            failures = self._failures
            self._is_urgent = self._done < self._submitted
            self._changed.notify_all()

            def has_ended() -> bool:
                has_failed = self._failures > failures and self._tried == self._submitted
                return self._done == self._submitted or has_failed or self._is_stopped

            self._changed.wait_for(has_ended, timeout_s)
            return self._done == self._submitted

    # --- on the mirror's thread, on every rank ----------------------------------------------------

    def _run(self) -> None:
        try:
            while self._copy_next():
                pass
        except Exception:  # a bug in Perdure; training continues and the log has the traceback
            self.notes.append(f"the mirror stopped because of a bug:\n{traceback.format_exc()}")
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _copy_next(self) -> bool:
        """Copy the newest checkpoint that every rank has received; return whether to continue."""
        number = min(self._world.gather(self._await_work()))
        with self._changed:
            if number <= self._done:
                return True  # another rank has not received it yet
            self._tried, manifest = number, self._offered[number]
            self._offered = {number: manifest}
        start_s = time.monotonic()
        failure: PerdureError | None = None
        try:
            self._copy(manifest)
        except SupersededError as error:
            self.superseded = error
            return False
        except PerdureError as error:
            failure = error
        with self._changed:
            self._offered = {}
            if failure is None:
                self._done = number
                self.copy_s = time.monotonic() - start_s
                self._queue = {n: queued for n, queued in self._queue.items() if n > number}
            self._note(manifest, failure)
            self._changed.notify_all()
        return True

    def _await_work(self) -> int:
        """Return the number of the newest commit once there is one to copy."""
        with self._changed:
            while self._submitted == self._tried and not self._is_urgent:
                is_woken = self._changed.wait(_RETRY_S)
                if not is_woken and self._submitted > self._done:
                    break
            self._is_urgent = False
            self._offered = dict(self._queue)  # the queue may grow before the ranks have agreed
            return self._submitted

    def _note(self, manifest: Manifest, error: PerdureError | None) -> None:
        if error is not None:
            self._failures += 1
        if error is not None and not self._is_behind:
            self.notes.append(
                f"warning: the mirror is behind: step {manifest.step:,} was not copied: {error}. "
                "Training continues, and the copy is retried"
            )
        elif error is None and self._is_behind:
            self.notes.append(f"the mirror has step {manifest.step:,}; it is no longer behind")
        self._is_behind = error is not None

    def _copy(self, manifest: Manifest) -> None:
        """Copy one checkpoint, its manifest last. Collective."""
        folder = _folder(manifest)
        if self._world.run_on_rank0(lambda: self._has(manifest)):
            return
        reader = ShardReader(self._source, folder, manifest)
        assigned = self._assigned_files(manifest)

        def copy() -> None:
            for file in assigned:
                copy_shard(reader, file, self._target, folder, manifest)

        self._world.run_on_all(copy)
        self._world.run_on_rank0(lambda: self._commit(manifest))

    def _has(self, manifest: Manifest) -> bool:
        key = f"{_folder(manifest)}/{MANIFEST}"
        with suppress(FileNotFoundError):
            return self._target.read(key) == self._source.read(key)
        return False

    def _assigned_files(self, manifest: Manifest) -> list[str]:
        """Return the files that this rank copies. Collective.

        Of this attempt's checkpoints, each rank copies its own file. Files of older attempts are
        distributed over the ranks whose store has them.
        """
        files = list(manifest.files)
        if manifest.attempt == self._attempt.number:
            return [files[self._world.rank]]
        visible = self._world.gather_results(
            lambda: [
                has_size(self._source, f"{_folder(manifest)}/{file}", record.bytes)
                for file, record in manifest.files.items()
            ]
        )
        assigned = []
        for index, file in enumerate(files):
            holders = [rank for rank, sees in enumerate(visible) if sees[index]]
            if not holders:
                raise CheckpointError(
                    f"{_folder(manifest)}/{file} is missing in {self._source.url} on every node"
                )
            if holders[index % len(holders)] == self._world.rank:
                assigned.append(file)
        return assigned

    def _commit(self, manifest: Manifest) -> None:
        """Create the manifest in the mirror, then apply the retention policy. Rank 0 only."""
        lineage.check_not_superseded(self._target, self._attempt)
        for key, data in self._also().items():
            self._target.replace(key, data)
        key = f"{_folder(manifest)}/{MANIFEST}"
        try:
            self._target.create(key, self._source.read(key))
        except FileNotFoundError:
            raise CheckpointError(f"{self._source.url}/{key} was deleted in the meantime") from None
        try:
            self._retention.apply(manifest)
        except (CheckpointError, StoreError) as error:
            self.notes.append(
                f"warning: old copies were not deleted at step {manifest.step:,}: {error}"
            )


def _folder(manifest: Manifest) -> str:
    return f"{FOLDER}/{manifest.folder}"
