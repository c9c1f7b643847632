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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
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

from trainer.checkpoint import location, manifest, select, shard, values
from trainer.checkpoint.box import Box
from trainer.checkpoint.commit import commit, deleted_unless_committed, readable_bytes
from trainer.checkpoint.lineage import MANIFEST
from trainer.checkpoint.manifest import DCP_OBJECT, Manifest, ShardFile, TensorEntry
from trainer.checkpoint.plan import DTYPE_NAMES, TORCH_DTYPES, columns
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard_writer import LiveTensors, write_shard
from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError, ConfigError, StoreError
from trainer.storage.store import AlreadyExists

_OPAQUE = {"bytes": bytes, "bytearray": bytearray, "BytesIO": io.BytesIO}


@dataclass(frozen=True)
class _RankInfo:
    """Rank and world size, sent to each rank with its plan."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class _ItemRecord:
    """Result of writing one item of a plan."""

    file: str = ""
    record: ShardFile | None = None
    dtype: str = ""
    """Set for tensors and opaque bytes."""
    box: Box = field(default_factory=lambda: Box((), ()))
    opaque: str = ""
    """A key of `_OPAQUE`, or `stream` for data in the planner's private format."""
    value: Any = None
    """Encoded value, if neither a tensor nor opaque."""


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
        """Return the plan unchanged. Every rank."""
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
        records: list[tuple[WriteItem, _ItemRecord]] = []
        sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for item in plan.items:
            data: Tensor | None = None
            if item.type is WriteItemType.BYTE_IO:
                key, item_record, data = item.index.fqn, *_object(item, planner)
            else:
                key, item_record = _tensor(item)
            if item_record.dtype:
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

            def tensor_of(key: str) -> Tensor:
                source = tensors[key]
                return source if isinstance(source, Tensor) else _resolved(source, planner)

            file = self._store.open_new(f"{self._folder}/{name}", layout.total_bytes)
            shard_file = write_shard(file, layout, LiveTensors(layout, tensor_of))
        results = []
        for item, item_record in records:
            if item_record.dtype:
                item_record = dataclasses.replace(item_record, file=name, record=shard_file)
            nbytes = item_record.box.elements * shard.DTYPES.get(item_record.dtype, 0)
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
            if isinstance(record := result.storage_data, _ItemRecord)
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
            tensors=_entries(metadata, items, list(files)),
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
        self._extra = _extra(self._manifest, f"{directory.store.url}/{newest.folder}")
        self._identity = (newest.folder, self._manifest.token, self._manifest.save)
        opaque, objects = self._extra["opaque"], self._extra["objects"]
        entries: dict[str, STORAGE_TYPES] = {
            name: _storage(self._manifest, name) for name in self._manifest.tensors
        }
        entries |= {name: BytesStorageMetadata() for name in (*opaque, *objects)}
        paths = {name: tuple(path) for name, path in self._extra["paths"].items()}
        return Metadata(entries, planner_data=paths)

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
            value = _OPAQUE[kind](data)
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


# --- writing -----------------------------------------------------------------------------------


def _tensor(item: WriteItem) -> tuple[str, _ItemRecord]:
    """Return an item's key in the shard, and its record."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None  # noqa: S101 (for the type checker)
    dtype = DTYPE_NAMES.get(data.properties.dtype)
    if dtype is None or name == shard.METADATA:
        raise CheckpointError(
            f"tensor {name!r} ({data.properties.dtype}) cannot be stored: unsupported name or dtype"
        )
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    is_complete = box.lengths == tuple(data.size)
    return shard.part_key(name, None if is_complete else box.offsets), _ItemRecord(
        dtype=dtype, box=box
    )


def _resolved(item: WriteItem, planner: SavePlanner) -> Tensor:
    tensor = planner.resolve_data(item)
    data = item.tensor_data
    assert isinstance(tensor, Tensor)  # noqa: S101 (the planner's promise)
    assert data is not None  # noqa: S101 (for the type checker)
    planned = (data.properties.dtype, data.chunk.sizes)
    if (tensor.dtype, tensor.shape) != planned:
        raise CheckpointError(
            f"tensor {item.index.fqn!r} was planned as {planned[0]} {list(planned[1])} but "
            f"is {tensor.dtype} {list(tensor.shape)}; do not change tensors during a save"
        )
    return tensor


def _object(item: WriteItem, planner: SavePlanner) -> tuple[_ItemRecord, Tensor | None]:
    """Return the record of a value that is not a tensor, and its bytes if it is opaque."""
    name = item.index.fqn
    raw = _raw(planner)
    if raw is None:  # the planner has a private format and reads it back itself
        written = planner.resolve_data(item)
        assert isinstance(written, io.BytesIO)  # noqa: S101 (the planner's promise)
        return _opaque("stream", written.getbuffer())
    value = raw.lookup_object(item.index)
    if type(value) in (bytes, bytearray):
        return _opaque(type(value).__name__, value)
    if type(value) is io.BytesIO:
        return _opaque("BytesIO", value.getbuffer())
    return _ItemRecord(value=values.decode(values.encode(value, name))), None


def _raw(planner: SavePlanner) -> DefaultSavePlanner | None:
    """Return the planner if it pickles values as torch's default planner does, else None."""
    if not isinstance(planner, DefaultSavePlanner):
        return None
    kind = type(planner)
    overridden = kind.resolve_data is not DefaultSavePlanner.resolve_data or (
        kind.transform_object is not DefaultSavePlanner.transform_object
    )
    return None if overridden else planner


def _opaque(kind: str, data: Any) -> tuple[_ItemRecord, Tensor]:
    tensor = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return _ItemRecord(dtype="U8", box=Box((0,), (len(data),)), opaque=kind), tensor


def _entries(
    metadata: Metadata, items: Sequence[tuple[MetadataIndex, _ItemRecord]], files: list[str]
) -> dict[str, TensorEntry]:
    numbers = {file: number for number, file in enumerate(files)}
    parts: dict[str, list[tuple[int, Box]]] = {}
    dtypes: dict[str, str] = {}
    for index, record in items:
        if record.dtype:
            parts.setdefault(index.fqn, []).append((numbers[record.file], record.box))
            dtypes[index.fqn] = record.dtype
    entries = {}
    for name, boxes in parts.items():
        declared = metadata.state_dict_metadata[name]
        shape = boxes[0][1].lengths
        if isinstance(declared, TensorStorageMetadata):
            shape = tuple(declared.size)
        entry = TensorEntry(dtypes[name], shape)
        entries[name] = _even(entry, boxes) or columns(entry, boxes)
    return entries


def _even(entry: TensorEntry, boxes: Sequence[tuple[int, Box]]) -> TensorEntry | None:
    """Return the entry as an even sharding over the first files, or None if it is uneven."""
    pieces = [len({box.offsets[axis] for _, box in boxes}) for axis in range(len(entry.shape))]
    even = dataclasses.replace(entry, grid=tuple(pieces))
    if len(boxes) < 2 or prod(pieces) != len(boxes):
        return None
    cells = [(number, even.cell(number)) for number in range(len(boxes))]
    return even if cells == list(boxes) else None


# --- reading -----------------------------------------------------------------------------------


def _storage(manifest_: Manifest, name: str) -> TensorStorageMetadata:
    entry = manifest_.resolve(name)
    chunks = [
        ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths))
        for _, box in entry.boxes(list(manifest_.files), Box.full(entry.shape))
    ]
    properties = TensorProperties(dtype=TORCH_DTYPES[entry.dtype])
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def _extra(manifest_: Manifest, where: str) -> Mapping[str, Any]:
    """Return the writer's record of values that are not tensors, or derive it for a run.

    Raises:
        CheckpointError: it is malformed.
    """
    extra = manifest_.objects.get(DCP_OBJECT)
    if extra is None:
        return _extra_of_run(manifest_)
    try:
        is_valid = all(
            type(extra[key]) is dict and all(type(name) is str for name in extra[key])
            for key in ("objects", "opaque", "paths")
        )
        is_valid = is_valid and set(extra["opaque"].values()) <= {*_OPAQUE, "stream"}
        is_valid = is_valid and extra["opaque"].keys() <= manifest_.tensors.keys()
        is_valid = is_valid and all(
            type(path) is list and all(type(key) in (str, int) for key in path)
            for path in extra["paths"].values()
        )
    except (LookupError, TypeError):
        is_valid = False
    if not is_valid:
        raise CheckpointError(f"{where}: objects.{DCP_OBJECT} in its manifest is malformed")
    return extra  # type: ignore[no-any-return]


def _extra_of_run(manifest_: Manifest) -> Mapping[str, Any]:
    """Return the record that the writer would have stored for a run's checkpoint."""
    objects = {f"objects.{name}": value for name, value in manifest_.objects.items()}
    paths = {name: tuple(name.split(".", 1)) for name in (*manifest_.tensors, *objects)}
    return {"objects": objects, "opaque": {}, "paths": paths}
