"""Open checkpoints of other programs: DCP, torch.save, safetensors and OneFlow."""

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
_TORCH_INDEX = "pytorch_model.bin.index.json"
_SUFFIX = ".safetensors"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First pickled value of torch.save files in the format before zip archives."""

Kind = tuple[torch.dtype, tuple[int, ...]]
Where = tuple[str | int, ...]


class Source(Protocol):
    """A stored nested state dict whose tensors are fetched one at a time."""

    @property
    def url(self) -> str:
        """URL of the file or folder."""

    @property
    def kind(self) -> str:
        """Description of the format."""

    @property
    def tensors(self) -> Mapping[str, Kind]:
        """Dtype and shape of every tensor, by dotted name; shared storage appears once."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Additional names, each with the name in `tensors` that has its storage."""

    @property
    def paths(self) -> Mapping[str, Where]:
        """Keys and indexes that lead to each value, tensor or not, in the nested state dict."""

    @property
    def objects(self) -> Mapping[str, Any]:
        """Other values, by dotted name; bytes for values of unknown types."""

    def fetch(self, name: str) -> Tensor:
        """Return a complete, contiguous CPU tensor; its memory may be a mapped file.

        Raises:
            CheckpointError: no tensor has that name, or its bytes are damaged.
        """


def open_external(
    url: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    on_pickle: Callable[[str], None] | None = None,
) -> Source | None:
    """Open a file or folder of a supported external format; return None for anything else.

    A remote file is downloaded to the folder for temporary files. Of a remote DCP or OneFlow
    folder, only the requested tensors are read.

    Args:
        url: the path.
        settings: object store settings.
        on_pickle: called with a warning before a pickle is executed; default: never execute one.

    Raises:
        CheckpointError: the file is damaged, or has content that is never read.
        StoreError: the store failed.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if MANIFEST in names or any(is_shard_name(name) for name in names):
        return None  # a Perdure checkpoint, committed or not
    if dcp_folder.METADATA in names:
        return dcp_folder.DcpFolder(url, store)
    if _INDEX in names:
        names = _indexed(store, _INDEX)
    files = [name for name in names if name.endswith(_SUFFIX)]
    if files:
        return _Safetensors(url, "a folder of safetensors files", files, settings)
    if _TORCH_INDEX in names:
        return TorchFile(url, settings, files=_indexed(store, _TORCH_INDEX))
    if oneflow.is_folder(store, names):
        return oneflow.OneflowFolder(url, store, names)
    return None if names else _open_file(url, settings, on_pickle)


def _open_file(
    url: str, settings: ObjectStore, on_pickle: Callable[[str], None] | None
) -> Source | None:
    parent, _, name = url.removeprefix("file://").rpartition("/")
    if not name or parent.endswith(":/"):
        return None  # the root of a file system or bucket
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
        return TorchFile(url, settings, on_pickle=on_pickle)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _Safetensors(url, "a safetensors file", [""], settings)
    return None


# --- safetensors -------------------------------------------------------------------------------


def _indexed(store: Store, index: str) -> list[str]:
    """Return the file names in a folder's index."""
    where = f"{store.url}/{index}"
    try:
        files = set(json.loads(store.read(index))["weight_map"].values())
        return sorted(dcp_folder.relative_path(file, where) for file in files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not an index of weight files: {error}") from None


class _Safetensors:
    """Single safetensors file, or a Hugging Face folder of them."""

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
                f"{where} is one rank's shard of a checkpoint; consolidate the shards first, with "
                "torch.distributed.checkpoint's consolidate_safetensors_files"
            )
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in self._files:
                raise CheckpointError(
                    f"{where} and another file in that folder both have {name!r}; pass one file"
                )
            view = file.get_slice(name)
            dtype = TORCH_DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{where}: {name!r} has the unsupported dtype {view.get_dtype()}"
                )
            self.tensors[name] = (dtype, tuple(view.get_shape()))
            self._files[name] = file
        # safetensors.torch.save_model records omitted shared tensors here
        self.aliases |= {
            name: owner
            for name, owner in metadata.items()
            if owner in self._files and name not in self._files
        }

    def fetch(self, name: str) -> Tensor:
        """Return a tensor; its memory is the mapped file."""
        owner = self.aliases.get(name, name)
        if owner not in self._files:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        tensor: Tensor = self._files[owner].get_tensor(owner)
        return pickles.plain(tensor)
