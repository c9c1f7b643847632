"""Saves: plan, snapshot, write, commit. The last two run in the background."""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import lineage, manifest, plan, shard, values
from trainer.checkpoint.commit import UnconfirmedError, commit, deleted_unless_committed
from trainer.checkpoint.lineage import FOLDER, Attempt, Commit
from trainer.checkpoint.manifest import Manifest, ShardFile, TensorEntry
from trainer.checkpoint.shard_writer import LiveTensors, ShardBytes, write_shard
from trainer.checkpoint.snapshot import Snapshot, call_before_updates
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.core.locations import is_remote
from trainer.errors import CheckpointError, PerdureError, StoreError
from trainer.storage.store import AlreadyExists, Store


class PendingSave:
    """A save that runs on its own thread."""

    def __init__(
        self, run: Callable[[], Manifest], after_commit: Callable[[Manifest], None]
    ) -> None:
        self._outcome: Future[Manifest] = Future()
        self.duration_s = 0.0
        """Seconds from the start to the commit, on this rank; 0 until then."""
        threading.Thread(
            target=self._body, args=(run, after_commit), name="checkpoint-save", daemon=True
        ).start()

    def _body(self, run: Callable[[], Manifest], after_commit: Callable[[Manifest], None]) -> None:
        began = time.monotonic()
        try:
            committed = run()
            self.duration_s = time.monotonic() - began
            after_commit(committed)
        except BaseException as error:  # raised by `result` on the caller's thread
            _clear_frames(error)
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(committed)

    @property
    def is_done(self) -> bool:
        """True if `result` would return or raise immediately."""
        return self._outcome.done()

    def result(self, timeout_s: float | None = None) -> Manifest:
        """Wait for the save to end and return the committed manifest. Any rank.

        Raises:
            CheckpointError, StoreError: on every rank, with the rank that failed;
                nothing was committed, and earlier checkpoints are unaffected.
            SupersededError: a newer attempt owns the run.
            TimeoutError: the save has not ended after `timeout_s` seconds.
        """
        return self._outcome.result(timeout_s)


class Writer:
    """Writes the checkpoints of one attempt, one at a time. Reuses the plan and the buffer."""

    def __init__(self, store: Store, world: World, attempt: Attempt) -> None:
        self._store = store
        self._world = world
        self._aside = world.for_background_thread()
        self._attempt = attempt
        self._plan: plan.Plan | None = None
        self._snapshot = Snapshot()
        self._live: LiveTensors | None = None  # source of the newest save that is waited for
        self._hooked = False
        self._saves = 0
        self._save: PendingSave | None = None
        self._unconfirmed: Commit | None = None  # the store failed while creating its manifest

    @property
    def stall_s(self) -> float:
        """Total seconds that optimizer updates waited for copies."""
        return self._snapshot.stall_s

    def start_save(
        self,
        content: Content,
        *,
        step: int,
        epoch: int = 0,
        samples: int = 0,
        config: Mapping[str, Any] | None = None,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[Manifest], None] = lambda committed: None,
        is_blocking: bool = False,
    ) -> PendingSave:
        """Start a save. Collective, on the training thread, when no other save is in flight.

        On return all tensors are copied that may change before the next `Optimizer.step`, which
        waits for the others automatically. Later errors are raised by `PendingSave.result`.

        Args:
            content: this rank's state.
            step: the step.
            epoch: complete passes over the data.
            samples: samples consumed so far on all ranks.
            config: stored unchanged.
            before_commit: called on rank 0, on the save's thread, when all shards are durable.
            after_commit: called on every rank, on the save's thread, after the commit.
            is_blocking: the caller waits for the result and changes nothing until then. The
                tensors are written from where they are, without a copy of the state.
        """
        if self._save is not None and not self._save.is_done:
            raise RuntimeError("a save is in flight and uses the buffer; wait for its result first")
        self._saves += 1
        current = self._plan = plan.make(content, self._world, self._plan)
        problem: PerdureError | None = None
        source: ShardBytes = self._snapshot
        objects: Mapping[str, Any] = {}
        try:
            objects = values.decode(values.encode(content.objects, "objects"))  # a deep copy
            tensors = {**content.tensors, **content.rank_local}
            if is_blocking:
                source = _live(current, tensors)
            else:
                self._snapshot.start(current, tensors, content.deferrable)
        except PerdureError as error:
            problem = error  # the save's thread reports it to the other ranks
        draft = Manifest(
            step=step,
            epoch=epoch,
            samples=samples,
            attempt=self._attempt.number,
            token=self._attempt.token,
            save=self._saves,
            world_size=self._world.size,
            versions={"torch": torch.__version__},
            tensors={
                **current.entries,
                **{name: TensorEntry(alias=owner) for name, owner in content.aliases.items()},
            },
            files={},
            objects=objects,
            config=config or {},
        )
        if isinstance(source, LiveTensors):
            self._live = source
            self._wait_before_updates()
        self._save = PendingSave(
            lambda: self._finish(draft, current.layout, source, problem, before_commit),
            after_commit,
        )
        return self._save

    def _finish(
        self,
        draft: Manifest,
        layout: shard.Layout,
        source: ShardBytes,
        problem: PerdureError | None,
        before_commit: Callable[[], None],
    ) -> Manifest:
        """Write this rank's shard and commit. Collective among the ranks' save threads."""
        folder = f"{FOLDER}/{draft.folder}"
        name = manifest.shard_name(
            rank=self._world.rank,
            world_size=self._world.size,
            token=self._attempt.token,
            save=draft.save,
        )
        shard_keys = [f"{folder}/{name}"]

        def write() -> tuple[str, ShardFile]:
            if problem is not None:
                raise problem
            if not is_remote(self._store.url):
                self._snapshot.wait()  # a disk would slow the copy, and the next update waits
            try:
                return name, write_shard(self._store, shard_keys[0], layout, source)
            except AlreadyExists:
                shard_keys.clear()  # another process wrote it
                raise

        def commit_complete() -> Manifest:
            before_commit()
            return self._commit(complete)

        try:
            with deleted_unless_committed(self._store, shard_keys):
                complete = replace(draft, files=dict(self._aside.gather_results(write)))
                committed = self._aside.run_on_rank0(commit_complete)
        finally:
            source.close()  # also if no shard was written
            self._snapshot.wait()  # the store may have failed before the copy was complete
        if committed.save != draft.save:
            with suppress(StoreError):
                self._store.delete(shard_keys)
        return committed

    def _wait_before_updates(self) -> None:
        """Make optimizers wait for a save that reads the tensors, should its caller not wait.

        Versions alone do not reveal every update: fused optimizers and DTensors change none.
        """
        if not self._hooked:
            self._hooked = True
            call_before_updates(self, self._await_live)

    def _await_live(self) -> None:
        if self._live is not None:
            self._live.closed.wait()

    def _commit(self, complete: Manifest) -> Manifest:
        """Create the manifest. Return it, or that of an earlier save of the same step.

        The earlier save wrote the same state, and its commit succeeded although the store
        reported an error.
        """
        here = Commit(complete.step, complete.attempt, f"{FOLDER}/{complete.folder}")
        try:
            commit(self._store, here.folder, manifest.to_bytes(complete), self._attempt)
        except AlreadyExists:
            if self._unconfirmed == here:
                earlier = lineage.read_manifest(self._store, here)
                if earlier.token == complete.token:
                    return earlier
            raise CheckpointError(
                f"{self._store.url}/{here.folder} already has a manifest: another process "
                "committed this checkpoint or marked it abandoned. The shards just written were "
                "deleted"
            ) from None
        except UnconfirmedError:
            self._unconfirmed = here
            raise
        return complete


def _clear_frames(error: BaseException | None) -> None:
    """Release what an error's frames refer to, such as parts of a shard. It stays readable."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _live(plan_: plan.Plan, tensors: Mapping[str, Tensor]) -> LiveTensors:
    """Return the shard's bytes, read from the tensors while they are written."""
    sources = {
        key: plan.held_part(tensors[name], box) for key, (name, box) in plan_.sources.items()
    }
    if any(source.is_cuda for source in sources.values()):
        torch.cuda.current_stream().synchronize()  # the save's thread has another stream
    versions = {
        key: source._version for key, source in sources.items() if not source.is_inference()
    }

    def check() -> None:
        changed = {
            plan_.sources[key][0]
            for key, version in versions.items()
            if sources[key]._version != version
        }
        if changed:
            raise CheckpointError(
                f"{', '.join(sorted(changed)[:3])} changed during the save, which reads the state "
                "where it is. Do not train before the save has ended"
            )

    return LiveTensors(plan_.layout, sources.__getitem__, check)
