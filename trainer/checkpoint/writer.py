"""One save: plan, snapshot, write, commit."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from trainer.checkpoint import lineage, manifest, plan, shard, values
from trainer.checkpoint.lineage import FOLDER, MANIFEST, Attempt
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.tree import Content
from trainer.distributed import World
from trainer.errors import CheckpointError, PerdureError, StoreError
from trainer.storage import AlreadyExists, Store


class Writer:
    """Writes the checkpoints of one attempt; keeps the plan and the buffer between saves."""

    def __init__(self, store: Store, world: World, attempt: Attempt) -> None:
        self._store = store
        self._world = world
        self._attempt = attempt
        self._plan: plan.Plan | None = None
        self._snapshot = Snapshot()
        self._saves = 0

    def write(
        self,
        content: Content,
        *,
        step: int,
        epoch: int,
        samples: int,
        config: Mapping[str, Any],
        before_commit: Callable[[], None],
    ) -> Manifest:
        """Write and commit a checkpoint; it is durable and visible on return. Collective.

        `before_commit` is called on rank 0 when all shards are durable, before the manifest.

        Raises:
            CheckpointError, StoreError: on every rank, naming the rank that failed and why;
                nothing was committed and earlier checkpoints stand.
            SupersededError: a newer attempt owns the run.
        """
        world = self._world
        world.on_each(lambda: _refuse_unknown(content))
        current = plan.make(content.tensors, world, self._plan)
        self._plan = current
        self._saves += 1
        folder = f"{FOLDER}/{manifest.folder_name(step, self._attempt.number)}"

        name = manifest.shard_name(
            rank=world.rank, world_size=world.size, token=self._attempt.token, save=self._saves
        )

        litter = [f"{folder}/{name}"]  # what to delete if this save fails; space may be short

        def write_shard() -> tuple[str, manifest.ShardFile]:
            self._snapshot.fill(current.layout, content.tensors)
            data, record = self._snapshot.seal(current.layout)
            try:
                self._store.write(f"{folder}/{name}", [data])
            except AlreadyExists:
                litter.clear()  # it is somebody else's
                raise
            return name, record

        def check() -> None:
            before_commit()
            lineage.refuse_if_superseded(self._store, self._attempt)

        def commit() -> Manifest:
            aliases = {name: TensorEntry(alias=owner) for name, owner in content.aliases.items()}
            made = Manifest(
                step=step,
                epoch=epoch,
                samples=samples,
                attempt=self._attempt.number,
                token=self._attempt.token,
                save=self._saves,
                world_size=world.size,
                versions={"torch": torch.__version__},
                tensors={**current.entries, **aliases},
                files=files,
                objects=content.objects,
                config=config,
            )
            try:
                self._store.create(f"{folder}/{MANIFEST}", manifest.to_bytes(made))
            except AlreadyExists:
                raise CheckpointError(
                    f"{self._store.url}/{folder} has a manifest already; it was given up or "
                    "committed by somebody else, and what was just written does not count"
                ) from None
            return made

        committing = False
        try:
            files = dict(world.on_each(write_shard))
            world.from_rank0(check)
            committing = True
            return world.from_rank0(commit)
        except PerdureError as error:
            if not (committing and isinstance(error, StoreError)):  # else it may be committed
                with suppress(StoreError):
                    self._store.delete(litter)
            raise


def _refuse_unknown(content: Content) -> None:
    for name, tensor in content.tensors.items():
        if name == shard.METADATA:
            raise CheckpointError(f"a tensor cannot be called {name!r}; safetensors uses that name")
        if tensor.dtype not in plan.DTYPE_NAMES:
            raise CheckpointError(f"tensor {name!r} has the dtype {tensor.dtype}, not storable")
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"tensor {name!r} has the layout {tensor.layout}; only dense tensors are stored"
            )
    values.encode(content.objects, "objects")
