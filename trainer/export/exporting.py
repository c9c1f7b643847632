"""An export from beginning to end: write, run, compare, describe, publish."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, closest
from trainer.export import parity, record
from trainer.export.contract import Format
from trainer.export.formats import FORMATS, find, runnable
from trainer.export.parity import Difference
from trainer.export.source import open_source
from trainer.export.subject import DTYPES, Choices, Subject
from trainer.export.target import Target, files
from trainer.export.torch_export import axes_of
from trainer.storage import local_path

_DEVICES = ("cpu", "cuda")
_SIZES = (1, 2, 5)
"""Of the batches that are compared."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    url: str
    """Of the file or folder."""
    bytes: int
    """Of all its files."""
    tensors: int
    """How many of the checkpoint's are in it, under all their names."""
    warning: str
    """What a person should know of this format, or nothing."""
    record: Mapping[str, Any]
    """What the file beside it says."""
    differences: Sequence[Difference] | None
    """From the model's answers; None where the format cannot be run."""

    @property
    def path(self) -> Path:
        """Where it is on this machine's file systems."""
        return Path(self.url)


def export(
    place: str,
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
    """Export a checkpoint. One process, no process group; durable, or nothing, when it returns.

    Args:
        place: a run's directory, a folder of checkpoints, or the folder of one.
        format: a name in `formats.FORMATS`.
        step: `latest`, `best` or the number of one.
        out: the file or folder; empty: in the run's `exports/`.
        choices: what of the checkpoint, and how.
        options: of the format.
        atol: see `parity.compare`.
        rtol: see `parity.compare`.
        store: how object stores are reached.

    Raises:
        ConfigError: something that was asked for is not there, or cannot be.
        ExportError: the model cannot be written so, or the export does not answer as it does.
        DamagedError: the checkpoint's bytes are wrong.
    """
    module = find(format)
    chosen = _options(format, module, options or {})
    _check(choices)
    source = open_source(place, step, store)
    subject = Subject(source, choices)
    target = Target(out or _default(place, source.commit.step, choices, module), store)
    can_run = runnable(format)
    sizes = () if can_run is None else (1,) if chosen.get("dynamic") == "none" else _SIZES
    with target.temporary() as path:
        if can_run is not None:
            parity.refuse_chance(subject)
        module.write(subject, path, chosen)
        differences = None
        if can_run is not None:
            runner = can_run.open_runner(path, choices.device)
            differences = parity.compare(
                subject, runner, _batches(subject, sizes, chosen), atol=atol, rtol=rtol
            )
        found = record.describe(
            subject, path, format, chosen, differences, sizes, getattr(module, "LIBRARIES", ())
        )
        size_bytes = sum(file.stat().st_size for file in files(path))
        target.publish(path, record.to_bytes(found), last=getattr(module, "LAST", ""))
    return Exported(
        str(target.path or target.url),
        size_bytes,
        len(subject.tensor_names()),
        getattr(module, "WARNING", ""),
        found,
        differences,
    )


def _options(name: str, module: Format, given: Mapping[str, str]) -> dict[str, str]:
    for key in given:
        if key not in module.OPTIONS:
            others = [other for other, each in FORMATS.items() if key in each.OPTIONS]
            of = f"; it is one of format={' and '.join(others)}" if others else ""
            raise ConfigError(
                f"format={name} has no option {key!r}{of or closest(key, module.OPTIONS)}"
            )
    return {**module.OPTIONS, **given}


def _batches(
    subject: Subject, sizes: Sequence[int], options: Mapping[str, str]
) -> list[dict[str, Tensor]]:
    """Return batches of these sizes, and one that is shorter along every other dynamic axis."""
    batches = [subject.inputs(size) for size in sizes]
    others = [axis for axis in axes_of(options.get("dynamic", "none")) if axis]
    if others:
        shorter = dict(batches[-1])
        for axis in others:
            for name, tensor in shorter.items():
                if axis < tensor.ndim:
                    shorter[name] = tensor.narrow(axis, 0, max(tensor.shape[axis] // 2, 1))
        batches.append(shorter)
    return batches


def _check(choices: Choices) -> None:
    if choices.dtype and choices.dtype not in DTYPES:
        raise ConfigError(
            f"dtype={choices.dtype}: there is no such{closest(choices.dtype, DTYPES)}"
        )
    if choices.device not in _DEVICES:
        raise ConfigError(
            f"device={choices.device}: there is no such{closest(choices.device, _DEVICES)}"
        )
    if choices.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda: torch sees no GPU here; export on the CPU (device=cpu), which gives "
            "files that a GPU can run too, or on a machine that has one"
        )


def _default(place: str, step: int, choices: Choices, module: Format) -> str:
    parts = ("ema" if choices.averaged else "", choices.part, choices.dtype)
    name = f"step-{step:08d}{''.join(f'-{part}' for part in parts if part)}{module.SUFFIX}"
    folder = str(local_path(place) or place)
    return f"{folder.rstrip('/')}/exports/{name}"
