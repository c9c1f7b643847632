"""What torch pickled, read without running any of it.

A pickle is a program. torch.load runs none with `weights_only=True`. The `.metadata` of a DCP
folder, which torch itself reads with plain pickle, is read here by an unpickler that makes nothing
but inert records, and only for the names that belong there: all of them stand in this file.
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

_HEAD_BYTES = 4096


class UnsafePickleError(CheckpointError):
    """A pickle asks for something that is not made for it."""


# --- torch.save --------------------------------------------------------------------------------


def load(
    file: str | io.BytesIO,
    where: str,
    *,
    mmap: bool = False,
    on_pickle: Callable[[str], None] | None = None,
) -> Any:
    """Load what torch.save wrote.

    Args:
        file: a path, or bytes.
        where: names it in errors.
        mmap: map its tensors rather than reading them.
        on_pickle: where the file asks for more than tensors and plain values, called with a warning
            before whatever is pickled in it is run. Without it that is refused.

    Raises:
        UnsafePickleError: it asks for more than tensors and plain values.
        CheckpointError: it is damaged, or something else.
        StoreError: it could not be read.
    """
    if isinstance(file, str) and _is_program(file):
        raise CheckpointError(
            f"{where} is a program (TorchScript or torch.export); only weights are read: save "
            "those of the model that it was made of"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error)) or re.search(
            r"(Unsupported \w+ [^\s.]+|Trying to \w+ unsupported [^\n.]+)", str(error)
        )
        what = asked[1] if asked else "more than tensors and plain values"
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
    except Exception as error:  # altered bytes may fail in any way
        raise CheckpointError(f"{where} cannot be read: {_first_line(error)}") from None
    if on_pickle is not None:
        on_pickle(
            f"WARNING: {where} asks for {what}; it is now loaded as a pickle, which runs any code "
            "that is in it"
        )
        return _run(file, where, mmap=mmap)
    if isinstance(file, str) and _first_global(file) == what:
        raise UnsafePickleError(
            f"{where} is a whole pickled {what} and no dict of tensors; loading it runs any code "
            "that is in it. In a script that you trust, load it and save its weights alone: "
            "torch.save(model.state_dict(), path)"
        )
    raise UnsafePickleError(
        f"{where} asks for {what}, which is not made for it, as that could run anything. In a "
        "script that you trust, load it and torch.save a dict of plain tensors and values"
    )


def _run(file: str | io.BytesIO, where: str, *, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error.strerror or error}") from None
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{where} cannot be loaded: {_first_line(error)}. The code that it was made with has "
            "to be on Python's path"
        ) from None
    except Exception as error:  # it runs anything
        raise CheckpointError(f"{where} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].partition(". In PyTorch")[0]


def _is_program(path: str) -> bool:
    with suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return any(name.endswith(("/constants.pkl", "/archive_format")) for name in names)
    return False


def _first_global(path: str) -> str:
    """Return the class or function with which a pickle begins, if it begins with one.

    Nothing is run. A dict begins otherwise.
    """
    with suppress(Exception), zipfile.ZipFile(path) as archive:  # it may be anything
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as file:
            operations = pickletools.genops(file.read(_HEAD_BYTES))
            first = next(found for found in operations if found[0].name != "PROTO")
        if first[0].name == "GLOBAL":
            return str(first[1]).replace(" ", ".")
    return ""


def check_plain(tensor: Any, where: str) -> None:
    """Refuse what is not simply a block of numbers in this machine's memory.

    Raises:
        CheckpointError: it is sparse, quantized, nested, without data, or no tensor.
    """
    what = ""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"a {type(tensor).__name__}"
    elif tensor.is_nested:
        what = "a nested tensor"
    elif tensor.is_quantized:
        what = "a quantized tensor"
    elif tensor.layout != torch.strided:
        what = f"a sparse tensor ({tensor.layout})"
    elif tensor.device.type != "cpu":
        what = "a tensor without data"
    if what:
        raise CheckpointError(f"{where} is {what}; only plain, dense tensors are read: save it so")


def plain(tensor: Tensor) -> Tensor:
    """Return a dense tensor contiguous; itself, where it is."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


# --- the metadata of a DCP folder --------------------------------------------------------------


class _Sealed(type):
    """A pickle can set attributes of whatever it names, a class too; not of these."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class Record(metaclass=_Sealed):
    """Stands for an instance of any class: has the attributes that the pickle says, or None."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __getattr__(self, name: str) -> Any:
        return None


class Index(Record):
    """Stands for a MetadataIndex, which is the key of a dict."""

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


_DCP = "torch.distributed.checkpoint"
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (f"{_DCP}.metadata", name): Record
        for name in (
            "Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{_DCP}.metadata", "MetadataIndex"): Index,
    (f"{_DCP}.filesystem", "_StorageInfo"): Record,
    # torch 2.0 to 2.2 took these from elsewhere
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "getattr"): Record,  # some Pythons pickle the member of an Enum with it
    **{(module, name): Record for module in ("pathlib", "pathlib._local") for name in _PATHS},
}  # fmt: skip
"""What is made for a name in `.metadata`; torch's dtypes, layouts and memory formats besides."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; nothing is imported."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise UnsafePickleError(
            f"{self._where} asks for {module}.{name}, which no DCP folder needs and which could "
            "run anything; nothing of it is read"
        )


def metadata(data: bytes, where: str) -> Record:
    """Read a `.metadata` file; what the record holds is as its writer had it, and unchecked.

    Raises:
        UnsafePickleError: it asks for something that does not belong in it.
        CheckpointError: it is damaged.
    """
    try:
        found = _Unpickler(data, where).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # altered bytes may fail in any way
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{where} cannot be read ({text}); it was altered or cut short"
        ) from None
    if not isinstance(found, Record):
        raise CheckpointError(
            f"{where} is no metadata of a checkpoint but a {type(found).__name__}"
        )
    return found
