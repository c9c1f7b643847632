"""The stores of one run: its own and an optional mirror, and the thread that copies between them.

Either store can be lost without losing the contents of the other. Attempt records are in both,
and the records and manifests of both together decide which checkpoints are used. The mirror has
the layout of a run directory: the same folders, attempt records and metrics.
"""

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import FOLDER, MANIFEST, Attempt, Commit
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.transfer import copy_shard
from trainer.cluster.world import World
from trainer.errors import CheckpointError, ConfigError, PerdureError, StoreError, SupersededError
from trainer.storage.store import AlreadyExists, Store, has_size

_RETRY_S = 60.0
"""Seconds from a failed copy to the next try, unless a checkpoint is committed before."""
_QUEUE_LENGTH = 2
"""Manifests in the queue; ranks receive a commit at different times, so the last but one may be
the newest that all ranks have."""


class Replicas:
    """The run's own store and its mirror.

    Args:
        run: the store that the run saves to; with a mirror, it may be node-local.
        mirror: the store that checkpoints are copied to; the same for all nodes.
    """

    def __init__(self, run: Store, mirror: Store | None = None) -> None:
        self.run, self.mirror = run, mirror

    @property
    def stores(self) -> Sequence[Store]:
        """Return the run's own store, then the mirror, if any."""
        return [self.run] if self.mirror is None else [self.run, self.mirror]

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all attempts from both stores, oldest first.

        Raises:
            ConfigError: the stores belong to different runs.
        """
        merged: dict[int, dict[str, Any]] = {}
        for store in self.stores:
            for record in lineage.records(store):
                number = record["attempt"]
                earlier = merged.get(number, record)
                if earlier.get("token") != record.get("token"):
                    raise ConfigError(
                        f"checkpoint.mirror={store.url} belongs to another run than "
                        f"{self.run.url}: its attempt {number} was started "
                        f"{record.get('started')} on {record.get('host')}, this run's was started "
                        f"{earlier.get('started')} on {earlier.get('host')}. Choose another mirror"
                    )
                keep_first = "ended" in earlier or "ended" not in record
                newest, other = (earlier, record) if keep_first else (record, earlier)
                merged[number] = {**other, **newest}
        return [merged[number] for number in sorted(merged)]

    def survey(self) -> "Survey":
        """Read all attempt records and list all checkpoints."""
        records = self.records()
        intact = [lineage.commits(store, records=records) for store in self.stores]
        present = [lineage.commits(store, records=records, damaged=True) for store in self.stores]
        return Survey(self.stores, records, intact, present)

    def begin(self, facts: Mapping[str, Any]) -> Attempt:
        """Create the next attempt's record in both stores. Rank 0 only.

        The mirror, which all nodes share, decides between concurrent starts. Records that one
        store is missing, or that ended in only one, are copied to the other.
        """
        if self.mirror is None:
            return lineage.begin(self.run, facts)
        records = self.records()
        for store in self.stores:
            stored = {record["attempt"]: record for record in lineage.records(store)}
            for record in records:
                if stored.get(record["attempt"]) != record:
                    lineage.restore_record(store, record)
        above = records[-1]["attempt"] if records else 0
        while True:
            attempt = lineage.begin(self.mirror, facts, above=above)
            try:
                lineage.create_record(self.run, attempt, facts)
            except AlreadyExists:  # by a concurrent start without this mirror
                above = attempt.number
                continue
            return attempt

    def amend(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Add values to an attempt's record in both stores, durably. Rank 0 only."""
        for store in self.stores:
            lineage.amend(store, attempt, facts)

    def write_heartbeat(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """Update the attempt's heartbeat record in both stores. Rank 0 only."""
        for store in self.stores:
            lineage.write_heartbeat(store, attempt, facts)


class Survey:
    """Checkpoints and attempt records at the time of `Replicas.survey`.

    Args:
        stores: the run's own, then the mirror, if any.
        records: attempt records, oldest first.
        intact: for each store, commits that are not marked as damaged, oldest first.
        present: for each store, all commits, oldest first.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        records: list[dict[str, Any]],
        intact: Sequence[list[Commit]],
        present: Sequence[list[Commit]],
    ) -> None:
        self.records = records
        self.commits = sorted({commit for commits in intact for commit in commits})
        """Commits not marked as damaged in at least one store, oldest first."""
        self.with_damaged = sorted({commit for commits in present for commit in commits})
        """All commits, oldest first."""
        self._stores, self._intact, self._present = stores, intact, present

    def is_copied(self, commit: Commit) -> bool:
        """Return whether the mirror has a checkpoint; True without a mirror."""
        return commit in self._intact[-1] or len(self._stores) == 1

    def views(self, commit: Commit) -> list[Sequence[Store]]:
        """Return the store combinations to read a checkpoint from, best first.

        First the run's own store, and the mirror for shards that it does not have (those of other
        nodes). Then, for damage in the run's own store, the mirror alone.
        """
        if len(self._stores) == 1:
            return [self._stores]
        is_marked = commit in self._present[0] and commit not in self._intact[0]
        views = [] if is_marked else [self._stores]
        return [*views, self._stores[1:]] if commit in self._intact[1] else views


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
        reader = Reader(self._source, folder, manifest)
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
