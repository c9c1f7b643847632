"""Checkpoints of others, tensor by tensor: torch's, safetensors, OneFlow's."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.checkpoint.lineage import MANIFEST
from trainer.checkpoint.manifest import is_shard_name
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError, StoreError
from trainer.importing import dcp_folder, oneflow, pickles
from trainer.importing.torch_file import TorchFile
from trainer.storage import Store, local_path, open_store
from trainer.storage.transfer import local_file

_INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that torch.save began its files with before they were zip archives, pickled."""

Kind = tuple[torch.dtype, tuple[int, ...]]
Where = tuple[str | int, ...]


class Source(Protocol):
    """A nested state dict that lies somewhere, its tensors fetched one at a time."""

    @property
    def url(self) -> str:
        """Where it lies."""

    @property
    def kind(self) -> str:
        """What it is, in words for people."""

    @property
    def tensors(self) -> Mapping[str, Kind]:
        """Dtype and shape of every tensor by dotted name; shared storage once."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of tensors, each with the name in `tensors` whose storage it shares."""

    @property
    def paths(self) -> Mapping[str, Where]:
        """Keys and indexes that lead to each value, tensor or not, in the nested state dict."""

    @property
    def objects(self) -> Mapping[str, Any]:
        """Values that are no tensors, by dotted name; bytes where one cannot be known."""

    def fetch(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU, contiguous; its memory may be a mapped file.

        Raises:
            CheckpointError: there is none of that name, or its bytes are not what they have to be.
        """


def open_external(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    on_pickle: Callable[[str], None] | None = None,
) -> Source | None:
    """Open what other programs wrote; None where there is nothing that is known here.

    A remote file is downloaded whole, into the folder for temporary files; of a DCP or OneFlow
    folder only what is asked for is read.

    Args:
        url: of it.
        settings: of object stores.
        on_pickle: called with a warning before a pickle is run; without it none is.

    Raises:
        CheckpointError: it is known, and damaged, or holds what is never read.
        StoreError: it could not be read.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if MANIFEST in names or any(is_shard_name(name) for name in names):
        return None  # ours, committed or not
    if dcp_folder.METADATA in names:
        return dcp_folder.DcpFolder(url, store)
    if _INDEX in names:
        names = _indexed(store)
    files = [name for name in names if name.endswith(_SUFFIX)]
    if files:
        return _Safetensors(url, "a folder of safetensors files", files, settings)
    if oneflow.is_folder(store, names):
        return oneflow.OneflowFolder(url, store, names)
    return None if names else _open_file(url, settings, on_pickle)


def _open_file(
    url: str, settings: ObjectStore, on_pickle: Callable[[str], None] | None
) -> Source | None:
    parent, _, name = url.removeprefix("file://").rpartition("/")
    if not name or parent.endswith(":/"):
        return None  # a file system's root, or a bucket
    store = open_store(parent or ("/" if url.startswith("/") else "."), settings)
    if (path := local_path(url)) is not None and not path.is_file():
        return None
    try:
        size = store.size(name)
        head = bytearray(min(size, 32))
        store.read_into(name, 0, memoryview(head))
    except FileNotFoundError:
        return None
    if head.startswith(_ZIP) or _LEGACY in head:
        is_zip = head.startswith(_ZIP)
        return TorchFile(url, settings, is_zip=is_zip, on_pickle=on_pickle)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _Safetensors(url, "a safetensors file", [""], settings)
    return None


# --- safetensors -------------------------------------------------------------------------------


def _indexed(store: Store) -> list[str]:
    """Return the files that the index of a folder names."""
    where = f"{store.url}/{_INDEX}"
    try:
        files = set(json.loads(store.read(_INDEX))["weight_map"].values())
        return sorted(dcp_folder.inside(file, where) for file in files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not an index of safetensors files: {error}") from None


class _Safetensors:
    """One file, or those of a folder, as Hugging Face lays them out."""

    def __init__(self, url: str, kind: str, files: Sequence[str], settings: ObjectStore) -> None:
        from safetensors import SafetensorError, safe_open

        self.url, self.kind = url, kind
        self.tensors: dict[str, Kind] = {}
        self.aliases: dict[str, str] = {}
        self.objects: dict[str, Any] = {}
        self._files: dict[str, Any] = {}
        for name in files:
            where = f"{url}/{name}" if name else url
            try:
                with local_file(where, settings) as path:
                    file = safe_open(path, "pt")
                self._add(file, where)
            except SafetensorError as error:
                raise CheckpointError(f"{where} cannot be read: {error}") from None
            except FileNotFoundError:
                raise CheckpointError(f"{where} is missing") from None
            except OSError as error:
                raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
        self.paths: dict[str, Where] = {name: (name,) for name in (*self.tensors, *self.aliases)}

    def _add(self, file: Any, where: str) -> None:
        metadata = file.metadata() or {}
        if "DCP_SHARDING_INFO" in metadata and Path(where).name.startswith("shard-"):
            raise CheckpointError(
                f"{where} is one rank's part of a checkpoint; put the parts together first, with "
                "torch.distributed.checkpoint's consolidate_safetensors_files"
            )
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            if name in self._files:
                raise CheckpointError(
                    f"{where} and another file of that folder both hold {name!r}; give the file "
                    "that is meant"
                )
            found = file.get_slice(name)
            dtype = TORCH_DTYPES.get(found.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{where}: {name!r} is {found.get_dtype()}, an unknown dtype")
            self.tensors[name] = (dtype, tuple(found.get_shape()))
            self._files[name] = file
        # safetensors.torch.save_model notes here what it left out
        self.aliases |= {
            name: owner
            for name, owner in metadata.items()
            if owner in self._files and name not in self._files
        }

    def fetch(self, name: str) -> Tensor:
        """Return the tensor as it is mapped."""
        owner = self.aliases.get(name, name)
        if owner not in self._files:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        found: Tensor = self._files[owner].get_tensor(owner)
        return pickles.plain(found)
