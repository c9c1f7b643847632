"""Read torch's pickles without executing code from them.

A pickle is a program. torch.load executes no code with `weights_only=True`. torch itself reads the
`.metadata` of a DCP folder with plain pickle. Here, an unpickler creates only inert records for
the names in an allow-list.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor

from trainer.errors import CheckpointError, StoreError
from trainer.importing import numpy_values

_HEAD_BYTES = 4096


class UnsafePickleError(CheckpointError):
    """A pickle needs a class or function that is not on the allow-list."""


# --- torch.save --------------------------------------------------------------------------------


def load(
    file: str | io.BytesIO,
    where: str,
    *,
    mmap: bool = False,
    on_pickle: Callable[[str], None] | None = None,
) -> Any:
    """Load a torch.save file.

    Args:
        file: a path, or bytes.
        where: name of the file, for errors.
        mmap: memory-map the tensors.
        on_pickle: called with a warning before a pickle with other than tensors and plain values
            is executed; default: raise instead.

    Raises:
        UnsafePickleError: the file needs more than tensors and plain values.
        CheckpointError: the file is damaged, or has another format.
        StoreError: the file cannot be read.
    """
    if isinstance(file, str) and _is_program(file):
        raise CheckpointError(
            f"{where} is a program (TorchScript or torch.export), but only weights are supported: "
            "save the state dict of the original model"
        )
    try:
        with torch.serialization.safe_globals(numpy_values.STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        request = re.search(r"GLOBAL (\S+)", str(error)) or re.search(
            r"(Unsupported \w+ [^\s.]+|Trying to \w+ unsupported [^\n.]+)", str(error)
        )
        name = request[1] if request else "more than tensors and plain values"
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
    except Exception as error:  # altered bytes may fail in any way
        raise CheckpointError(f"{where} cannot be read: {_first_line(error)}") from None
    if on_pickle is not None:
        on_pickle(
            f"warning: {where} needs {name}; loading it as a pickle, which executes any code in it"
        )
        return _run(file, where, mmap=mmap)
    if isinstance(file, str) and _first_global(file) == name:
        raise UnsafePickleError(
            f"{where} is a pickled {name}, not a dict of tensors; loading it executes any code in "
            "it. In a script of yours, load it and save only its weights: "
            "torch.save(model.state_dict(), path)"
        )
    raise UnsafePickleError(
        f"{where} needs {name}, which could execute any code. In a script of yours, load it and "
        "torch.save a dict of plain tensors and values"
    )


def _run(file: str | io.BytesIO, where: str, *, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{where} cannot be loaded: {_first_line(error)}. The code that the file was "
            "saved with must be on Python's path"
        ) from None
    except Exception as error:  # the pickle may raise anything
        raise CheckpointError(f"{where} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].partition(". In PyTorch")[0]


def _is_program(path: str) -> bool:
    with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return any(name.endswith(("/constants.pkl", "/archive_format")) for name in names)
    return False


def _first_global(path: str) -> str:
    """Return the class or function that a pickle starts with, or "". Executes nothing."""
    with suppress(Exception), zipfile.ZipFile(path) as archive:  # any content
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as file:
            operations = pickletools.genops(file.read(_HEAD_BYTES))
            first = next(item for item in operations if item[0].name != "PROTO")
        if first[0].name == "GLOBAL":
            return str(first[1]).replace(" ", ".")
    return ""


def check_plain(tensor: Any, where: str) -> None:
    """Check that a value is a plain, dense CPU tensor.

    Raises:
        CheckpointError: the value is sparse, quantized, nested, without data, or not a tensor.
    """
    kind = ""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        is_numpy = isinstance(tensor, numpy_values.NumPyRecord)
        kind = "a NumPy array" if is_numpy else f"a {type(tensor).__name__}"
    elif tensor.is_nested:
        kind = "a nested tensor"
    elif tensor.is_quantized:
        kind = "a quantized tensor"
    elif tensor.layout != torch.strided:
        kind = f"a sparse tensor ({tensor.layout})"
    elif tensor.device.type != "cpu":
        kind = "a tensor without data"
    if kind:
        raise CheckpointError(f"{where} is {kind}; only plain, dense tensors are supported")


def plain(tensor: Tensor) -> Tensor:
    """Return a dense tensor as contiguous; without a copy if possible."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


# --- .metadata of DCP folders ------------------------------------------------------------------


class _Sealed(type):
    """Metaclass whose classes reject attributes; a pickle can set attributes of classes."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"the pickle sets {name} of a class")


class Record(metaclass=_Sealed):
    """Placeholder for an instance of any class, with the pickled attributes; others are None."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __getattr__(self, name: str) -> Any:
        return None


class Index(Record):
    """Placeholder for a MetadataIndex, which is hashable."""

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


_DCP = "torch.distributed.checkpoint"
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (f"{_DCP}.metadata", name): Record
        for name in (
            "Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{_DCP}.metadata", "MetadataIndex"): Index,
    (f"{_DCP}.filesystem", "_StorageInfo"): Record,
    # names in torch 2.0 to 2.2
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "getattr"): Record,  # some Python versions pickle Enum members with it
    **{(module, name): Record for module in ("pathlib", "pathlib._local") for name in _PATHS},
}  # fmt: skip
"""Placeholder for each allowed name, in addition to torch's dtypes, layouts, memory formats."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return the placeholder for a name; imports nothing."""
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return value
        raise UnsafePickleError(
            f"{self._where} needs {module}.{name}, which no DCP folder needs; it could "
            "execute any code, so nothing was read"
        )


def metadata(data: bytes, where: str) -> Record:
    """Read a `.metadata` file; the record's values are not validated.

    Raises:
        UnsafePickleError: the file needs a name that is not on the allow-list.
        CheckpointError: the file is damaged.
    """
    try:
        record = _Unpickler(data, where).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # altered bytes may fail in any way
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{where} cannot be read ({text}); it was altered or truncated"
        ) from None
    if not isinstance(record, Record):
        raise CheckpointError(f"{where} is a {type(record).__name__}, not checkpoint metadata")
    return record
