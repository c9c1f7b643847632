"""`format=torch_export`: a `.pt2` file that `torch.export.load` reads, without this code."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import ConfigError
from trainer.export.contract import ExportError, Runner
from trainer.export.subject import Subject
from trainer.export.tracing import (
    INTERFACE,
    Interface,
    TorchRunner,
    Traceable,
    quiet,
    reason,
    traceable,
)

SUFFIX = ".pt2"
OPTIONS: Mapping[str, str] = {"dynamic": "batch"}
HELP: Mapping[str, str] = {
    "dynamic": "axes of every input that may have other sizes: batch, none, or such as batch,1",
}
_COUNT = 3
"""Samples of the call that is captured; 0 and 1 would be taken for constants."""


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Capture the model's graph."""
    program, names = captured(subject, options["dynamic"])
    with quiet(), open(path, "wb") as file:
        torch.export.save(program, file, extra_files={INTERFACE: names.to_text()})


def open_runner(path: Path, device: str = "cpu") -> Runner:
    """Load the file. A program stays on the device that it was captured on."""
    extra = {INTERFACE: ""}
    with quiet():
        try:
            program = torch.export.load(path, extra_files=extra)
        except (RuntimeError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise ExportError(f"{path} cannot be loaded: {reason(error)}") from None
    names = Interface.from_text(extra[INTERFACE])
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return TorchRunner(program.module(), names, device)


def captured(subject: Subject, dynamic: str) -> tuple[torch.export.ExportedProgram, Interface]:
    """Return the model's graph with dynamic axes, and its names.

    Raises:
        ConfigError: `dynamic` is no list of axes.
        ExportError: the computation depends on values, or on the size of a dynamic axis.
    """
    axes = _axes(dynamic)
    found = traceable(subject, _COUNT if 0 in axes else 1)
    return _program(found, axes), found.interface


def _axes(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        axes = [0 if word == "batch" else int(word) for word in text.split(",")]
    except ValueError:
        axes = [-1]
    if any(axis < 0 for axis in axes):
        raise ConfigError(f"dynamic={text}: write batch, none, or axes such as batch,1")
    return axes


def _program(found: Traceable, axes: list[int]) -> torch.export.ExportedProgram:
    count = len(found.tensors[0]) if found.tensors[0].ndim else 0

    def shape(tensor: Any) -> dict[int, Any]:
        names = {0: "batch"} | {axis: f"axis{axis}" for axis in axes if axis}
        return {
            axis: torch.export.Dim(names[axis])
            for axis in axes
            if axis < tensor.ndim and (axis or len(tensor) == count)
        }

    shapes: Any = tuple(shape(tensor) for tensor in found.tensors)
    if type(found.module).__name__ == "Flat":
        shapes = (shapes,)  # of `*tensors`
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(found.module, found.tensors, dynamic_shapes=shapes)
    except Exception as error:  # of any kind that the compiler, or the model under it, raises
        raise ExportError(
            f"the model's graph cannot be captured: {reason(error)}\nWhere values of tensors "
            "decide, format=torchscript method=script keeps the branch; where a size is fixed, "
            "dynamic=none exports for one sample; format=full_model needs neither"
        ) from None
