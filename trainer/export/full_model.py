"""`format=full_model`: the pickled module. Needs its code, and is unsafe to share."""

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from trainer.errors import ConfigError
from trainer.export.calls import Call
from trainer.export.contract import ExportError, Runner
from trainer.export.exported_model import ExportedModel
from trainer.export.tracing import Flat, Signature, TorchRunner, quiet, reason
from trainer.export.training_state import save

_CALL = "perdure_call"
"""Attribute of the pickled module with its call signature, in plain tuples and dicts."""


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Pickle the module in eval mode."""
    _check_plain(model.module)
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


def _check_plain(module: nn.Module) -> None:
    names = [name for name, part in module.named_modules() if is_parametrized(part)]
    if names:
        listed = ", ".join(name or "the model itself" for name in names[:4])
        raise ExportError(
            f"torch does not pickle parametrized modules ({listed}{', …' * (len(names) > 4)}); use "
            "format=torch_export, onnx or torchscript, or format=state_dict for the weights alone"
        )


def open_runner(path: Path, device: str) -> Runner:
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
    return TorchRunner(Flat(module, call), Signature.of(call, stored["outputs"]), device)
