"""Storage writer and reader for torch.distributed.checkpoint, for third-party training loops.

    dcp.save(state_dict, storage_writer=PerdureStorageWriter("out/step-100"))
    dcp.load(state_dict, storage_reader=PerdureStorageReader("out/step-100"))

torch plans which rank holds which data; Perdure writes, verifies, commits and reads the shards.
Values that are not tensors are stored as JSON. Bytes are stored unchanged and never interpreted.
"""

import dataclasses
import io
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoint import dcp_items, dcp_metadata, location, manifest, select, shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.commit import commit, deleted_unless_committed, readable_bytes
from trainer.checkpoint.dtypes import DTYPES
from trainer.checkpoint.lineage import MANIFEST
from trainer.checkpoint.manifest import DCP_OBJECT, Manifest
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard_writer import LiveTensors, write_shard
from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError, ConfigError, StoreError
from trainer.storage.store import AlreadyExists


@dataclass(frozen=True)
class _RankInfo:
    """Rank and world size, sent to each rank with its plan."""

    rank: int
    world_size: int


class PerdureStorageWriter(StorageWriter):
    """Writes checkpoints in Perdure's format, with checksums and an atomic commit.

    One checkpoint is one folder. It is committed and durable when `save` returns, or when the
    future of `async_save` is done. A process killed earlier leaves files without a manifest, which
    the next save into that folder deletes. A folder that holds a checkpoint is never overwritten.

    Args:
        checkpoint_id: path or URL of the folder, such as s3://bucket/run/step-100. `save` can
            override it for each checkpoint.
        step: recorded in the manifest. Default: the last number in the folder's name, or 0.
        settings: object store settings. Default: the standard AWS configuration.

    Raises (wrapped in torch's CheckpointException, on all ranks):
        CheckpointError: the folder holds a checkpoint, or a value's type cannot be stored without
            pickling.
        StoreError: the store failed; nothing was committed.
    """

    def __init__(
        self,
        checkpoint_id: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        settings: ObjectStore | None = None,
    ) -> None:
        super().__init__()
        if step is not None and (type(step) is not int or not 0 <= step < 1 << 63):
            raise ConfigError(f"step={step!r} is not an integer between 0 and 2**63 - 1")
        self.checkpoint_id = checkpoint_id
        self._step = step
        self._settings = settings or ObjectStore()
        self._saves = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start another checkpoint. Every rank."""
        self.checkpoint_id = checkpoint_id or self.checkpoint_id
        self._saves += 1

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Open the store. Every rank."""
        if kwargs.get("use_collectives") is False:
            raise CheckpointError(
                "use_collectives=False is not supported: rank 0 needs the results of all ranks for "
                "the manifest. Remove that argument"
            )
        self._store, self._folder = location.split(_url(self.checkpoint_id), self._settings)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged, or raise before any rank writes. Every rank."""
        for item in plan.items:
            dcp_items.check_storable(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Raise if the folder is in use, and add each rank's number to its plan. Rank 0."""
        names = self._store.entries(self._folder)
        if MANIFEST in names:
            raise CheckpointError(
                f"{self.checkpoint_id} already holds a checkpoint, which is never overwritten. "
                "Use another folder, or delete that one"
            )
        location.check_no_checkpoints_inside(self._store, self._folder)
        return [
            dataclasses.replace(plan, storage_data=_RankInfo(rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this rank's shard. Durable on return, not committed. Every rank."""
        info: _RankInfo = plan.storage_data
        # a new token each time, as torch may reuse the plan for other folders and later tries
        token = secrets.token_hex(4)
        name = manifest.shard_name(
            rank=info.rank, world_size=info.world_size, token=token, save=self._saves
        )
        tensors: dict[str, Tensor | WriteItem] = {}  # by key in the shard
        records: list[tuple[WriteItem, dcp_items.ItemRecord]] = []
        sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for item in plan.items:
            data: Tensor | None = None
            if item.type is WriteItemType.BYTE_IO:
                key, item_record, data = item.index.fqn, *dcp_items.object_record(item, planner)
            else:
                key, item_record = dcp_items.tensor_record(item)
            if item_record.is_stored:
                if key in tensors:
                    raise CheckpointError(
                        f"two tensors of the state would be stored as {key!r}; rename one of them"
                    )
                tensors[key] = item if data is None else data
                sizes[key] = (item_record.dtype, item_record.box.lengths)
            records.append((item, item_record))
        shard_file = None
        if sizes:
            layout = shard.lay_out((key, *size) for key, size in sizes.items())

            @lru_cache(maxsize=1)  # called for each part, and a planner may compute the tensor
            def tensor_of(key: str) -> Tensor:
                source = tensors[key]
                return source if isinstance(source, Tensor) else dcp_items.resolved(source, planner)

            shard_file = write_shard(
                self._store, f"{self._folder}/{name}", layout, LiveTensors(layout, tensor_of)
            )
        results = []
        for item, item_record in records:
            if item_record.is_stored:
                item_record = dataclasses.replace(item_record, file=name, record=shard_file)
            nbytes = item_record.box.elements * DTYPES.get(item_record.dtype, 0)
            results.append(WriteResult(item.index, nbytes, item_record))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint. Rank 0."""
        items = [
            (result.index, record)
            for rank_results in results
            for result in rank_results
            if isinstance(record := result.storage_data, dcp_items.ItemRecord)
        ]
        files = {r.file: r.record for _, r in items if r.record is not None}
        paths = metadata.planner_data or {}
        step, attempt = location.numbers(self._folder)
        complete = Manifest(
            step=step if self._step is None else self._step,
            attempt=attempt,
            epoch=0,
            samples=0,
            token=next(iter(files), "-" * 24).split("-")[3],
            save=self._saves,
            world_size=len(results),
            versions={"torch": torch.__version__},
            tensors=dcp_items.tensor_entries(metadata, items, list(files)),
            files=files,
            objects={
                DCP_OBJECT: {
                    "objects": {i.fqn: r.value for i, r in items if not r.dtype},
                    "opaque": {i.fqn: r.opaque for i, r in items if r.opaque},
                    "paths": {name: list(path) for name, path in paths.items()},
                }
            },
        )
        shard_keys = [f"{self._folder}/{name}" for name in files]
        with deleted_unless_committed(self._store, shard_keys):
            try:
                data = readable_bytes(complete, str(self.checkpoint_id))
                commit(self._store, self._folder, data)
            except AlreadyExists:
                raise CheckpointError(
                    f"{self.checkpoint_id} was committed by another process during this save; the "
                    "new shards were deleted. Save into another folder"
                ) from None
        with suppress(StoreError):  # the checkpoint is committed; orphaned files only use space
            orphans = [
                f"{self._folder}/{name}"
                for name in self._store.entries(self._folder)
                if manifest.is_shard_name(name) and name not in files
            ]
            self._store.delete(orphans)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be a checkpoint's path or URL."""
        return bool(os.fspath(checkpoint_id))


class PerdureStorageReader(StorageReader):
    """Reads checkpoints of `PerdureStorageWriter` and of Perdure runs.

    Every byte read is verified. Each rank reads its local parts, with any sharding and world size.
    Tensors of a run's checkpoint have the names in its manifest: `model.…` as in the model's
    state_dict, `optimizer.<parameter>.<key>`. Its other values are `objects.…`.

    Args:
        checkpoint_id: a checkpoint's folder, or a run directory for its newest checkpoint.
        settings: object store settings. Default: the standard AWS configuration.

    Raises:
        ConfigError: no checkpoint exists there.
        CheckpointError: its manifest or its data is damaged.
    """

    def __init__(
        self,
        checkpoint_id: str | os.PathLike[str] | None = None,
        *,
        settings: ObjectStore | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint_id = checkpoint_id
        self._settings = settings or ObjectStore()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Switch to another checkpoint. Every rank."""
        self.checkpoint_id = checkpoint_id or self.checkpoint_id

    def read_metadata(self) -> Metadata:  # no per-rank metadata
        """Read the manifest. Every rank."""
        directory = location.open_location(_url(self.checkpoint_id), self._settings)
        newest = select.pick(directory, "latest")
        self._manifest = directory.manifest(newest)
        self._reader = Reader(directory.store, newest.folder, self._manifest)
        self._extra = dcp_metadata.other_values(
            self._manifest, f"{directory.store.url}/{newest.folder}"
        )
        self._identity = (newest.folder, self._manifest.token, self._manifest.save)
        return dcp_metadata.metadata_of(self._manifest, self._extra)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Add the identity of this rank's checkpoint to its plan. Every rank."""
        return dataclasses.replace(plan, storage_data=self._identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raise if the ranks opened different checkpoints. Rank 0."""
        for rank, plan in enumerate(plans):
            if plan.storage_data != plans[0].storage_data:
                raise CheckpointError(
                    f"rank {rank} opened {plan.storage_data[0]} in {self.checkpoint_id}, rank 0 "
                    f"{plans[0].storage_data[0]}. Pass the folder of one checkpoint"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Fill this rank's tensors and load the other values. Every rank."""
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        requests = []
        for item, target in zip(tensors, targets, strict=True):
            index = item.storage_index
            starts = index.offset or (0,) * target.ndim
            offsets = (s + o for s, o in zip(starts, item.storage_offsets, strict=True))
            requests.append((index.fqn, Box(tuple(offsets), tuple(item.lengths)), target))
        self._reader.read_boxes(requests)
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._stream(item.storage_index.fqn, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stream(self, name: str, planner: LoadPlanner) -> io.BytesIO:
        """Return a value as a stream, for `LoadPlanner.load_bytes`.

        torch's planner unpickles the stream, so it is built here from JSON or bytes. Data in a
        planner's private format is returned unchanged, but never to torch's own planner.
        """
        kind = self._extra["opaque"].get(name)
        if kind is None:
            value = self._extra["objects"][name]
        else:
            data = self._reader.fetch(name).numpy().tobytes()
            if kind == "stream":
                if getattr(type(planner), "load_bytes", None) is DefaultLoadPlanner.load_bytes:
                    raise CheckpointError(
                        f"{name!r} is in another planner's private format, which torch's planner "
                        "would unpickle: it could run arbitrary code. Load it with the planner "
                        "that wrote it"
                    )
                return io.BytesIO(data)
            value = dcp_items.OPAQUE[kind](data)
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        return stream

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be a checkpoint's path or URL."""
        return bool(os.fspath(checkpoint_id))


def _url(checkpoint_id: str | os.PathLike[str] | None) -> str:
    if not checkpoint_id:
        raise ConfigError("checkpoint_id is not set; pass the checkpoint's folder")
    return os.fspath(checkpoint_id)
