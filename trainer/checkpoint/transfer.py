"""Copies and imports of checkpoints, with every block verified and the manifest written last."""

import secrets
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.checkpoint import manifest, shard, values
from trainer.checkpoint.commit import commit, deleted_unless_committed, readable_bytes
from trainer.checkpoint.lineage import MANIFEST
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.plan import DTYPE_NAMES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard_reader import DamagedError, ShardReader
from trainer.checkpoint.shard_writer import LiveTensors, write_shard
from trainer.errors import CheckpointError
from trainer.storage.store import AlreadyExists, Readable, Store, has_size

if TYPE_CHECKING:
    from trainer.importing.formats import Source  # a heavy import, needed for types only


def copy_shard(
    reader: ShardReader, file: str, target: Store, folder: str, manifest_: Manifest
) -> None:
    """Copy one shard. A file from an interrupted copy is reused if it passes verification."""
    key, total_bytes = f"{folder}/{file}", manifest_.files[file].bytes

    def write() -> None:
        with closing(reader.parts(file, target.part_bytes)) as parts:
            target.write(key, total_bytes, parts)

    try:
        write()
    except AlreadyExists:
        with suppress(DamagedError):
            Reader(target, folder, manifest_).verify([file])
            return
        target.delete([key])
        write()


def copy_checkpoint(
    source: Readable,
    folder: str,
    manifest_: Manifest,
    target: Store,
    target_folder: str,
    progress: Callable[[int], object] = lambda copied_bytes: None,
) -> None:
    """Copy a checkpoint. Committed and durable on return. One process.

    Args:
        source: store to copy from.
        folder: key of the checkpoint's folder in `source`.
        manifest_: the checkpoint's manifest.
        target: store to copy to.
        target_folder: key of the new folder.
        progress: called with the size of each copied file, in bytes.

    Raises:
        DamagedError: the source failed verification; nothing was committed.
        CheckpointError: the source was deleted, or another process writes to the same folder.
        AlreadyExists: the folder holds another checkpoint.
    """
    try:
        data = source.read(f"{folder}/{MANIFEST}")
    except FileNotFoundError:
        raise CheckpointError(f"{source.url}/{folder} was deleted during the copy") from None
    reader = ShardReader(source, folder, manifest_)
    for file, record in manifest_.files.items():
        copy_shard(reader, file, target, target_folder, manifest_)
        progress(record.bytes)
    for file, record in manifest_.files.items():  # concurrent copies may delete each other's files
        if not has_size(target, f"{target_folder}/{file}", record.bytes):
            raise CheckpointError(
                f"{target.url}/{target_folder}/{file} was changed during the copy, perhaps by "
                "another copy in progress. Nothing was committed; copy again"
            )
    commit(target, target_folder, data)


def import_checkpoint(
    source: "Source",
    target: Store,
    folder: str,
    *,
    step: int,
    progress: Callable[[int], object] = lambda written_bytes: None,
) -> Manifest:
    """Convert a checkpoint of another format. Committed and durable on return. One process.

    Tensors and other values keep their names, the values in the `dcp` object, so that
    `PerdureStorageReader` restores the original nesting. At most two tensors are in memory.

    Args:
        source: the checkpoint to convert.
        target: store to write to.
        folder: key of the new folder.
        step: recorded in the manifest.
        progress: called with the size of each tensor, in bytes.

    Raises:
        CheckpointError: a value cannot be read or stored; nothing was committed.
        AlreadyExists: the folder holds a checkpoint.
    """
    opaque = {name: value for name, value in source.objects.items() if type(value) is bytes}
    plain = {name: value for name, value in source.objects.items() if name not in opaque}
    for name, (dtype, _) in source.tensors.items():
        if dtype not in DTYPE_NAMES or not shard.is_key(name):
            raise CheckpointError(f"{source.url}: tensor {name!r} ({dtype}) cannot be stored")
    for name in filter(lambda name: not shard.is_key(name), opaque):
        raise CheckpointError(f"{source.url}: {name!r} cannot be stored under this name")
    sizes = {name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in source.tensors.items()}
    sizes |= {name: ("U8", (len(value),)) for name, value in opaque.items()}
    objects = {
        manifest.DCP_OBJECT: {
            "objects": values.decode(values.encode(plain, "objects")),
            "opaque": dict.fromkeys(opaque, "bytes"),
            "paths": {name: list(path) for name, path in source.paths.items()},
        }
    }

    @lru_cache(maxsize=2)
    def tensor_of(key: str) -> Tensor:
        if key in opaque:
            data = bytearray(opaque[key]) or bytearray(1)
            return torch.frombuffer(data, dtype=torch.uint8)[: len(opaque[key])]
        tensor = source.fetch(key)
        progress(tensor.nbytes)
        return tensor

    token = secrets.token_hex(4)
    name = manifest.shard_name(rank=0, world_size=1, token=token, save=1)
    stored = ((key, dtype, shape) for key, (dtype, shape) in sizes.items() if 0 not in shape)
    layout = shard.lay_out(stored)
    record = write_shard(target, f"{folder}/{name}", layout, LiveTensors(layout, tensor_of))
    entries: Mapping[str, Any] = {
        key: TensorEntry(dtype, shape, file=0) for key, (dtype, shape) in sizes.items()
    }
    aliases = {key: TensorEntry(alias=owner) for key, owner in source.aliases.items()}
    manifest_ = Manifest(
        step=step,
        epoch=0,
        samples=0,
        attempt=0,
        token=token,
        save=1,
        world_size=1,
        versions={"torch": torch.__version__},
        tensors={**entries, **aliases},
        files={name: record},
        objects=objects,
    )
    with deleted_unless_committed(target, [f"{folder}/{name}"]):
        commit(target, folder, readable_bytes(manifest_, f"{target.url}/{folder}"))
    return manifest_
