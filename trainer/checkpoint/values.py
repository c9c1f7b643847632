"""Strict JSON for the state's values that are not tensors, preserving value and type.

Plain JSON turns integer keys into strings and tuples into lists. A MultiStepLR whose milestones
were restored with string keys would never decay again, so these values carry a tag. Nothing is
pickled.
"""

import base64
import io
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import CheckpointError

_LARGEST_EXACT = 1 << 53
"""Largest integer up to which every reader of JSON keeps all digits (RFC 8259, section 6)."""


@dataclass(frozen=True)
class TensorRef:
    """Placeholder in `objects` for a tensor that is stored under `name`."""

    name: str


def dump(value: Any) -> str:
    """Return compact, strict JSON text."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def encode(value: Any, where: str) -> Any:
    """Convert a value to strict JSON, with a tag where JSON alone would lose its type.

    `decode` restores value and type, including integer keys, tuples, counters, sets, bytes,
    `BytesIO`, complex and non-finite numbers, and NumPy scalars.

    Args:
        value: the value.
        where: its path, for errors.

    Raises:
        CheckpointError: the type cannot be stored; the message has the type and `where`.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind in (int, float):
        is_exact = math.isfinite(value) if kind is float else abs(value) <= _LARGEST_EXACT
        return value if is_exact else {f"${kind.__name__}": repr(value)}
    if kind is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        return {"$dict": _encode_pairs(value, where)}
    if kind in (tuple, set, frozenset):
        items = value if kind is tuple else sorted(value, key=repr)
        return {f"${kind.__name__}": [encode(item, where) for item in items]}
    if kind in (Counter, OrderedDict):
        return {f"${kind.__name__}": _encode_pairs(value, where)}
    if kind is TensorRef:
        return {"$tensor": value.name}
    if kind in (bytes, io.BytesIO):
        content = value if kind is bytes else value.getvalue()
        return {f"${kind.__name__}": base64.b64encode(content).decode()}
    if kind is complex:
        return {"$complex": [encode(value.real, where), encode(value.imag, where)]}
    if kind.__module__ == "numpy" and _is_numpy_number(value):
        return {"$numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored: checkpoints "
        "hold tensors and JSON values, never pickles. Return it from state_dict as numbers, "
        "strings, lists, dicts or tensors"
    )


def _encode_pairs(value: Mapping[Any, Any], where: str) -> list[list[Any]]:
    return [
        [encode(key, f"{where} key"), encode(item, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]


_NUMPY_NUMBER = re.compile(r"[<>|=]?[bifcu]\d+")


def _is_numpy_number(value: Any) -> bool:
    """Return whether a NumPy scalar's type is fully described by its dtype string."""
    import numpy as np  # imported only for NumPy values

    if not isinstance(value, np.generic):
        return False
    text = value.dtype.str
    return _NUMPY_NUMBER.fullmatch(text) is not None and np.dtype(text).type is type(value)


def _decode_numpy(content: list[str]) -> Any:
    import numpy as np  # imported only for NumPy values

    kind, data = content
    if not _NUMPY_NUMBER.fullmatch(kind):
        raise ValueError(f"{kind!r} is not a NumPy number")
    return np.frombuffer(base64.b64decode(data), dtype=kind)[0]


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$int": int,
    "$tensor": TensorRef,
    "$dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "$tuple": lambda items: tuple(decode(item) for item in items),
    "$set": lambda items: {decode(item) for item in items},
    "$frozenset": lambda items: frozenset(decode(item) for item in items),
    "$Counter": lambda pairs: Counter({decode(key): decode(item) for key, item in pairs}),
    "$OrderedDict": lambda pairs: OrderedDict((decode(k), decode(item)) for k, item in pairs),
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$BytesIO": lambda text: io.BytesIO(base64.b64decode(text, validate=True)),
    "$complex": lambda pair: complex(decode(pair[0]), decode(pair[1])),
    "$numpy": _decode_numpy,
}


def decode(value: Any) -> Any:
    """Restore a value from the output of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((tag, content),) = value.items()
            if tag in _TAGS:
                return _TAGS[tag](content)
        return {key: decode(item) for key, item in value.items()}
    return value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values inside dicts and lists of dicts, each with its dotted key."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]")
    elif not isinstance(value, TensorRef):
        yield key, value
