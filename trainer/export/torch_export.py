"""`format=torch_export`: a `.pt2` file that `torch.export.load` reads, without this code."""

import re
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
    Flat,
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
_LIMIT = re.compile(r"(\w+) = Dim\('\w+', (?:min=\d+, )?max=(\d+)\)")
"""A suggestion of torch.export's errors."""
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
    axes = axes_of(dynamic)
    found = traceable(subject, _COUNT if 0 in axes else 1)
    return _program(found, axes), found.interface


def axis_name(axis: int) -> str:
    """Return what a dynamic axis is called."""
    return f"axis{axis}" if axis else "batch"


def axes_of(text: str) -> list[int]:
    """Return the axes that `dynamic=` names.

    Raises:
        ConfigError: it is no list of axes.
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


def _program(found: Traceable, axes: list[int]) -> torch.export.ExportedProgram:
    """Capture the graph; where the code itself limits an axis, again within that limit."""
    limits: dict[str, int] = {}
    while True:
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(
                    found.module, found.tensors, dynamic_shapes=_shapes(found, axes, limits)
                )
        except Exception as error:  # of any kind that the compiler, or the model under it, raises
            suggested = {name: int(most) for name, most in _LIMIT.findall(str(error))}
            if suggested.items() <= limits.items():
                raise ExportError(
                    f"the model's graph cannot be captured: {reason(error)}\nWhere values of "
                    "tensors decide, format=torchscript method=script keeps the branch; where a "
                    "size is fixed, dynamic=none exports for one sample; format=full_model needs "
                    "neither"
                ) from None
            limits |= suggested


def _shapes(found: Traceable, axes: list[int], limits: Mapping[str, int]) -> Any:
    """Return which axes of each input may have any size; 0 only where it counts the samples."""
    count = max((len(tensor) for tensor in found.tensors if tensor.ndim), default=0)
    shapes = tuple(
        {
            axis: torch.export.Dim(axis_name(axis), max=limits.get(axis_name(axis)))
            for axis in axes
            if axis < tensor.ndim and (axis or len(tensor) == count)
        }
        for tensor in found.tensors
    )
    return (shapes,) if isinstance(found.module, Flat) else shapes  # of `*tensors`
