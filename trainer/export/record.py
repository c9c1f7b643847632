"""The record of an export, `<export>.json`: its origin, interface, parity check and checksums."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.lineage import now
from trainer.export.destination import files
from trainer.export.dynamic_axes import BATCH, DynamicAxes, halved, lengths
from trainer.export.exported_model import ExportedModel
from trainer.export.parity import Mismatch

VERSION = 1
_LIBRARIES = ("perdure", "torch", "numpy", "safetensors")
_PREPROCESSING = ("mean", "std", "crop_share", "classes")
"""Attributes of a data source that describe its preprocessing and its labels."""


def describe(
    model: ExportedModel,
    written: Path,
    format: str,
    options: Mapping[str, str],
    dynamic: DynamicAxes,
    mismatches: Sequence[Mismatch] | None,
    batch_sizes: Sequence[int] = (),
    libraries: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the record; docs/exports.md describes its keys.

    Args:
        model: the exported model.
        written: the file or folder.
        format: format name.
        options: options of the format.
        dynamic: axes whose sizes may vary.
        mismatches: results of the parity check; None for formats that cannot be run.
        batch_sizes: batch sizes of the parity check.
        libraries: packages of the format, in addition to torch.
    """
    checkpoint, choices = model.checkpoint, model.choices
    manifest = checkpoint.manifest
    state, node = manifest.objects.get("run"), manifest.config.get("model")
    state = state if isinstance(state, Mapping) else {}  # checkpoints of other loops have none
    record: dict[str, Any] = {
        "version": VERSION,
        "format": format,
        "options": dict(options),
        "step": checkpoint.commit.step,
        "epoch": manifest.epoch,
        "weights": "ema" if model.averaged else "model",
        "part": choices.part or None,
        "dtype": choices.dtype or None,
        "metrics": {
            "step": state.get("last_eval_step"), "figures": state.get("metrics"),
            "best": state.get("best"),
        },
        "source": {
            "place": checkpoint.location,
            "checkpoint": checkpoint.commit.folder,
            "model": node.get("_target_") if isinstance(node, Mapping) else None,
        },
        "made": now(),
        "versions": versions(libraries),
        "files": _files(written),
    }  # fmt: skip
    if mismatches is not None:
        record |= _interface(model, dynamic)
        record["parity"] = {
            "samples": model.sample_origin, "batch_sizes": list(batch_sizes),
            "device": choices.device, "outputs": [mismatch.as_json() for mismatch in mismatches],
        }  # fmt: skip
    return record


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """Return the record as stored."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def versions(libraries: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    entries = {"python": platform.python_version()}
    for name in (*_LIBRARIES, *libraries):
        try:
            entries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return entries


def _interface(model: ExportedModel, dynamic: DynamicAxes) -> dict[str, Any]:
    """Return names, dtypes and shapes of inputs and outputs, and the preprocessing."""
    count = 3 if dynamic.has_batch else 1
    inputs = model.inputs(count)
    axes = dynamic.of(inputs, count)
    variants = {name: halved(inputs, axes, [name]) for name in lengths(axes)}
    if dynamic.has_batch:
        variants[BATCH] = model.inputs(2)
    others = {name: model.compute(variant) for name, variant in variants.items()}
    return {
        "inputs": [
            _tensor(name, tensor, {label: v[name] for label, v in variants.items()}, axes[name])
            for name, tensor in inputs.items()
        ],
        "outputs": [
            _tensor(name, tensor, {label: o[name] for label, o in others.items()}, {})
            for name, tensor in model.compute(inputs).items()
        ],
        "preprocessing": _preprocessing(model),
    }


def _tensor(
    name: str, tensor: Tensor, others: Mapping[str, Tensor], axes: Mapping[int, str]
) -> dict[str, Any]:
    """Describe a tensor; a dynamic size is the name of the dynamic axis that it depends on.

    Args:
        name: of the tensor.
        tensor: the tensor.
        others: the tensor with other sizes of the dynamic axes, by their names.
        axes: names of axes that are known to be dynamic.
    """
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        names = [label for label, other in others.items() if other.shape[axis] != size]
        shape.append(axes.get(axis) or ",".join(names) or size)
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def _preprocessing(model: ExportedModel) -> dict[str, Any]:
    sample = model.run.sample
    preprocessing: dict[str, Any] = {"shape": list(sample.shape), "classes": sample.classes}
    for name in _PREPROCESSING:
        value = getattr(model.data, name, None)
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, str | int | float):
            preprocessing[name] = value
        elif isinstance(value, list | tuple):
            preprocessing[name] = list(value)
    preprocessing["data"] = model.run.data.get("_target_")
    return preprocessing


def _files(written: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 by relative file name; `.` for an export of a single file."""
    entries = {}
    for path in files(written):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[str(path.relative_to(written))] = {"bytes": path.stat().st_size, "sha256": digest}
    return entries
