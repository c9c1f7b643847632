"""OneFlow's folders: a folder per variable, with its bytes and a few words about them.

`NAME/out` holds the numbers, little-endian, in C order. `NAME/meta` is the text form of a protobuf
message VariableMetaInfo: `shape { dim: 64 dim: 784 } data_type: kFloat`. An empty `snapshot_done`
is written last. The text's grammar: https://protobuf.dev/reference/protobuf/textformat-spec/
"""

import re
from math import prod
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.memory import bytes_of
from trainer.core.threads import in_parallel
from trainer.errors import CheckpointError
from trainer.importing.dcp_folder import inside
from trainer.storage import Store

DONE = "snapshot_done"
OUT, META = "out", "meta"
KINDS = {
    "kFloat": (2, torch.float32), "kDouble": (3, torch.float64), "kInt8": (4, torch.int8),
    "kInt32": (5, torch.int32), "kInt64": (6, torch.int64), "kUInt8": (7, torch.uint8),
    "kFloat16": (9, torch.float16), "kBFloat16": (11, torch.bfloat16), "kBool": (12, torch.bool),
}  # fmt: skip
"""Number and dtype of each DataType that weights can have."""
_READERS = 8
_LONGEST_META_BYTES = 1 << 16
_LARGEST = (1 << 63) - 1
_MOST_AXES = 64

_Kind = tuple[torch.dtype, tuple[int, ...]]


# --- the text ----------------------------------------------------------------------------------


def meta_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return the text for a tensor.

    Raises:
        CheckpointError: OneFlow has no such dtype.
    """
    name = next((name for name, (_, known) in KINDS.items() if known == dtype), None)
    if name is None:
        raise CheckpointError(f"OneFlow has no {dtype}")
    dims = "".join(f"  dim: {dim}\n" for dim in shape)
    return f"shape {{\n{dims}}}\ndata_type: {name}\n"


def parse_meta(text: str) -> _Kind:
    """Return dtype and shape; the inverse of `meta_text`, for any spacing.

    Raises:
        ValueError: it is not that message.
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
            raise ValueError(f"{field!r} is not expected there")
        _end_of_field(words)
    if dtype is None or shape is None:
        raise ValueError("shape and data_type are both needed")
    return dtype, shape


def _words(text: str) -> list[str]:
    words, at = [], 0
    for found in re.finditer(r"\s+|#[^\n]*|([A-Za-z_]\w*|[0-9]+(?!\w)|[{}<>:\[\],;])", text):
        if found.start() != at:
            break
        at = found.end()
        if found[1]:
            words.append(found[1])
    if at != len(text):
        raise ValueError(f"{text[at : at + 20]!r} is not understood")
    return words


def _take(words: list[str], *wanted: str) -> str:
    if not words or (wanted and words[0] not in wanted):
        found = repr(words[0]) if words else "the end"
        raise ValueError(f"{' or '.join(wanted) or 'a value'} is needed where {found} is")
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
    if len(dims) > _MOST_AXES or prod(max(dim, 1) for dim in dims) * 8 > _LARGEST:
        raise ValueError("no tensor has such a shape")
    return tuple(dims)


def _number(words: list[str]) -> int:
    word = _take(words)
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", word) or int(word) > _LARGEST:
        raise ValueError(f"{word!r} is no length of an axis")
    return int(word)


def _dtype(words: list[str]) -> torch.dtype:
    _take(words, ":")
    word = _take(words)
    for name, (number, dtype) in KINDS.items():
        if word in (name, str(number)):
            return dtype
    raise ValueError(f"{word} is no data_type of numbers that are known here")


# --- the folder --------------------------------------------------------------------------------


def is_folder(store: Store, names: list[str]) -> bool:
    """Whether a store with these names at the top looks like one, finished or not."""
    if DONE in names:
        return True
    first = next((name for name in names if name.endswith("/")), None)
    return first is not None and {OUT, META} <= set(store.entries(first.removesuffix("/")))


class OneflowFolder:
    """A formats.Source; reads only what is asked for.

    Args:
        url: of the folder.
        store: of the folder.
        names: what lies in it, right below it.

    Raises:
        CheckpointError: it is not finished, or a part of it is not what it has to be.
    """

    kind = "a folder of OneFlow variables"

    def __init__(self, url: str, store: Store, names: list[str]) -> None:
        self.url, self._store = url, store
        if DONE not in names:
            raise CheckpointError(
                f"{url} has OneFlow's variables and no {DONE}, which is written last: whatever "
                "wrote it did not finish; write it again"
            )
        self.aliases: dict[str, str] = {}  # each name has bytes of its own
        self.objects: dict[str, Any] = {}
        variables = [name.removesuffix("/") for name in names if name.endswith("/")]
        found: dict[str, _Kind] = {}

        def look(name: str) -> None:
            found[name] = self._look(inside(name, url))

        in_parallel(look, variables, _READERS)
        self.tensors = {name: found[name] for name in variables}
        self.paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in variables}

    def _look(self, name: str) -> _Kind:
        where = f"{self.url}/{name}/{META}"
        try:
            if self._store.size(f"{name}/{META}") > _LONGEST_META_BYTES:
                raise ValueError("it is too long")
            dtype, shape = parse_meta(self._store.read(f"{name}/{META}").decode())
            size = self._store.size(f"{name}/{OUT}")
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.url}/{name} lacks {OUT} or {META}, which every variable has"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{where} does not describe a variable: {error}") from None
        if size != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.url}/{name}/{OUT} is {size:,} bytes, and {dtype} {list(shape)} takes "
                f"{prod(shape) * dtype.itemsize:,}: it was cut short, or replaced"
            )
        return dtype, shape

    def fetch(self, name: str) -> Tensor:
        """Read a tensor, in parallel pieces."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        dtype, shape = self.tensors[name]
        made = torch.empty(shape, dtype=dtype)
        if made.numel() == 0:
            return made
        memory = bytes_of(made).data
        step, key = self._store.read_bytes, f"{name}/{OUT}"

        def read(start: int) -> None:
            piece = memory[start : start + step]
            if self._store.read_into(key, start, piece) < len(piece):
                raise CheckpointError(f"{self.url}/{key} was cut short while it was read")

        in_parallel(read, range(0, len(memory), step), _READERS)
        if dtype == torch.bool and int(made.view(torch.uint8).max()) > 1:
            raise CheckpointError(f"{self.url}/{key} holds other bytes than 0 and 1 for a kBool")
        return made
