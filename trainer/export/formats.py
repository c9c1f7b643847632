"""The table of export formats."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, closest
from trainer.export.contract import Format, Option, Runner
from trainer.export.destination import record_path


def _in(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a format's module, which imports torch and is imported on use."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"trainer.export.{module}"), function)(*arguments)

    return call


_DYNAMIC = Option(
    "batch", "axes that may vary in size: none, batch, batch,1, or by input 'batch;NAME:1=LENGTH;…'"
)
"""The option `dynamic` of the formats that capture a graph."""

FORMATS: Mapping[str, Format] = {
    "safetensors": Format(
        suffix=".safetensors",
        write=_in("safetensors", "write"),
        options={"max_shard_bytes": Option("5GB", "maximum bytes per file, e.g. 500MB or 2GiB")},
        last_file="model.safetensors.index.json",
    ),
    "state_dict": Format(suffix=".pt", write=_in("state_dict", "write")),
    "full_model": Format(
        suffix=".full.pt",
        write=_in("full_model", "write"),
        open_runner=_in("full_model", "open_runner"),
        warning=(
            "warning: a pickled module runs code when it is loaded, and needs the model's code "
            "unchanged. Load it only if you trust its author, and share another format"
        ),
    ),
    "torchscript": Format(
        suffix=".ts",
        write=_in("torchscript", "write"),
        open_runner=_in("torchscript", "open_runner"),
        options={
            "method": Option("auto", "script, which keeps branches and loops; trace; or auto"),
            "traced": Option("", "submodules of a scripted model to trace, separated by commas"),
            "freeze": Option("false", "true: fold the weights into the graph, for inference only"),
        },
    ),
    "torch_export": Format(
        suffix=".pt2",
        write=_in("torch_export", "write"),
        open_runner=_in("torch_export", "open_runner"),
        options={"dynamic": _DYNAMIC},
    ),
    "onnx": Format(
        suffix=".onnx",
        write=_in("onnx", "write"),
        open_runner=_in("onnx", "open_runner"),
        options={
            "dynamic": _DYNAMIC,
            "opset": Option("", "operator version; empty: the default of torch's exporter"),
            "simplify": Option("false", "true: fold and remove redundant operators with onnxslim"),
            "external_bytes": Option(
                "1500000000", "above this many bytes, weights go to a separate file, in a folder"
            ),
        },
        libraries=("onnx", "onnxscript", "onnxruntime", "onnxslim"),
    ),
    "openvino": Format(
        suffix=".openvino",
        write=_in("openvino", "write"),
        open_runner=_in("openvino", "open_runner"),
        options={"dynamic": _DYNAMIC},
        libraries=("onnx", "onnxscript", "openvino"),
        last_file="model.xml",
    ),
    "checkpoint": Format(suffix=".ckpt", write=_in("checkpoint", "write"), resumes=True),
    # as in PyTorch's tutorial on saving several models
    "bundle": Format(suffix=".tar", write=_in("bundle", "write"), resumes=True),
    "oneflow": Format(suffix=".oneflow", write=_in("oneflow", "write"), last_file="snapshot_done"),
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
