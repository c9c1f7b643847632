"""`format=onnx`: a graph of ONNX operators, from torch's exporter, for onnxruntime and others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError
from trainer.export.contract import Arrays, ExportError, Runner, is_true, library
from trainer.export.subject import Subject
from trainer.export.torch_export import axis_name, captured
from trainer.export.tracing import quiet, reason

SUFFIX = ".onnx"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime", "onnxslim")
OPTIONS: Mapping[str, str] = {
    "dynamic": "batch", "opset": "", "simplify": "false", "external_bytes": "1500000000",
}  # fmt: skip
HELP: Mapping[str, str] = {
    "dynamic": "axes of every input that may have other sizes: batch, none, or such as batch,1",
    "opset": "version of the operators; empty: the one that torch's exporter is written for",
    "simplify": "true lets onnxslim fold and remove what is not needed",
    "external_bytes": "weights above this many bytes lie in a file of their own, in a folder",
}
MODEL = "model.onnx"
"""In the folder of a model with external data; the data's name has `.data` besides."""
_MOST_BYTES = 1_900_000_000
"""Of weights in one file; protobuf has a limit of 2 GiB for a message."""
_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write a checked model with inferred shapes; with external data, a folder of two files."""
    most_bytes, opset = _number(options, "external_bytes"), _number(options, "opset")
    tensors = {each.data_ptr(): each for each in subject.model().state_dict().values()}.values()
    weights_bytes = sum(each.numel() * each.element_size() for each in tensors)
    is_external = weights_bytes > min(
        _MOST_BYTES if most_bytes is None else most_bytes, _MOST_BYTES
    )
    simplify = is_true(options, "simplify")
    if simplify and is_external:
        raise ConfigError(
            f"simplify=true needs one file, and {weights_bytes:,} bytes of weights get one of "
            f"their own; raise external_bytes, up to {_MOST_BYTES:,}"
        )
    slim = library("onnxslim").slim if simplify else None
    file = path / MODEL if is_external else path
    file.parent.mkdir(parents=True, exist_ok=True)
    save(subject, file, options["dynamic"], opset, is_external=is_external)
    onnx = library("onnx")
    if slim is not None:
        onnx.save_model(slim(onnx.load(file)), os.fspath(file))
    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"ONNX's own checker refuses the model: {reason(error)}\nA newer version of the "
            "operators may allow it, such as opset=22 for bfloat16; format=torch_export does"
        ) from None


def save(
    subject: Subject, file: Path, dynamic: str, opset: int | None = None, *, is_external: bool
) -> None:
    """Write the model with its own names and inferred shapes; external data as `file`.data.

    Raises:
        ExportError: its graph cannot be captured, or has an operator that ONNX has not.
    """
    onnx = library("onnx")
    library("onnxscript")
    program, names = captured(subject, dynamic)
    try:
        with quiet():
            made: Any = torch.onnx.export(
                program, (), input_names=names.inputs, output_names=names.outputs,
                opset_version=opset, dynamo=True, verbose=False,
            )  # fmt: skip
            made.save(os.fspath(file), external_data=is_external)
            found = onnx.load(file, load_external_data=False)
            found = onnx.shape_inference.infer_shapes(found, data_prop=True)
    except Exception as error:  # of any kind that the exporter raises
        if isinstance(error, OSError):
            raise
        raise ExportError(
            f"the model cannot be written in ONNX: {reason(error)}\nformat=torch_export has every "
            "operator of torch, and format=torchscript too"
        ) from None
    written = next(each.version for each in found.opset_import if not each.domain)
    if opset not in (None, written):
        raise ConfigError(
            f"opset={opset} cannot be written, but {written} can; torch's exporter knows 18 and "
            "some later ones, and lower ones as far as this model's operators allow"
        )
    _tidy(found)
    onnx.save_model(found, os.fspath(file))


def _tidy(found: Any) -> None:
    """Name the dynamic axes, and remove notes, which hold paths of this machine."""
    names: dict[str, str] = {}
    for each in found.graph.input:
        for axis, dim in enumerate(each.type.tensor_type.shape.dim):
            if dim.dim_param:
                names.setdefault(dim.dim_param, axis_name(axis))
    described = (*found.graph.input, *found.graph.output, *found.graph.value_info)
    for each in described:
        for dim in each.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    for noted in (found, found.graph, *found.graph.node, *described):
        del noted.metadata_props[:]


def open_runner(path: Path, device: str = "cpu") -> Runner:
    """Open it with onnxruntime."""
    runtime = library("onnxruntime")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    there = runtime.get_available_providers()
    if provider not in there:
        raise ConfigError(
            f"device={device}: onnxruntime has {', '.join(there)} here, not {provider}; install "
            "onnxruntime-gpu in its place, or use the CPU"
        )
    file = path / MODEL if path.is_dir() else path
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    try:
        session = runtime.InferenceSession(os.fspath(file), options, providers=[provider])
    except Exception as error:  # onnxruntime's own, which share no base but this
        raise ExportError(
            f"onnxruntime cannot open it: {reason(error)}\nIts CPU kernels lack many operators of "
            "bfloat16; fp32 and fp16 have them"
        ) from None
    return _Runner(session)


class _Runner:
    """A session of onnxruntime; see `contract.Runner`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._dtypes = {each.name: _DTYPES[each.type] for each in session.get_inputs()}
        self.inputs = list(self._dtypes)
        self.outputs = [each.name for each in session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        given: dict[str, npt.NDArray[Any]] = {
            name: np.ascontiguousarray(inputs[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
        }
        return dict(zip(self.outputs, self._session.run(self.outputs, given), strict=True))


def _number(options: Mapping[str, str], key: str) -> int | None:
    if not options[key]:
        return None
    if not options[key].isdecimal():
        raise ConfigError(f"{key}={options[key]} is not a whole number")
    return int(options[key])
