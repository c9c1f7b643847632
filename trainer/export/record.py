"""The file beside an export that says what it is: `<export>.json`."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.lineage import now
from trainer.export.parity import Difference
from trainer.export.subject import Subject
from trainer.export.target import files

VERSION = 1
_LIBRARIES = ("perdure", "torch", "numpy", "safetensors")
_PREPROCESSING = ("mean", "std", "crop_share", "classes")
"""Attributes of a data source that say how its inputs were made, and what its labels are."""


def describe(
    subject: Subject,
    written: Path,
    format: str,
    options: Mapping[str, str],
    differences: Sequence[Difference] | None,
    sizes: Sequence[int] = (),
    libraries: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the record says; see docs/exports.md.

    Args:
        subject: what was exported.
        written: the file or folder.
        format: name of the format.
        options: its options.
        differences: from the model's answers; None for formats that cannot be run.
        sizes: of the batches that were compared.
        libraries: of the format, besides torch.
    """
    source, choices = subject.source, subject.choices
    state, model = source.manifest.objects.get("run"), source.manifest.config.get("model")
    state = state if isinstance(state, Mapping) else {}  # what other loops saved has its own
    found: dict[str, Any] = {
        "version": VERSION,
        "format": format,
        "options": dict(options),
        "step": source.commit.step,
        "epoch": source.manifest.epoch,
        "weights": "ema" if choices.averaged else "model",
        "part": choices.part or None,
        "dtype": choices.dtype or None,
        "metrics": {
            "step": state.get("last_eval_step"), "figures": state.get("metrics"),
            "best": state.get("best"),
        },
        "source": {
            "place": source.place,
            "checkpoint": source.commit.folder,
            "model": model.get("_target_") if isinstance(model, Mapping) else None,
        },
        "made": now(),
        "versions": versions(libraries),
        "files": dict(_files(written)),
    }  # fmt: skip
    if differences is not None:
        found |= _interface(subject)
        found["parity"] = {
            "samples": subject.origin, "batch_sizes": list(sizes), "device": choices.device,
            "outputs": [difference.as_json() for difference in differences],
        }  # fmt: skip
    return found


def to_bytes(found: Mapping[str, Any]) -> bytes:
    """Return the record as it is stored."""
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def versions(libraries: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of installed libraries."""
    found = {"python": platform.python_version()}
    for name in (*_LIBRARIES, *libraries):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _interface(subject: Subject) -> dict[str, Any]:
    """Return names, dtypes and shapes of inputs and outputs, and how inputs were made."""
    few, more = subject.inputs(2), subject.inputs(3)
    answers, other = subject.answer(few), subject.answer(more)
    return {
        "inputs": [_described(name, few[name], more[name]) for name in few],
        "outputs": [_described(name, answers[name], other[name]) for name in answers],
        "preprocessing": _preprocessing(subject),
    }


def _described(name: str, tensor: Tensor, other: Tensor) -> dict[str, Any]:
    sizes = zip(tensor.shape, other.shape, strict=True)
    shape = [size if size == second else "batch" for size, second in sizes]
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def _preprocessing(subject: Subject) -> dict[str, Any]:
    sample = subject.run.sample
    found: dict[str, Any] = {"shape": list(sample.shape), "classes": sample.classes}
    for name in _PREPROCESSING:
        value = getattr(subject.data, name, None)
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, str | int | float):
            found[name] = value
        elif isinstance(value, list | tuple):
            found[name] = list(value)
    found["data"] = subject.run.data.get("_target_")
    return found


def _files(written: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return name, bytes and SHA-256 of each file; `.` is the export itself where it is one."""
    found = []
    for path in files(written):
        name = "." if path == written else str(path.relative_to(written))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append((name, {"bytes": path.stat().st_size, "sha256": digest}))
    return found
