"""Export a checkpoint: write, run, compare, describe, publish."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, closest
from trainer.export import parity, record
from trainer.export.contract import Format
from trainer.export.destination import Destination, files
from trainer.export.dynamic_axes import DynamicAxes, halved, lengths
from trainer.export.exported_model import DTYPES, Choices, ExportedModel
from trainer.export.formats import FORMATS, find
from trainer.export.loaded_checkpoint import open_checkpoint
from trainer.export.parity import Mismatch
from trainer.storage import local_path

_DEVICES = ("cpu", "cuda")
_BATCH_SIZES = (1, 2, 5)
"""Batch sizes of the parity check."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    url: str
    """URL of the file or folder."""
    bytes: int
    """Total bytes of its files."""
    tensors: int
    """Number of tensor names in it."""
    warning: str
    """Warning about the format, or empty."""
    record: Mapping[str, Any]
    """Content of the record."""
    mismatches: Sequence[Mismatch] | None
    """Results of the parity check; None for formats that cannot be run."""

    @property
    def path(self) -> Path:
        """Local path."""
        return Path(self.url)


def export(
    location: str,
    format: str = "safetensors",
    step: str = "latest",
    out: str = "",
    *,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
    options: Mapping[str, str] | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    store: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Exported:
    """Export a checkpoint. One process, no process group; durable on return, or nothing is written.

    Args:
        location: a run directory, a folder of checkpoints, or one checkpoint's folder.
        format: a name in `formats.FORMATS`.
        step: `latest`, `best` or a step number.
        out: the file or folder to write; default: `exports/` of the run.
        choices: weights, dtype, submodule and sample inputs.
        options: options of the format.
        atol: see `parity.check_parity`.
        rtol: see `parity.check_parity`.
        store: object store settings.

    Raises:
        ConfigError: an argument is wrong, or the checkpoint does not exist.
        ExportError: the model cannot be written in this format, or the parity check failed.
        DamagedError: a checksum differs.
    """
    writer = find(format)
    values = _options(format, writer, options or {})
    _check(choices)
    checkpoint = open_checkpoint(location, step, store)
    if writer.resumes and choices.averaged is None:
        choices = replace(choices, averaged=False)
    model = ExportedModel(checkpoint, choices)
    url = out or _default_url(location, model, writer)
    destination = Destination(url, store)
    dynamic = DynamicAxes.parse(values["dynamic"]) if "dynamic" in values else DynamicAxes()
    sizes: Sequence[int] = ()
    if writer.open_runner:
        sizes = _BATCH_SIZES if dynamic.has_batch else (1,)
    with destination.temporary() as path:
        mismatches = None
        if writer.open_runner:
            parity.check_determinism(model)
        writer.write(model, path, values)
        if writer.open_runner:
            runner = writer.open_runner(path, choices.device)
            batches = _batches(model, sizes, dynamic)
            mismatches = parity.check_parity(model, runner, batches, atol=atol, rtol=rtol)
        description = record.describe(
            model, path, format, values, dynamic, mismatches, sizes, writer.libraries
        )
        size_bytes = sum(file.stat().st_size for file in files(path))
        destination.publish(path, record.to_bytes(description), last_file=writer.last_file)
    return Exported(
        url=str(destination.path or destination.url),
        bytes=size_bytes,
        tensors=len(model.tensor_names()),
        warning=writer.warning,
        record=description,
        mismatches=mismatches,
    )


def _options(name: str, format: Format, values: Mapping[str, str]) -> dict[str, str]:
    for key in values:
        if key not in format.options:
            others = [other for other, form in FORMATS.items() if key in form.options]
            hint = f"; it is an option of format={' and '.join(others)}" if others else ""
            raise ConfigError(
                f"format={name} has no option {key!r}{hint or closest(key, format.options)}"
            )
    return {**{key: option.default for key, option in format.options.items()}, **values}


def _batches(
    model: ExportedModel, sizes: Sequence[int], dynamic: DynamicAxes
) -> list[dict[str, Tensor]]:
    """Return batches of these sizes, and ones that are shorter along the other dynamic axes.

    Each axis is shortened alone, then all of them, so that no export makes two of them equal.
    """
    batches = [model.inputs(size) for size in sizes]
    axes = dynamic.of(batches[-1], sizes[-1])
    names = lengths(axes)
    groups = [[name] for name in names] + ([names] if len(names) > 1 else [])
    return batches + [halved(batches[-1], axes, group) for group in groups]


def _check(choices: Choices) -> None:
    if choices.dtype and choices.dtype not in DTYPES:
        raise ConfigError(f"dtype={choices.dtype}: unknown dtype{closest(choices.dtype, DTYPES)}")
    if choices.device not in _DEVICES:
        raise ConfigError(
            f"device={choices.device}: unknown device{closest(choices.device, _DEVICES)}"
        )
    if choices.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda: torch sees no GPU here; use device=cpu, whose exports also run on GPUs, "
            "or export on a machine with a GPU"
        )


def _default_url(location: str, model: ExportedModel, format: Format) -> str:
    parts = ("ema" if model.averaged else "", model.choices.part, model.choices.dtype)
    suffix = "".join(f"-{part}" for part in parts if part) + format.suffix
    folder = str(local_path(location) or location)
    return f"{folder.rstrip('/')}/exports/step-{model.checkpoint.commit.step:08d}{suffix}"
