"""Our checkpoints as a storage of torch.distributed.checkpoint, for other people's loops.

    dcp.save(state_dict, storage_writer=PerdureStorageWriter("out/step-100"))
    dcp.load(state_dict, storage_reader=PerdureStorageReader("out/step-100"))

torch plans who holds what; the shards, their checksums, the commit and the reading are ours. What
is not a tensor is stored as JSON; bytes are stored as they are and never interpreted.
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
class _Place:
    """What a rank is told with its plan."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class _Stored:
    """What became of one item of a plan."""

    file: str = ""
    record: ShardFile | None = None
    dtype: str = ""
    """Set for tensors and opaque bytes."""
    box: Box = field(default_factory=lambda: Box((), ()))
    opaque: str = ""
    """A name in `_OPAQUE`, or `stream`: what the planner itself wrote, and will read."""
    value: Any = None
    """Of what is neither, encoded."""


class PerdureStorageWriter(StorageWriter):
    """Writes checkpoints in our format: committed by a manifest, every byte with a checksum.

    One checkpoint is one folder. It exists when `save` returns, or when the future of `async_save`
    is done, and is durable then; whatever dies before leaves files without a manifest, which the
    next save into that folder removes. A folder that holds a checkpoint is never written over.

    Args:
        checkpoint_id: the folder: a path, or a URL such as s3://bucket/run/step-100. `save` may
            give another one for each checkpoint.
        step: recorded in the manifest. None: the last number in the folder's name, or 0.
        settings: of object stores; None: the standard ways of AWS.

    Raises (wrapped in torch's CheckpointException, on all ranks):
        CheckpointError: the folder holds a checkpoint, or a value cannot be stored; its name and
            type are said, as nothing is pickled.
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
            raise ConfigError(f"step={step!r} is no number of a step")
        self.checkpoint_id = checkpoint_id
        self._step = step
        self._settings = settings or ObjectStore()
        self._saves = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint; every rank."""
        self.checkpoint_id = checkpoint_id or self.checkpoint_id
        self._saves += 1

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Open the store; every rank."""
        if kwargs.get("use_collectives") is False:
            raise CheckpointError(
                "use_collectives=False cannot be saved in this format: one manifest says what all "
                "ranks wrote, so they have to tell rank 0"
            )
        self._store, self._folder = location.split(_url(self.checkpoint_id), self._settings)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is; every rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuse a folder that is taken, and tell each rank who it is; rank 0."""
        names = self._store.entries(self._folder)
        if MANIFEST in names:
            raise CheckpointError(
                f"{self.checkpoint_id} holds a checkpoint already, which is never written over; "
                "give another folder, or delete that one"
            )
        location.check_no_checkpoints_inside(self._store, self._folder)
        return [
            dataclasses.replace(plan, storage_data=_Place(rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this rank's shard; every rank. Durable on return, and not committed."""
        place: _Place = plan.storage_data
        # a token of its own, as torch may keep the plan for other folders and later tries
        token = secrets.token_hex(4)
        name = manifest.shard_name(
            rank=place.rank, world_size=place.world_size, token=token, save=self._saves
        )
        tensors: dict[str, Tensor | WriteItem] = {}  # by key in the shard
        stored: list[tuple[WriteItem, str, _Stored]] = []
        for item in plan.items:
            data: Tensor | None = None
            if item.type is WriteItemType.BYTE_IO:
                key, found, data = item.index.fqn, *_object(item, planner)
            else:
                key, found = _tensor(item)
            if found.dtype and key in tensors:
                raise CheckpointError(f"two tensors of the state would both be stored as {key!r}")
            if found.dtype:
                tensors[key] = item if data is None else data
            stored.append((item, key, found))
        sizes = {key: (f.dtype, f.box.lengths) for _, key, f in stored if f.dtype}
        record = None
        if sizes:
            layout = shard.lay_out((key, *size) for key, size in sizes.items())

            def tensor_of(key: str) -> Tensor:
                held = tensors[key]
                return held if isinstance(held, Tensor) else _resolved(held, planner)

            file = self._store.open_new(f"{self._folder}/{name}", layout.total_bytes)
            record = write_shard(file, layout, LiveTensors(layout, tensor_of))
        results = []
        for item, _, found in stored:
            if found.dtype:
                found = dataclasses.replace(found, file=name, record=record)
            nbytes = prod(found.box.lengths) * shard.DTYPES.get(found.dtype, 0)
            results.append(WriteResult(item.index, nbytes, found))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks wrote; rank 0."""
        found = [
            (result.index, stored)
            for of_rank in results
            for result in of_rank
            if isinstance(stored := result.storage_data, _Stored)
        ]
        files = {s.file: s.record for _, s in found if s.record is not None}
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
            tensors=_entries(metadata, found, list(files)),
            files=files,
            objects={
                DCP_OBJECT: {
                    "objects": {i.fqn: s.value for i, s in found if not s.dtype},
                    "opaque": {i.fqn: s.opaque for i, s in found if s.opaque},
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
        """Return whether this may be the place of a checkpoint."""
        return bool(os.fspath(checkpoint_id))


class PerdureStorageReader(StorageReader):
    """Reads what `PerdureStorageWriter` wrote, and the checkpoints of our own runs.

    Every byte that is read is checked. Each rank reads what it holds, in any sharding and world
    size. Of a run's checkpoint the tensors are called as in its manifest: `model.…` as the model's
    own state_dict has them, `optimizer.<parameter>.<key>`; its other values are `objects.…`.

    Args:
        checkpoint_id: the folder of a checkpoint, or the directory of a run: its newest one.
        settings: of object stores; None: the standard ways of AWS.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointError: its manifest, or bytes of it, are damaged.
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
        """Turn to another checkpoint; every rank."""
        self.checkpoint_id = checkpoint_id or self.checkpoint_id

    def read_metadata(self) -> Metadata:  # ranks have none of their own
        """Read the manifest; every rank."""
        place = location.open_location(_url(self.checkpoint_id), self._settings)
        found = select.pick(place, "latest")
        self._manifest = place.manifest(found)
        self._reader = Reader(place.store, found.folder, self._manifest)
        self._extra = _extra(self._manifest, f"{place.store.url}/{found.folder}")
        self._what = (found.folder, self._manifest.token, self._manifest.save)
        opaque, objects = self._extra["opaque"], self._extra["objects"]
        known: dict[str, STORAGE_TYPES] = {
            name: _storage(self._manifest, name) for name in self._manifest.tensors
        }
        known |= {name: BytesStorageMetadata() for name in (*opaque, *objects)}
        paths = {name: tuple(path) for name, path in self._extra["paths"].items()}
        return Metadata(known, planner_data=paths)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is left to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which checkpoint this rank found; every rank."""
        return dataclasses.replace(plan, storage_data=self._what)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse ranks that found different ones; rank 0."""
        for rank, plan in enumerate(plans):
            if plan.storage_data != plans[0].storage_data:
                raise CheckpointError(
                    f"rank {rank} found {plan.storage_data[0]} in {self.checkpoint_id}, rank 0 "
                    f"{plans[0].storage_data[0]}; name one checkpoint's folder"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Fill this rank's tensors, and hand over the other values; every rank."""
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        wanted = []
        for item, target in zip(tensors, targets, strict=True):
            index = item.storage_index
            starts = index.offset or (0,) * target.ndim
            offsets = (s + o for s, o in zip(starts, item.storage_offsets, strict=True))
            wanted.append((index.fqn, Box(tuple(offsets), tuple(item.lengths)), target))
        self._reader.read_boxes(wanted)
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._stream(item.storage_index.fqn, planner))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stream(self, name: str, planner: LoadPlanner) -> io.BytesIO:
        """Return a value as torch's planners want it: as a stream which they unpickle.

        It has just been made, from JSON or bytes. What another planner wrote itself is handed back
        as it came, but only to a planner that does not unpickle it as torch's own would.
        """
        kind = self._extra["opaque"].get(name)
        if kind is None:
            value = self._extra["objects"][name]
        else:
            data = self._reader.fetch(name).numpy().tobytes()
            if kind == "stream":
                if getattr(type(planner), "load_bytes", None) is DefaultLoadPlanner.load_bytes:
                    raise CheckpointError(
                        f"{name!r} was written by a planner in a form of its own; torch's planner "
                        "would unpickle it, which could run anything. Load it with that planner's "
                        "own load_bytes"
                    )
                return io.BytesIO(data)
            value = _OPAQUE[kind](data)
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        return stream

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this may be the place of a checkpoint."""
        return bool(os.fspath(checkpoint_id))


def _url(checkpoint_id: str | os.PathLike[str] | None) -> str:
    if not checkpoint_id:
        raise ConfigError("a checkpoint_id is needed: the folder of the checkpoint")
    return os.fspath(checkpoint_id)


# --- writing -----------------------------------------------------------------------------------


def _tensor(item: WriteItem) -> tuple[str, _Stored]:
    """Return the key in the shard of what an item holds of a tensor, and what to record of it."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None  # noqa: S101 (for the type checker)
    dtype = DTYPE_NAMES.get(data.properties.dtype)
    if dtype is None or name == shard.METADATA:
        raise CheckpointError(f"tensor {name!r} ({data.properties.dtype}) cannot be stored")
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    is_whole = box.lengths == tuple(data.size)
    return shard.part_key(name, None if is_whole else box.offsets), _Stored(dtype=dtype, box=box)


def _resolved(item: WriteItem, planner: SavePlanner) -> Tensor:
    tensor = planner.resolve_data(item)
    data = item.tensor_data
    assert isinstance(tensor, Tensor)  # noqa: S101 (the planner's promise)
    assert data is not None  # noqa: S101 (for the type checker)
    wanted = (data.properties.dtype, data.chunk.sizes)
    if (tensor.dtype, tensor.shape) != wanted:
        raise CheckpointError(
            f"tensor {item.index.fqn!r} was planned as {wanted[0]} {list(wanted[1])} and is "
            f"{tensor.dtype} {list(tensor.shape)}; tensors must not change while they are saved"
        )
    return tensor


def _object(item: WriteItem, planner: SavePlanner) -> tuple[_Stored, Tensor | None]:
    """Return what to record of a value that is no tensor, and its bytes if it is opaque."""
    name = item.index.fqn
    raw = _raw(planner)
    if raw is None:  # a planner with a form of its own reads it back itself
        written = planner.resolve_data(item)
        assert isinstance(written, io.BytesIO)  # noqa: S101 (the planner's promise)
        return _opaque("stream", written.getbuffer())
    value = raw.lookup_object(item.index)
    if type(value) in (bytes, bytearray):
        return _opaque(type(value).__name__, value)
    if type(value) is io.BytesIO:
        return _opaque("BytesIO", value.getbuffer())
    return _Stored(value=values.decode(values.encode(value, name))), None


def _raw(planner: SavePlanner) -> DefaultSavePlanner | None:
    """Return the planner if it pickles values just as torch's own does."""
    if not isinstance(planner, DefaultSavePlanner):
        return None
    kind = type(planner)
    overridden = kind.resolve_data is not DefaultSavePlanner.resolve_data or (
        kind.transform_object is not DefaultSavePlanner.transform_object
    )
    return None if overridden else planner


def _opaque(kind: str, data: Any) -> tuple[_Stored, Tensor]:
    tensor = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return _Stored(dtype="U8", box=Box((0,), (len(data),)), opaque=kind), tensor


def _entries(
    metadata: Metadata, found: Sequence[tuple[MetadataIndex, _Stored]], files: list[str]
) -> dict[str, TensorEntry]:
    numbers = {file: number for number, file in enumerate(files)}
    parts: dict[str, list[tuple[int, Box]]] = {}
    dtypes: dict[str, str] = {}
    for index, stored in found:
        if stored.dtype:
            parts.setdefault(index.fqn, []).append((numbers[stored.file], stored.box))
            dtypes[index.fqn] = stored.dtype
    entries = {}
    for name, boxes in parts.items():
        known = metadata.state_dict_metadata[name]
        shape = boxes[0][1].lengths
        if isinstance(known, TensorStorageMetadata):
            shape = tuple(known.size)
        entry = TensorEntry(dtypes[name], shape)
        entries[name] = _even(entry, boxes) or columns(entry, boxes)
    return entries


def _even(entry: TensorEntry, boxes: Sequence[tuple[int, Box]]) -> TensorEntry | None:
    """Return the entry as an even sharding over the first files, if its parts are one."""
    pieces = [len({box.offsets[axis] for _, box in boxes}) for axis in range(len(entry.shape))]
    even = dataclasses.replace(entry, grid=tuple(pieces))
    if len(boxes) < 2 or prod(pieces) != len(boxes):
        return None
    cells = [(number, even.cell(number)) for number in range(len(boxes))]
    return even if cells == list(boxes) else None


# --- reading -----------------------------------------------------------------------------------


def _storage(found: Manifest, name: str) -> TensorStorageMetadata:
    entry = found.resolve(name)
    chunks = [
        ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths))
        for _, box in entry.boxes(list(found.files), Box.full(entry.shape))
    ]
    properties = TensorProperties(dtype=TORCH_DTYPES[entry.dtype])
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def _extra(found: Manifest, where: str) -> Mapping[str, Any]:
    """Return what the writer above has recorded, or would have, of a checkpoint of a run.

    Raises:
        CheckpointError: it is malformed.
    """
    extra = found.objects.get(DCP_OBJECT)
    if extra is None:
        return _extra_of_run(found)
    try:
        whole = all(
            type(extra[key]) is dict and all(type(name) is str for name in extra[key])
            for key in ("objects", "opaque", "paths")
        )
        whole = whole and set(extra["opaque"].values()) <= {*_OPAQUE, "stream"}
        whole = whole and extra["opaque"].keys() <= found.tensors.keys()
        whole = whole and all(
            type(path) is list and all(type(key) in (str, int) for key in path)
            for path in extra["paths"].values()
        )
    except (LookupError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{where}: objects.{DCP_OBJECT} of its manifest is malformed")
    return extra  # type: ignore[no-any-return]


def _extra_of_run(found: Manifest) -> Mapping[str, Any]:
    """Return, of a checkpoint of a run, what the writer above would have recorded."""
    objects = {f"objects.{name}": value for name, value in found.objects.items()}
    paths = {name: tuple(name.split(".", 1)) for name in (*found.tensors, *objects)}
    return {"objects": objects, "opaque": {}, "paths": paths}
