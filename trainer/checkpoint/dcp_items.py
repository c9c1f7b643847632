"""Items of torch's save plans: their keys and records in a shard, and the manifest's entries."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from trainer.checkpoint import shard, values
from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import ShardFile, TensorEntry
from trainer.checkpoint.plan import DTYPE_NAMES, divided
from trainer.errors import CheckpointError

OPAQUE = {"bytes": bytes, "bytearray": bytearray, "BytesIO": io.BytesIO}
"""Types of values whose bytes are stored unchanged, by name."""


@dataclass(frozen=True)
class ItemRecord:
    """Result of writing one item of a plan."""

    file: str = ""
    record: ShardFile | None = None
    dtype: str = ""
    """Set for tensors and opaque bytes."""
    box: Box = field(default_factory=lambda: Box((), ()))
    opaque: str = ""
    """A key of `OPAQUE`, or `stream` for data in the planner's private format."""
    value: Any = None
    """Encoded value, if neither a tensor nor opaque."""

    @property
    def is_stored(self) -> bool:
        """The item has bytes in the shard."""
        return bool(self.dtype) and self.box.elements > 0


def check_storable(item: WriteItem) -> None:
    """Check name and dtype of an item.

    Raises:
        CheckpointError: it cannot be stored.
    """
    name, data = item.index.fqn, item.tensor_data
    dtype = None if data is None else data.properties.dtype
    if not shard.is_key(name) or (data is not None and dtype not in DTYPE_NAMES):
        raise CheckpointError(f"{name!r} ({dtype}) cannot be stored: unsupported name or dtype")


def tensor_record(item: WriteItem) -> tuple[str, ItemRecord]:
    """Return a tensor's key in the shard, and its record; it was checked before."""
    name, data = item.index.fqn, item.tensor_data
    assert data is not None  # noqa: S101 (for the type checker)
    dtype = DTYPE_NAMES[data.properties.dtype]
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    is_complete = box.lengths == tuple(data.size)
    return shard.part_key(name, None if is_complete else box.offsets), ItemRecord(
        dtype=dtype, box=box
    )


def resolved(item: WriteItem, planner: SavePlanner) -> Tensor:
    """Return an item's tensor.

    Raises:
        CheckpointError: its shape or dtype is not the planned one.
    """
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


def object_record(item: WriteItem, planner: SavePlanner) -> tuple[ItemRecord, Tensor | None]:
    """Return the record of a value that is not a tensor, and its bytes if it is opaque.

    Raises:
        CheckpointError: its type cannot be stored without pickling.
    """
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
    return ItemRecord(value=values.decode(values.encode(value, name))), None


def _raw(planner: SavePlanner) -> DefaultSavePlanner | None:
    """Return the planner if it pickles values as torch's default planner does, else None."""
    if not isinstance(planner, DefaultSavePlanner):
        return None
    kind = type(planner)
    overridden = kind.resolve_data is not DefaultSavePlanner.resolve_data or (
        kind.transform_object is not DefaultSavePlanner.transform_object
    )
    return None if overridden else planner


def _opaque(kind: str, data: Any) -> tuple[ItemRecord, Tensor]:
    tensor = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return ItemRecord(dtype="U8", box=Box((0,), (len(data),)), opaque=kind), tensor


def tensor_entries(
    metadata: Metadata, items: Sequence[tuple[MetadataIndex, ItemRecord]], files: list[str]
) -> dict[str, TensorEntry]:
    """Return the manifest's tensors.

    Args:
        metadata: torch's metadata of the save, for the complete shapes.
        items: the written items of all ranks.
        files: names of the shards, in the manifest's order.
    """
    numbers = {file: number for number, file in enumerate(files)}
    parts: dict[str, list[tuple[int, Box]]] = {}
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for index, record in items:
        if record.dtype:
            declared = metadata.state_dict_metadata[index.fqn]
            shapes[index.fqn] = record.box.lengths
            if isinstance(declared, TensorStorageMetadata):
                shapes[index.fqn] = tuple(declared.size)
            dtypes[index.fqn] = record.dtype
            boxes = parts.setdefault(index.fqn, [])
            if record.is_stored:
                boxes.append((numbers[record.file], record.box))
    return {
        name: divided(TensorEntry(dtypes[name], shapes[name]), boxes)
        for name, boxes in parts.items()
    }
