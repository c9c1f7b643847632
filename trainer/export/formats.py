"""The table of export formats."""

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
from trainer.export.contract import Format, Runner
from trainer.export.destination import record_path

FORMATS: Mapping[str, Format] = {
    "safetensors": safetensors.FORMAT,
    "state_dict": state_dict.FORMAT,
    "full_model": full_model.FORMAT,
    "torchscript": torchscript.FORMAT,
    "torch_export": torch_export.FORMAT,
    "onnx": onnx.FORMAT,
    "openvino": openvino.FORMAT,
    "checkpoint": checkpoint.FORMAT,
    "bundle": bundle.FORMAT,
    "oneflow": oneflow.FORMAT,
}


def find(name: str) -> Format:
    """Return a format by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}{closest(name, FORMATS)}")
    return FORMATS[name]


def format_of(path: Path) -> str:
    """Return the format name of an export, from its record, or else from its suffix.

    Raises:
        ConfigError: the path does not exist, or has no known suffix.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    try:
        name = str(json.loads(record_path(path).read_bytes())["format"])
    except (OSError, ValueError, LookupError, TypeError):
        name = ""
    if name in FORMATS:
        return name
    names = [key for key, format in FORMATS.items() if path.name.endswith(format.suffix)]
    if not names:
        suffixes = ", ".join(format.suffix for format in FORMATS.values())
        raise ConfigError(f"{path} is not an export: expected a name that ends in {suffixes}")
    return max(names, key=lambda key: len(FORMATS[key].suffix))


def open_export(path: Path, device: str = "cpu", *, trusted: bool = False) -> Runner:
    """Open an export to run it.

    Args:
        path: the file or folder.
        device: `cpu` or `cuda`.
        trusted: allow pickles, which can run any code when opened.

    Raises:
        ConfigError: it has weights only, a requirement is missing, or it is an untrusted pickle.
        ExportError: it was altered.
    """
    name = format_of(path)
    open_runner = FORMATS[name].open_runner
    if open_runner is None:
        runnable = ", ".join(key for key, format in FORMATS.items() if format.open_runner)
        raise ConfigError(
            f"{path} has format {name}: weights only, which cannot be run; export the run again "
            f"with one of {runnable}"
        )
    if name == "full_model" and not trusted:
        raise ConfigError(
            f"{path} is a pickled module, which can run any code when opened. Pass trusted=true if "
            "you trust its author, or ask for torch_export, torchscript or onnx"
        )
    return open_runner(path, device)
