"""What the formats that capture a computation share: flat models, quiet libraries, reasons."""

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
from trainer.export.parity import as_array
from trainer.export.subject import Subject

INTERFACE = "perdure.json"
"""Name of the extra file in which torch's own formats keep the names of inputs and outputs."""
_EMPTY = (
    "Exception from", "Check '", "FrontEnd API", "Model wasn't", "While validating", "Failed to ",
    "## Exception", "- If ", "- Create ",
)  # fmt: skip
"""How lines of libraries' errors begin that say nothing of the model."""


class Flat(nn.Module):
    """A model that takes and returns tensors alone, whatever nest of them it is written for.

    Args:
        model: the model.
        call: a call of it.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map the inputs, in the order of their names, to the outputs in theirs."""
        arguments, keywords = self._call.filled(iter(tensors))
        return tuple(outputs_of(self.model(*arguments, **keywords)).values())


@dataclass(frozen=True)
class Interface:
    """Names and dtypes of what goes in, and names of what comes out."""

    inputs: list[str]
    dtypes: list[str]
    """Of the inputs: names in torch."""
    outputs: list[str]
    by_name: bool = False
    """Whether the inputs are given as keywords."""

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "Interface":
        """Return what `to_text` wrote.

        Raises:
            ExportError: it is nothing of that kind.
        """
        try:
            found = cls(**json.loads(text))
            for dtype in found.dtypes:
                if not isinstance(getattr(torch, dtype), torch.dtype):
                    raise ValueError(dtype)
        except (ValueError, TypeError, AttributeError):
            raise ExportError(
                "the file does not say how its inputs and outputs are called; it was not written "
                "by this command, or was altered"
            ) from None
        return found


@dataclass(frozen=True)
class Traceable:
    """A module to capture, with tensors to call it with, in order."""

    module: nn.Module
    tensors: tuple[Tensor, ...]
    interface: Interface


def traceable(subject: Subject, count: int) -> Traceable:
    """Return the model itself if it takes and returns tensors (or a tuple of them), else `Flat`."""
    call = subject.call(count)
    model, tensors = subject.model(), tuple(call.tensors().values())
    with torch.no_grad():
        answer = model(*call.arguments, **call.keywords)
    answers = answer if isinstance(answer, tuple) else (answer,)
    is_flat = call.is_flat and not call.keywords and type(answers) is tuple
    if not (is_flat and all(isinstance(each, Tensor) for each in answers)):
        model = Flat(model, call).eval()
    return Traceable(model, tensors, interface(subject, call))


def interface(subject: Subject, call: Call, *, by_name: bool = False) -> Interface:
    """Return the names that the export has to keep."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in call.tensors().values()]
    return Interface(list(call.names), dtypes, list(subject.outputs), by_name)


class TorchRunner:
    """A loaded model of torch's own formats; see `contract.Runner`.

    Args:
        model: what is called with tensors.
        interface: names and dtypes.
        device: where it is.
    """

    def __init__(self, model: Callable[..., Any], interface: Interface, device: str) -> None:
        self._model, self._interface, self._device = model, interface, device
        self.inputs: Sequence[str] = interface.inputs
        self.outputs: Sequence[str] = interface.outputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        given = {
            name: torch.tensor(inputs[name], dtype=getattr(torch, dtype), device=self._device)
            for name, dtype in zip(self.inputs, self._interface.dtypes, strict=True)
        }
        with torch.no_grad():
            by_name = self._interface.by_name
            answer = self._model(**given) if by_name else self._model(*given.values())
        found = (tensor for _, tensor in leaves(answer))
        return {n: as_array(tensor) for n, tensor in zip(self.outputs, found, strict=True)}


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep warnings, log lines and prints of a library from the terminal; give the warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield found
    finally:
        logging.disable(disabled)


def reason(error: BaseException) -> str:
    """Return the lines of a library's error that say what stands against it, and where."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if missing is not None:
        return f"ONNX has no operator for {missing[1]}{_code_line(error)}"
    fixed = re.search(r"Suggested fixes:\s+(\w+) = (\d+)", text)
    if fixed is not None:
        return (
            f"the size of the axis {fixed[1]!r} is fixed to {fixed[2]}, by len(…), int(….shape[…]) "
            f"or a number in view or reshape{_code_line(error)}"
        )
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_EMPTY)] or lines
    first = lines[0]
    if "data-dependent" in first:
        first = "a value of a tensor decides here"
    elif first.endswith(":") and len(lines) > 1 and 'File "' not in lines[1]:
        first = f"{first.lstrip('- ')} {lines[1].strip()}"
    at = [i for i, line in enumerate(lines) if re.search(r'File "(?!.*/site-packages/)', line)]
    if not at:
        return first + _code_line(error)
    shown = lines[at[0] : at[0] + 4]
    stop = next((i for i, line in enumerate(shown) if "error above occurred" in line), None)
    return "\n".join([first.removesuffix(":") + ":", *shown[:stop]])


def _code_line(error: BaseException) -> str:
    """Return the innermost line of code outside of libraries that an error went through."""
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


class _Decisions(TorchDispatchMode):
    """Notes the lines at which Python asks for the value of a tensor."""

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


def decisions(found: Traceable) -> dict[tuple[str, int], str]:
    """Return the lines, by file and number, where values of tensors decide what is computed."""
    mode = _Decisions()
    with torch.no_grad(), mode:
        found.module(*found.tensors)
    return mode.lines
