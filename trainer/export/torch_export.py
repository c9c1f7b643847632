"""`format=torch_export`: a `.pt2` file that `torch.export.load` reads, without this code."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.export.contract import ExportError, Runner
from trainer.export.dynamic_axes import Axes, DynamicAxes
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
    program, signature, _ = captured(model, options["dynamic"])
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


def captured(
    model: ExportedModel, dynamic: str
) -> tuple[torch.export.ExportedProgram, Signature, Axes]:
    """Return the model's graph with dynamic axes, its signature, and the axes.

    Raises:
        ConfigError: `dynamic` is malformed, or does not fit the inputs.
        ExportError: the computation depends on values, or on the size of a dynamic axis.
    """
    requested = DynamicAxes.parse(dynamic)
    count = _COUNT if requested.has_batch else 1
    module = traceable(model, count)
    names = module.signature.inputs
    axes = requested.of(dict(zip(names, module.tensors, strict=True)), count)
    return _program(module, axes), module.signature, axes


def _program(model: Traceable, axes: Axes) -> torch.export.ExportedProgram:
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


def _shapes(model: Traceable, axes: Axes, limits: Mapping[str, int]) -> Any:
    """Return the dynamic axes of each input."""
    shapes = tuple(
        {axis: torch.export.Dim(label, max=limits.get(label)) for axis, label in axes[name].items()}
        for name in model.signature.inputs
    )
    return (shapes,) if isinstance(model.module, Flat) else shapes  # for `*tensors`
