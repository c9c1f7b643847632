"""One save: plan, snapshot, write, commit. All but the first two happen beside the training."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from trainer.checkpoint import lineage, manifest, plan, shard, values
from trainer.checkpoint.commit import UnconfirmedError, commit, deleted_unless_committed
from trainer.checkpoint.lineage import FOLDER, Attempt, Commit
from trainer.checkpoint.manifest import Manifest, ShardFile, TensorEntry
from trainer.checkpoint.shard_writer import write_shard
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.state_tree import Content
from trainer.cluster.world import World
from trainer.errors import CheckpointError, PerdureError, StoreError
from trainer.storage.store import AlreadyExists, Store


class PendingSave:
    """A save that a thread of its own brings to its end."""

    def __init__(
        self, run: Callable[[], Manifest], after_commit: Callable[[Manifest], None]
    ) -> None:
        self._outcome: Manifest | BaseException | None = None
        self.duration_s = 0.0
        """From the beginning to the commit, on this rank; 0 before."""
        self._thread = threading.Thread(
            target=self._body, args=(run, after_commit), name="checkpoint-save", daemon=True
        )
        self._thread.start()

    def _body(self, run: Callable[[], Manifest], after_commit: Callable[[Manifest], None]) -> None:
        began = time.monotonic()
        try:
            outcome = run()
            self.duration_s = time.monotonic() - began
            after_commit(outcome)
            self._outcome = outcome
        except BaseException as error:  # `result` raises it, on the thread that trains
            self._outcome = error

    @property
    def is_done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return not self._thread.is_alive()

    def result(self, timeout_s: float | None = None) -> Manifest:
        """Wait for the end; return the manifest of what was committed. Any rank.

        Raises:
            CheckpointError, StoreError: on every rank, naming the rank that failed and why;
                nothing was committed and earlier checkpoints stand.
            SupersededError: a newer attempt owns the run.
            TimeoutError: it has not ended yet.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError
        if isinstance(self._outcome, Manifest):
            return self._outcome
        assert self._outcome is not None  # noqa: S101 (for the type checker)
        raise self._outcome


class Writer:
    """Writes the checkpoints of one attempt, one at a time; keeps the plan and the buffer."""

    def __init__(self, store: Store, world: World, attempt: Attempt) -> None:
        self._store = store
        self._world = world
        self._aside = world.for_background_thread()
        self._attempt = attempt
        self._plan: plan.Plan | None = None
        self._snapshot = Snapshot()
        self._saves = 0
        self._save: PendingSave | None = None
        self._unconfirmed: Commit | None = None  # the store failed while creating its manifest

    @property
    def stall_s(self) -> float:
        """For how long updates waited until what they change was copied, all together."""
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
        after_commit: Callable[[Manifest], None] = lambda made: None,
        is_blocking: bool = False,
    ) -> PendingSave:
        """Begin a save. Collective, on the thread that trains, when no other save is in flight.

        On return everything is copied that may change before the next `Optimizer.step`, which
        waits for the rest by itself. What fails later comes out of the save's `result`.

        Args:
            content: what this rank brings.
            step: of the checkpoint.
            epoch: complete passes over the data.
            samples: consumed so far over all ranks.
            config: stored as it is.
            before_commit: called on rank 0, on the save's thread, when all shards are durable.
            after_commit: called on every rank, on the save's thread, after the commit.
            is_blocking: the caller does nothing but wait: write while the copy is being made. Else
                the copy has the processor for itself, so that the next update comes sooner.
        """
        if self._save is not None and not self._save.is_done:
            raise RuntimeError("a save is in flight, and its buffer in use; wait for its result")
        self._saves += 1
        current = self._plan = plan.make(content, self._world, self._plan)
        problem: PerdureError | None = None
        objects: Mapping[str, Any] = {}
        try:
            objects = values.decode(values.encode(content.objects, "objects"))  # a deep copy
            self._snapshot.start(
                current, {**content.tensors, **content.rank_local}, content.deferrable
            )
        except PerdureError as error:
            problem = error  # the other ranks hear of it from the save's thread
        made = Manifest(
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
        self._save = PendingSave(
            lambda: self._finish(made, current.layout, problem, before_commit, is_blocking),
            after_commit,
        )
        return self._save

    def _finish(
        self,
        made: Manifest,
        layout: shard.Layout,
        problem: PerdureError | None,
        before_commit: Callable[[], None],
        is_blocking: bool,
    ) -> Manifest:
        """Write this rank's shard and commit. Collective among the ranks' save threads."""
        folder = f"{FOLDER}/{made.folder}"
        name = manifest.shard_name(
            rank=self._world.rank,
            world_size=self._world.size,
            token=self._attempt.token,
            save=made.save,
        )
        shard_keys = [f"{folder}/{name}"]

        def write() -> tuple[str, ShardFile]:
            if problem is not None:
                raise problem
            if not is_blocking:
                self._snapshot.wait()
            try:
                file = self._store.open_new(f"{folder}/{name}", layout.total_bytes)
            except AlreadyExists:
                shard_keys.clear()  # another process wrote it
                raise
            return name, write_shard(file, layout, self._snapshot)

        def commit_complete() -> Manifest:
            before_commit()
            return self._commit(complete)

        try:
            with deleted_unless_committed(self._store, shard_keys):
                complete = replace(made, files=dict(self._aside.gather_results(write)))
                committed = self._aside.run_on_rank0(commit_complete)
        finally:
            self._snapshot.wait()  # the store may have failed before the copy was complete
        if committed.save != made.save:
            with suppress(StoreError):
                self._store.delete(shard_keys)
        return committed

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
