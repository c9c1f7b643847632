"""`format=full_model`: the pickled module. Needs its code, and is unsafe to share."""

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.export.calls import Call, outputs_of
from trainer.export.contract import Arrays, ExportError, Format, Runner
from trainer.export.exported_model import ExportedModel
from trainer.export.parity import as_array
from trainer.export.tracing import quiet, reason
from trainer.export.training_state import save

_CALL = "perdure_call"
"""Attribute of the pickled module with its call signature, in plain tuples and dicts."""


def _write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Pickle the module in eval mode."""
    call = model.call(1)
    module: Any = copy.copy(model.module)  # shares everything except the attribute
    setattr(module, _CALL, {
        "arguments": call.arguments, "keywords": dict(call.keywords),
        "inputs": list(call.names), "outputs": list(model.outputs),
    })  # fmt: skip
    try:
        save(module, path)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ExportError(
            f"{type(module).__name__} cannot be pickled: {reason(error)}\nIts classes and "
            "functions must be importable by name; the other formats have no such requirement"
        ) from None


def _open_runner(path: Path, device: str) -> Runner:
    """Unpickle the file, which can run any code."""
    try:
        with quiet():
            module: Any = torch.load(path, map_location=device, weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path} needs the code of its model, which is not importable: {reason(error)}. Add "
            "that code to PYTHONPATH, or export the run in a format without code: torch_export, "
            "torchscript or onnx"
        ) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    stored = getattr(module, _CALL, None)
    if not isinstance(module, nn.Module) or not isinstance(stored, dict):
        raise ExportError(
            f"{path} has a {type(module).__name__} in it, not a model that this command exported"
        )
    call = Call(stored["arguments"], stored["keywords"], tuple(stored["inputs"]))
    return _Runner(module, call, stored["outputs"], torch.device(device))


class _Runner:
    """An unpickled module; see `contract.Runner`."""

    def __init__(
        self, module: nn.Module, call: Call, outputs: list[str], device: torch.device
    ) -> None:
        self._module, self._call, self._device = module, call, device
        self.inputs, self.outputs = list(call.names), outputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        tensors = [
            torch.tensor(inputs[name], dtype=like.dtype, device=self._device)
            for name, like in self._call.tensors().items()
        ]
        arguments, keywords = self._call.with_tensors(tensors)
        with torch.no_grad():
            outputs = outputs_of(self._module(*arguments, **keywords)).values()
        return {name: as_array(t) for name, t in zip(self.outputs, outputs, strict=True)}


FORMAT = Format(
    suffix=".full.pt",
    write=_write,
    open_runner=_open_runner,
    warning=(
        "warning: a pickled module runs code when it is loaded, and needs the model's code "
        "unchanged. Load it only if you trust its author, and share another format"
    ),
)
