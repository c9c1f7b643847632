"""Shared parts of the formats that capture a graph: flat models, signatures, library errors."""

import contextlib
import io
import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.export.calls import Call, leaves, outputs_of
from trainer.export.contract import Arrays, ExportError
from trainer.export.exported_model import ExportedModel
from trainer.export.parity import as_array

SIGNATURE_FILE = "perdure.json"
"""Extra file in torch's own formats that has the `Signature`."""
_NOISE = (
    "Exception from", "Check '", "FrontEnd API", "Model wasn't", "While validating", "Failed to ",
    "## Exception", "- If ", "- Create ",
)  # fmt: skip
"""Prefixes of library error lines without information on the model."""


class Flat(nn.Module):
    """A model that takes and returns tensors only, around one with nested arguments.

    Args:
        model: the model.
        call: a call of it.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map the input tensors to the output tensors, both in the order of their names."""
        arguments, keywords = self._call.with_tensors(tensors)
        return tuple(outputs_of(self.model(*arguments, **keywords)).values())


@dataclass(frozen=True)
class Signature:
    """Names and dtypes of the inputs, and names of the outputs."""

    inputs: list[str]
    dtypes: list[str]
    """Input dtypes, by their torch names."""
    outputs: list[str]
    by_name: bool = False
    """Pass the inputs as keywords."""

    @classmethod
    def of(cls, call: Call, outputs: Sequence[str], *, by_name: bool = False) -> "Signature":
        """Return the signature of a call with these outputs."""
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in call.tensors().values()]
        return cls(list(call.names), dtypes, list(outputs), by_name)

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "Signature":
        """Parse the result of `to_text`.

        Raises:
            ExportError: the text is malformed.
        """
        try:
            signature = cls(**json.loads(text))
            for dtype in signature.dtypes:
                if not isinstance(getattr(torch, dtype), torch.dtype):
                    raise ValueError(dtype)
        except (ValueError, TypeError, AttributeError):
            raise ExportError(
                f"the file has no valid {SIGNATURE_FILE} with its input and output names: it was "
                "not written by this command, or was altered"
            ) from None
        return signature


@dataclass(frozen=True)
class Traceable:
    """A module to capture, with tensors to call it with, in order."""

    module: nn.Module
    tensors: tuple[Tensor, ...]
    signature: Signature


def traceable(model: ExportedModel, count: int) -> Traceable:
    """Return the module itself if it takes and returns plain tensors, or else `Flat` around it."""
    call = model.call(count)
    module, tensors = model.module, tuple(call.tensors().values())
    with torch.no_grad():
        result = module(*call.arguments, **call.keywords)
    values = result if isinstance(result, tuple) else (result,)
    is_flat = not call.keywords and type(values) is tuple
    if not (is_flat and all(isinstance(v, Tensor) for v in (*call.arguments, *values))):
        module = Flat(module, call).eval()
    return Traceable(module, tensors, Signature.of(call, model.outputs))


class TorchRunner:
    """A loaded model of torch's own formats; see `contract.Runner`.

    Args:
        model: the callable; takes and returns tensors.
        signature: names and dtypes.
        device: its device.
    """

    def __init__(self, model: Callable[..., Any], signature: Signature, device: str) -> None:
        self._model, self._signature, self._device = model, signature, device
        self.inputs: Sequence[str] = signature.inputs
        self.outputs: Sequence[str] = signature.outputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        tensors = {
            name: torch.tensor(inputs[name], dtype=getattr(torch, dtype), device=self._device)
            for name, dtype in zip(self.inputs, self._signature.dtypes, strict=True)
        }
        with torch.no_grad():
            by_name = self._signature.by_name
            result = self._model(**tensors) if by_name else self._model(*tensors.values())
        outputs = (tensor for _, tensor in leaves(result))
        return {name: as_array(t) for name, t in zip(self.outputs, outputs, strict=True)}


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Suppress a library's warnings, logs and prints; yield the list of warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield caught
    finally:
        logging.disable(disabled)


def reason(error: BaseException) -> str:
    """Return the informative lines of a library error, with the source line if known."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if missing is not None:
        return f"ONNX has no operator for {missing[1]}{_code_line(error)}"
    equal = re.search(r"values of (\w+) = .* and (\w+) = .* must always be equal", text)
    if equal is not None:
        return (
            f"the sizes of the axes {equal[1]!r} and {equal[2]!r} are always equal in this model; "
            f"give both one name in dynamic=, such as {equal[2]}"
        )
    fixed = re.search(r"Suggested fixes:\s+(\w+) = (\d+)", text)
    if fixed is not None:
        return (
            f"the size of axis {fixed[1]!r} is fixed to {fixed[2]}, by len(…), int(….shape[…]), "
            "a number in view or reshape, or an input of that size without this axis in dynamic="
            f"{_code_line(error)}"
        )
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_NOISE)] or lines
    first = lines[0]
    if "data-dependent" in first:
        first = "control flow depends on a tensor value here"
    elif first.endswith(":") and len(lines) > 1 and 'File "' not in lines[1]:
        first = f"{first.lstrip('- ')} {lines[1].strip()}"
    at = [i for i, line in enumerate(lines) if re.search(r'File "(?!.*/site-packages/)', line)]
    if not at:
        return first + _code_line(error)
    excerpt = lines[at[0] : at[0] + 4]
    stop = next((i for i, line in enumerate(excerpt) if "error above occurred" in line), None)
    return "\n".join([first.removesuffix(":") + ":", *excerpt[:stop]])


def _code_line(error: BaseException) -> str:
    """Return the innermost line of a `forward` outside of torch in the error's traceback."""
    frames = []
    current: BaseException | None = error
    while current is not None:
        frames += [
            f"{frame.filename}, line {frame.lineno}: {frame.line}"
            for frame in traceback.extract_tb(current.__traceback__)
            if frame.name == "forward" and "/torch/" not in frame.filename
        ]
        current = current.__cause__ or current.__context__
    return f"\n  {frames[-1]}" if frames else ""


class _ValueReads(TorchDispatchMode):
    """Record the lines at which Python reads a tensor's value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: dict[tuple[str, int], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            for frame in reversed(traceback.extract_stack()):
                if "/torch/" not in frame.filename and frame.filename != __file__:
                    self.lines[frame.filename, frame.lineno or 0] = frame.line or ""
                    break
        return func(*args, **(kwargs or {}))


def value_reads(model: Traceable) -> dict[tuple[str, int], str]:
    """Return the source lines, by file and line number, at which tensor values are read."""
    mode = _ValueReads()
    with torch.no_grad(), mode:
        model.module(*model.tensors)
    return mode.lines
