"""Manifests as metadata of torch.distributed.checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from trainer.checkpoint.box import Box
from trainer.checkpoint.dcp_items import OPAQUE
from trainer.checkpoint.manifest import DCP_OBJECT, Manifest
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.errors import CheckpointError


def metadata_of(manifest_: Manifest, others: Mapping[str, Any]) -> Metadata:
    """Return torch's metadata of a checkpoint.

    Args:
        manifest_: the checkpoint's manifest.
        others: its `other_values`.
    """
    entries: dict[str, STORAGE_TYPES] = {
        name: _storage(manifest_, name) for name in manifest_.tensors
    }
    entries |= {name: BytesStorageMetadata() for name in (*others["opaque"], *others["objects"])}
    paths = {name: tuple(path) for name, path in others["paths"].items()}
    return Metadata(entries, planner_data=paths)


def _storage(manifest_: Manifest, name: str) -> TensorStorageMetadata:
    entry = manifest_.resolve(name)
    chunks = [
        ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths))
        for _, box in entry.boxes(list(manifest_.files), Box.full(entry.shape))
    ]
    properties = TensorProperties(dtype=TORCH_DTYPES[entry.dtype])
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


def other_values(manifest_: Manifest, where: str) -> Mapping[str, Any]:
    """Return the writer's record of values that are not tensors, or derive it for a run.

    Its keys are `objects` (values by name), `opaque` (types of stored bytes by name) and `paths`
    (keys in the nested state by name).

    Raises:
        CheckpointError: it is malformed.
    """
    extra = manifest_.objects.get(DCP_OBJECT)
    if extra is None:
        return _values_of_run(manifest_)
    try:
        is_valid = all(
            type(extra[key]) is dict and all(type(name) is str for name in extra[key])
            for key in ("objects", "opaque", "paths")
        )
        is_valid = is_valid and set(extra["opaque"].values()) <= {*OPAQUE, "stream"}
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


def _values_of_run(manifest_: Manifest) -> Mapping[str, Any]:
    """Return the record that the writer would have stored for a run's checkpoint."""
    objects = {f"objects.{name}": value for name, value in manifest_.objects.items()}
    paths = {name: tuple(name.split(".", 1)) for name in (*manifest_.tensors, *objects)}
    return {"objects": objects, "opaque": {}, "paths": paths}
