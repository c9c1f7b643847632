"""`format=torch_export`: a `.pt2` file that `torch.export.load` reads, without this code."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import ConfigError
from trainer.export.contract import ExportError, Runner
from trainer.export.exported_model import ExportedModel
from trainer.export.tracing import (
    SIGNATURE_FILE,
    Flat,
    Signature,
    TorchRunner,
    Traceable,
    quiet,
    reason,
    traceable,
)

_LIMIT = re.compile(r"(\w+) = Dim\('\w+', (?:min=\d+, )?max=(\d+)\)")
"""Limits of dynamic axes that torch.export's errors suggest."""
_COUNT = 3
"""Samples in the captured call; torch.export would treat 0 and 1 as constants."""


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write the captured program, with its signature."""
    program, signature = captured(model, options["dynamic"])
    with quiet(), open(path, "wb") as file:
        torch.export.save(program, file, extra_files={SIGNATURE_FILE: signature.to_text()})


def open_runner(path: Path, device: str) -> Runner:
    """Load the file; a program is loaded on the device it was captured on, then moved."""
    extra = {SIGNATURE_FILE: ""}
    with quiet():
        try:
            program = torch.export.load(path, extra_files=extra)
        except (RuntimeError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    signature = Signature.from_text(extra[SIGNATURE_FILE])
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return TorchRunner(program.module(), signature, device)


def captured(model: ExportedModel, dynamic: str) -> tuple[torch.export.ExportedProgram, Signature]:
    """Return the model's graph with dynamic axes, and its signature.

    Raises:
        ConfigError: `dynamic` is malformed.
        ExportError: the computation depends on values, or on the size of a dynamic axis.
    """
    axes = axes_of(dynamic)
    module = traceable(model, _COUNT if 0 in axes else 1)
    return _program(module, axes), module.signature


def axis_name(axis: int) -> str:
    """Return the name of a dynamic axis."""
    return f"axis{axis}" if axis else "batch"


def axes_of(text: str) -> list[int]:
    """Parse `dynamic=`: `none`, or axes such as `batch,1`.

    Raises:
        ConfigError: the text is malformed.
    """
    if text == "none":
        return []
    try:
        axes = [0 if word == "batch" else int(word) for word in text.split(",")]
    except ValueError:
        axes = [-1]
    if any(axis < 0 for axis in axes):
        raise ConfigError(f"dynamic={text}: write batch, none, or axes such as batch,1")
    return axes


def _program(model: Traceable, axes: list[int]) -> torch.export.ExportedProgram:
    """Capture the graph; retry with the suggested limits if the code limits an axis."""
    limits: dict[str, int] = {}
    while True:
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(
                    model.module, model.tensors, dynamic_shapes=_shapes(model, axes, limits)
                )
        except Exception as error:  # the compiler, or the model, can raise any type
            suggested = {name: int(limit) for name, limit in _LIMIT.findall(str(error))}
            if suggested.items() <= limits.items():
                raise ExportError(
                    f"the model's graph cannot be captured: {reason(error)}\nFor control flow "
                    "that depends on values, format=torchscript method=script keeps the branch; "
                    "for a fixed size, dynamic=none exports a batch of 1; format=full_model has "
                    "neither limit"
                ) from None
            limits |= suggested


def _shapes(model: Traceable, axes: list[int], limits: Mapping[str, int]) -> Any:
    """Return the dynamic axes of each input; axis 0 only if it is the batch axis."""
    count = max((len(tensor) for tensor in model.tensors if tensor.ndim), default=0)
    shapes = tuple(
        {
            axis: torch.export.Dim(axis_name(axis), max=limits.get(axis_name(axis)))
            for axis in axes
            if axis < tensor.ndim and (axis or len(tensor) == count)
        }
        for tensor in model.tensors
    )
    return (shapes,) if isinstance(model.module, Flat) else shapes  # for `*tensors`
