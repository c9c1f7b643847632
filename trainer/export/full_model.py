"""`format=full_model`: the whole module, pickled. Needs this code, and is unsafe to share."""

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
from trainer.export.contract import Arrays, ExportError, Runner
from trainer.export.parity import as_array
from trainer.export.subject import Subject
from trainer.export.tracing import quiet, reason

SUFFIX = ".full.pt"
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}
WARNING = (
    "warning: a pickled module runs code when it is loaded. Load it only where you trust who wrote "
    "it, and give others another format. It needs the model's code, as it is now"
)
"""Printed by the command; `formats.open_export` opens such a file only for who says so."""
_CALL = "perdure_call"
"""Attribute of the pickled module: how it is called, in plain tuples and dicts."""


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Pickle the model in eval mode."""
    call = subject.call(1)
    model = copy.copy(subject.model())  # shares everything; only the attribute is its own
    setattr(model, _CALL, {
        "arguments": call.arguments, "keywords": dict(call.keywords),
        "inputs": list(call.names), "outputs": list(subject.outputs),
    })  # fmt: skip
    try:
        with open(path, "wb") as file:  # by its name, torch would put that name into the file
            torch.save(model, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ExportError(
            f"{type(model).__name__} cannot be pickled: {reason(error)}\nClasses and functions "
            "have to be importable by their names; every other format does without"
        ) from None


def open_runner(path: Path, device: str = "cpu") -> Runner:
    """Unpickle the file, which may run any code."""
    try:
        with quiet():
            model: Any = torch.load(path, map_location=device, weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path} needs the code that it was made with, which is not here: {reason(error)}. Put "
            "that code on the path (PYTHONPATH=…), or export the run in a format without code: "
            "torch_export, torchscript or onnx"
        ) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    found = getattr(model, _CALL, None)
    if not isinstance(model, nn.Module) or not isinstance(found, dict):
        raise ExportError(f"{path} holds a {type(model).__name__}, not a model of this command")
    call = Call(found["arguments"], found["keywords"], tuple(found["inputs"]))
    return _Runner(model, call, found["outputs"], torch.device(device))


class _Runner:
    """An unpickled model; see `contract.Runner`."""

    def __init__(
        self, model: nn.Module, call: Call, outputs: list[str], device: torch.device
    ) -> None:
        self._model, self._call, self._device = model, call, device
        self.inputs, self.outputs = list(call.names), outputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        given = [
            torch.tensor(inputs[name], dtype=like.dtype, device=self._device)
            for name, like in self._call.tensors().items()
        ]
        arguments, keywords = self._call.filled(iter(given))
        with torch.no_grad():
            found = outputs_of(self._model(*arguments, **keywords)).values()
        return {name: as_array(t) for name, t in zip(self.outputs, found, strict=True)}
