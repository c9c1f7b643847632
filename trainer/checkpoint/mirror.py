"""The second tier: a thread that copies committed checkpoints to another store, verified.

The mirror is a run directory like the first: the same folders, records of attempts and metrics.
Every rank copies its own shard, rank 0 commits. When checkpoints come faster than they can be
copied, the newest is next and those between are left out.
"""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import FOLDER, MANIFEST, Attempt
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.transfer import copy_shard
from trainer.cluster.world import World
from trainer.errors import CheckpointError, PerdureError, StoreError, SupersededError
from trainer.storage.store import Store

_AGAIN_S = 60.0
"""After a failure the next try comes with the next checkpoint, or after this long."""
_WAITING = 2
"""Ranks hear of a commit one after another, so the last but one may still be wanted."""


class Mirror:
    """Copies the checkpoints of one attempt from the run's store to the mirror.

    Args:
        source: the run's store; of nodes that share none, each has its own shards in its own.
        target: the mirror.
        world: the ranks. Making a Mirror is collective, on the main thread.
        attempt: this attempt.
        retention: what is kept in the mirror.
        also: returns other keys of the run that the mirror should have, with their bytes; called
            on rank 0, on the mirror's thread, before each commit.
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
        """What a person should know, on rank 0; whoever says it takes it out."""
        self.superseded: SupersededError | None = None
        """A newer attempt owns the run; no checkpoint of this one may be committed any more."""
        self.copied_step: int | None = None
        """The newest step that this attempt brought to the mirror."""
        self.copy_s = 0.0
        """How long the last copy took."""
        self._source, self._target, self._attempt = source, target, attempt
        self._world = world.apart()
        self._retention, self._also = retention, also
        self._changed = threading.Condition()
        self._waiting: dict[int, Manifest] = {}  # by their number, counted from 1
        self._offered: dict[int, Manifest] = {}  # what ranks are agreeing on, then what is copied
        self._taken = 0  # commits; of these, the number of the last one that
        self._tried = 0  # a copy was begun of, and
        self._done = 0  # was copied, as was or never will be every one before it
        self._failures = 0
        self._is_urgent = False
        self._is_over = self._is_behind = False
        threading.Thread(target=self._body, name="mirror", daemon=True).start()

    def take(self, manifest: Manifest) -> None:
        """Copy this checkpoint next. Every rank, once for each commit, in the same order."""
        with self._changed:
            self._taken += 1
            self._waiting[self._taken] = manifest
            for number in sorted(self._waiting)[:-_WAITING]:
                del self._waiting[number]
            self._changed.notify_all()

    def pinned(self) -> set[str]:
        """Return the folders that are still to be read from the run's store."""
        with self._changed:
            wanted = [*self._waiting.values(), *self._offered.values()]
        return {_folder(manifest) for manifest in wanted}

    def settle(self, within_s: float | None) -> bool:
        """Wait until everything is copied, or a try has failed; return whether it is copied.

        Every rank. None: however long it takes.
        """
        with self._changed:
            failures = self._failures
            self._is_urgent = self._done < self._taken
            self._changed.notify_all()

            def has_ended() -> bool:
                has_failed = self._failures > failures and self._tried == self._taken
                return self._done == self._taken or has_failed or self._is_over

            self._changed.wait_for(has_ended, within_s)
            return self._done == self._taken

    # --- on the mirror's thread, on every rank ----------------------------------------------------

    def _body(self) -> None:
        try:
            while self._round():
                pass
        except Exception:  # a bug of ours: training goes on, and the last words tell
            self.notes.append(f"THE MIRROR STOPPED by a bug:\n{traceback.format_exc()}")
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _round(self) -> bool:
        """Copy the newest checkpoint that every rank knows of; return whether to go on."""
        number = min(self._world.gather(self._await_work()))
        with self._changed:
            if number <= self._done:
                return True  # another rank has not heard yet
            self._tried, manifest = number, self._offered[number]
            self._offered = {number: manifest}
        began, error = time.monotonic(), None
        try:
            self._copy(manifest)
        except SupersededError as found:
            self.superseded = found
            return False
        except PerdureError as found:
            error = found
        with self._changed:
            self._offered = {}
            if error is None:
                self._done, self.copied_step = number, manifest.step
                self.copy_s = time.monotonic() - began
                for each in [each for each in self._waiting if each <= number]:
                    del self._waiting[each]
            self._note(manifest, error)
            self._changed.notify_all()
        return True

    def _await_work(self) -> int:
        """Return the number of the newest commit when there is one to be copied."""
        with self._changed:
            while self._taken == self._tried and not self._is_urgent:
                is_woken = self._changed.wait(_AGAIN_S)
                if not is_woken and self._taken > self._done:
                    break
            self._is_urgent = False
            self._offered = dict(self._waiting)  # more may come before the ranks have agreed
            return self._taken

    def _note(self, manifest: Manifest, error: PerdureError | None) -> None:
        if error is not None:
            self._failures += 1
        if error is not None and not self._is_behind:
            self.notes.append(
                f"THE MIRROR IS BEHIND: step {manifest.step:,} was not copied: {error}. Training "
                "goes on, and so do the tries"
            )
        elif error is None and self._is_behind:
            self.notes.append(f"the mirror has step {manifest.step:,}; it is no longer behind")
        self._is_behind = error is not None

    def _copy(self, manifest: Manifest) -> None:
        """Bring one checkpoint to the mirror; collective. The manifest goes last."""
        folder = _folder(manifest)
        if self._world.from_rank0(lambda: self._has(manifest)):
            return
        reader = Reader(self._source, folder, manifest)
        mine = self._share(manifest)

        def copy() -> None:
            for file in mine:
                copy_shard(reader, file, self._target, folder, manifest)

        self._world.together(copy)
        self._world.from_rank0(lambda: self._commit(manifest))

    def _has(self, manifest: Manifest) -> bool:
        key = f"{_folder(manifest)}/{MANIFEST}"
        with suppress(FileNotFoundError):
            return self._target.read(key) == self._source.read(key)
        return False

    def _share(self, manifest: Manifest) -> list[str]:
        """Return the files that this rank copies: its own, or such as it sees. Collective."""
        files = list(manifest.files)
        if manifest.attempt == self._attempt.number:
            return [files[self._world.rank]]
        seen = self._world.on_each(lambda: [self._sees(manifest, file) for file in files])
        mine = []
        for index, file in enumerate(files):
            holders = [rank for rank, sees in enumerate(seen) if sees[index]]
            if not holders:
                raise CheckpointError(
                    f"{_folder(manifest)}/{file} is on none of these nodes, in {self._source.url}"
                )
            if holders[index % len(holders)] == self._world.rank:
                mine.append(file)
        return mine

    def _sees(self, manifest: Manifest, file: str) -> bool:
        with suppress(FileNotFoundError):
            size = self._source.size(f"{_folder(manifest)}/{file}")
            return size == manifest.files[file].bytes
        return False

    def _commit(self, manifest: Manifest) -> None:
        """Create the manifest in the mirror, then delete what it is not to keep. Rank 0."""
        lineage.refuse_if_superseded(self._target, self._attempt)
        for key, data in self._also().items():
            self._target.replace(key, data)
        key = f"{_folder(manifest)}/{MANIFEST}"
        try:
            self._target.create(key, self._source.read(key))
        except FileNotFoundError:
            raise CheckpointError(f"{self._source.url}/{key} was deleted meanwhile") from None
        try:
            self._retention.apply(manifest)
        except (CheckpointError, StoreError) as error:
            self.notes.append(f"OLD COPIES WERE NOT DELETED at step {manifest.step:,}: {error}")


def _folder(manifest: Manifest) -> str:
    return f"{FOLDER}/{manifest.folder}"
