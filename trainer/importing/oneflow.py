"""Read OneFlow folders: one subfolder per variable, with its data and metadata.

`NAME/out` has the elements, little-endian, in C order. `NAME/meta` is the text form of a protobuf
message VariableMetaInfo: `shape { dim: 64 dim: 784 } data_type: kFloat`. An empty `snapshot_done`
is written last.
"""

from functools import cache
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
_PROTO = """
  name: "variable.proto" package: "oneflow"
  enum_type { name: "DataType" }
  message_type {
    name: "ShapeProto"
    field { name: "dim" number: 1 type: TYPE_INT64 label: LABEL_REPEATED }
  }
  message_type {
    name: "VariableMetaInfo"
    field { name: "shape" number: 2 type_name: "ShapeProto" label: LABEL_REQUIRED }
    field { name: "data_type" number: 3 type_name: "DataType" label: LABEL_REQUIRED }
  }
"""
"""FileDescriptorProto of OneFlow's messages, without the values of DataType."""
_MAX_META_BYTES = 1 << 16
_MAX_INT64 = (1 << 63) - 1
_MAX_AXES = 64

_Kind = tuple[torch.dtype, tuple[int, ...]]


# --- metadata ----------------------------------------------------------------------------------


@cache
def _library() -> tuple[Any, Any]:
    """Return protobuf's text_format and OneFlow's class VariableMetaInfo.

    Raises:
        CheckpointError: protobuf is not installed.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    except ImportError as error:
        raise CheckpointError(
            f"OneFlow folders need the library protobuf: {error}; pip install 'perdure[oneflow]'"
        ) from None
    file = text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto())
    for name, (number, _) in KINDS.items():
        file.enum_type[0].value.add(name=name, number=number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = pool.FindMessageTypeByName("oneflow.VariableMetaInfo")
    return text_format, message_factory.GetMessageClass(message)


def meta_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return the metadata of a tensor.

    Raises:
        CheckpointError: OneFlow does not have the dtype, or protobuf is not installed.
    """
    number = next((number for number, kind in KINDS.values() if kind == dtype), None)
    if number is None:
        raise CheckpointError(f"OneFlow does not support {dtype}")
    text_format, message = _library()
    text: str = text_format.MessageToString(message(shape={"dim": shape}, data_type=number))
    return text


def parse_meta(text: str) -> _Kind:
    """Parse dtype and shape; accepts any valid text form of the message.

    Raises:
        ValueError: the text is not that message.
        CheckpointError: protobuf is not installed.
    """
    text_format, message = _library()
    try:
        info = text_format.Parse(text, message())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from None
    if not info.IsInitialized():
        raise ValueError("shape and data_type are required")
    shape = tuple(info.shape.dim)
    if min(shape, default=0) < 0:
        raise ValueError(f"{list(shape)} has a negative dimension")
    if len(shape) > _MAX_AXES or prod(max(dim, 1) for dim in shape) * 8 > _MAX_INT64:
        raise ValueError("the shape is too large")
    return next(dtype for number, dtype in KINDS.values() if number == info.data_type), shape


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
