"""Every format by its name, and which one a file is of."""

import json
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigError, closest
from trainer.export import (
    bundle,
    checkpoint,
    full_model,
    oneflow,
    onnx,
    openvino,
    safetensors,
    state_dict,
    torch_export,
    torchscript,
)
from trainer.export.contract import Format, Runnable, Runner

FORMATS: Mapping[str, Format] = {
    "safetensors": safetensors,
    "state_dict": state_dict,
    "full_model": full_model,
    "torchscript": torchscript,
    "torch_export": torch_export,
    "onnx": onnx,
    "openvino": openvino,
    "checkpoint": checkpoint,
    "bundle": bundle,
    "oneflow": oneflow,
}
RECORD_SUFFIX = ".json"
"""After the name of the export: the name of the file that describes it."""


def runnable(name: str) -> Runnable | None:
    """Return the format if what it writes can be called."""
    found = FORMATS[name]
    return found if isinstance(found, Runnable) else None


def format_of(path: Path) -> str:
    """Return the name of the format of an export: as its record says, else as its name ends.

    Raises:
        ConfigError: there is no such file, or it is of no format.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    try:
        name = str(json.loads(record_path(path).read_bytes())["format"])
    except (OSError, ValueError, LookupError, TypeError):
        name = ""
    if name in FORMATS:
        return name
    fitting = [key for key, each in FORMATS.items() if path.name.endswith(each.SUFFIX)]
    if not fitting:
        suffixes = ", ".join(each.SUFFIX for each in FORMATS.values())
        raise ConfigError(f"{path} is no export that is known here; their names end in {suffixes}")
    return max(fitting, key=lambda key: len(FORMATS[key].SUFFIX))


def open_export(path: Path, device: str = "cpu", *, trusted: bool = False) -> Runner:
    """Open an export to call it.

    Args:
        path: the file or folder.
        device: `cpu` or `cuda`.
        trusted: whether a file may run code of its own when it is opened, as pickles do.

    Raises:
        ConfigError: it cannot be called, something that it needs is not here, or it is a pickle
            and not trusted.
        ExportError: it was altered.
    """
    name = format_of(path)
    format = runnable(name)
    if format is None:
        can = [key for key in FORMATS if runnable(key) is not None]
        raise ConfigError(
            f"{path} is {name}: weights without the model's computation, which cannot be run; "
            f"export the run again as one of {', '.join(can)}"
        )
    if name == "full_model" and not trusted:
        raise ConfigError(
            f"{path} is a pickled module, which may run any code when it is opened. If you trust "
            "who wrote it, say so: trusted=true; if not, ask for torch_export, torchscript or onnx"
        )
    return format.open_runner(path, device)


def record_path(path: Path) -> Path:
    """Return the path of the file that describes an export."""
    return path.with_name(path.name + RECORD_SUFFIX)


def find(name: str) -> Format:
    """Return a format.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}{closest(name, FORMATS)}")
    return FORMATS[name]
