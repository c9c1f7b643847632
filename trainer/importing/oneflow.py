"""Read OneFlow folders: one subfolder per variable, with its data and metadata.

`NAME/out` has the elements, little-endian, in C order. `NAME/meta` is the text form of a protobuf
message VariableMetaInfo: `shape { dim: 64 dim: 784 } data_type: kFloat`. An empty `snapshot_done`
is written last. Grammar of the text form: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

import re
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.memory import bytes_of
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.importing.dcp_folder import READERS, read_range, relative_path
from trainer.storage import Store

DONE = "snapshot_done"
OUT, META = "out", "meta"
KINDS = {
    "kFloat": (2, torch.float32), "kDouble": (3, torch.float64), "kInt8": (4, torch.int8),
    "kInt32": (5, torch.int32), "kInt64": (6, torch.int64), "kUInt8": (7, torch.uint8),
    "kFloat16": (9, torch.float16), "kBFloat16": (11, torch.bfloat16), "kBool": (12, torch.bool),
}  # fmt: skip
"""Enum value and dtype of each supported DataType."""
_MAX_META_BYTES = 1 << 16
_MAX_INT64 = (1 << 63) - 1
_MAX_AXES = 64

_Kind = tuple[torch.dtype, tuple[int, ...]]


# --- metadata ----------------------------------------------------------------------------------


def meta_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return the metadata of a tensor.

    Raises:
        CheckpointError: OneFlow does not have the dtype.
    """
    name = next((name for name, (_, kind) in KINDS.items() if kind == dtype), None)
    if name is None:
        raise CheckpointError(f"OneFlow does not support {dtype}")
    dims = "".join(f"  dim: {dim}\n" for dim in shape)
    return f"shape {{\n{dims}}}\ndata_type: {name}\n"


def parse_meta(text: str) -> _Kind:
    """Parse dtype and shape; accepts any valid text form of the message.

    Raises:
        ValueError: the text is not that message.
    """
    words = _words(text)
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    while words:
        field = words.pop(0)
        if field == "shape" and shape is None:
            shape = _shape(words)
        elif field == "data_type" and dtype is None:
            dtype = _dtype(words)
        else:
            raise ValueError(f"unexpected field {field!r}")
        _end_of_field(words)
    if dtype is None or shape is None:
        raise ValueError("shape and data_type are required")
    return dtype, shape


def _words(text: str) -> list[str]:
    words, at = [], 0
    for match in re.finditer(r"\s+|#[^\n]*|([A-Za-z_]\w*|[0-9]+(?!\w)|[{}<>:\[\],;])", text):
        if match.start() != at:
            break
        at = match.end()
        if match[1]:
            words.append(match[1])
    if at != len(text):
        raise ValueError(f"cannot parse {text[at : at + 20]!r}")
    return words


def _take(words: list[str], *expected: str) -> str:
    if not words or (expected and words[0] not in expected):
        word = repr(words[0]) if words else "the end"
        raise ValueError(f"expected {' or '.join(expected) or 'a value'} instead of {word}")
    return words.pop(0)


def _end_of_field(words: list[str]) -> None:
    if words[:1] in ([","], [";"]):
        words.pop(0)


def _shape(words: list[str]) -> tuple[int, ...]:
    if words[:1] == [":"]:
        words.pop(0)
    closing = {"{": "}", "<": ">"}[_take(words, "{", "<")]
    dims: list[int] = []
    while _take(words, "dim", closing) == "dim":
        _take(words, ":")
        if words[:1] != ["["]:
            dims.append(_number(words))
        elif words[1:2] == ["]"]:
            del words[:2]
        else:
            while _take(words, "[", ",", "]") != "]":
                dims.append(_number(words))
        _end_of_field(words)
    if len(dims) > _MAX_AXES or prod(max(dim, 1) for dim in dims) * 8 > _MAX_INT64:
        raise ValueError("the shape is too large")
    return tuple(dims)


def _number(words: list[str]) -> int:
    word = _take(words)
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", word) or int(word) > _MAX_INT64:
        raise ValueError(f"{word!r} is not a valid dimension")
    return int(word)


def _dtype(words: list[str]) -> torch.dtype:
    _take(words, ":")
    word = _take(words)
    for name, (number, dtype) in KINDS.items():
        if word in (name, str(number)):
            return dtype
    raise ValueError(f"unsupported data_type {word}")


# --- folder ------------------------------------------------------------------------------------


def is_folder(store: Store, names: list[str]) -> bool:
    """Return whether a store with these entries is a OneFlow folder, finished or not."""
    if DONE in names:
        return True
    first = next((name for name in names if name.endswith("/")), None)
    return first is not None and {OUT, META} <= set(store.entries(first.removesuffix("/")))


class OneflowFolder:
    """A formats.Source that reads only the requested tensors.

    Args:
        url: the folder.
        store: store of the folder.
        names: its entries.

    Raises:
        CheckpointError: the folder is unfinished or damaged.
    """

    kind = "a folder of OneFlow variables"

    def __init__(self, url: str, store: Store, names: list[str]) -> None:
        self.url, self._store = url, store
        if DONE not in names:
            raise CheckpointError(
                f"{url} has OneFlow variables but no {DONE}, which is written last: the save did "
                "not finish; save again"
            )
        self.aliases: dict[str, str] = {}  # every name has separate data
        self.objects: dict[str, Any] = {}
        variables = [name.removesuffix("/") for name in names if name.endswith("/")]
        kinds: dict[str, _Kind] = {}

        def read(name: str) -> None:
            kinds[name] = self._read_meta(relative_path(name, url))

        in_parallel(read, variables, READERS)
        self.tensors = {name: kinds[name] for name in variables}
        self.paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in variables}

    def _read_meta(self, name: str) -> _Kind:
        where = f"{self.url}/{name}/{META}"
        try:
            if self._store.size(f"{name}/{META}") > _MAX_META_BYTES:
                raise ValueError("too long")
            dtype, shape = parse_meta(self._store.read(f"{name}/{META}").decode())
            size = self._store.size(f"{name}/{OUT}")
        except FileNotFoundError:
            raise CheckpointError(f"{self.url}/{name} is missing {OUT} or {META}") from None
        except ValueError as error:
            raise CheckpointError(f"{where} does not describe a variable: {error}") from None
        if size != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.url}/{name}/{OUT} has {size:,} bytes, but {dtype} {list(shape)} needs "
                f"{prod(shape) * dtype.itemsize:,}: the file was truncated or replaced"
            )
        return dtype, shape

    def fetch(self, name: str) -> Tensor:
        """Read a tensor with parallel requests."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        dtype, shape = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel() == 0:
            return tensor
        where = f"{self.url}/{name}/{OUT}"
        read_range(self._store, f"{name}/{OUT}", 0, bytes_of(tensor).data, where)
        if dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError(f"{where} has bytes other than 0 and 1 in a kBool")
        return tensor
