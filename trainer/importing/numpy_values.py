"""NumPy values in a torch.save file, read without NumPy's own unpickling functions.

Checkpoints often have some: a best score, a history, the state of a generator.
torch reads them with `weights_only=True` only if NumPy's functions are allowed, which accept any
state. Here numbers become Python numbers, and everything else an inert record.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")


class NumPyRecord:
    """A NumPy array or type in a file; its contents are not read."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        """Keep the byte order of a number type, which is the second value of its state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _scalar(dtype: Any = None, data: Any = None) -> Any:
    code = dtype.arguments[0] if isinstance(dtype, NumPyRecord) and dtype.arguments else None
    if isinstance(code, str) and isinstance(data, bytes) and _NUMBER.fullmatch(code):
        number = np.dtype(dtype.order + code)
        if len(data) == number.itemsize:
            return np.frombuffer(data, number)[0].item()
    return NumPyRecord(dtype, data)


def _empty_bytes() -> bytes:
    """Replace `bytes`, the contents of an empty array; `bytes(n)` could fill the memory."""
    return b""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (NumPyRecord, "numpy.dtype"),
    (NumPyRecord, "numpy.ndarray"),
    (_empty_bytes, "builtins.bytes"),
    *[
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # the name until NumPy 1, and since 2
        for stand_in, name in ((NumPyRecord, "_reconstruct"), (_scalar, "scalar"))
    ],
]
"""Functions and classes for `torch.serialization.safe_globals`, with the names they replace."""
