"""`format=onnx`: a graph of ONNX operators, from torch's exporter, for onnxruntime and others."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram

from trainer.errors import ConfigError
from trainer.export.contract import Arrays, ExportError, Runner, is_true, library
from trainer.export.dynamic_axes import Axes
from trainer.export.exported_model import ExportedModel
from trainer.export.torch_export import captured
from trainer.export.tracing import Signature, quiet, reason

_MODEL = "model.onnx"
"""Model file in a folder with external data; the data file is `model.onnx.data`."""
_MAX_BYTES = 1_900_000_000
"""Maximum bytes of weights in one file; protobuf limits a message to 2 GiB."""
_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write a checked model with inferred shapes; with external data, a folder of two files."""
    max_bytes, opset = _number(options, "external_bytes"), _number(options, "opset")
    tensors = {t.data_ptr(): t for t in model.module.state_dict().values()}.values()
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    is_external = weights_bytes > min(_MAX_BYTES if max_bytes is None else max_bytes, _MAX_BYTES)
    simplify = is_true(options, "simplify")
    if simplify and is_external:
        raise ConfigError(
            f"simplify=true needs one file, but {weights_bytes:,} bytes of weights go to a "
            f"separate one; raise external_bytes, up to {_MAX_BYTES:,}"
        )
    slim = library("onnxslim").slim if simplify else None
    file = path / _MODEL if is_external else path
    file.parent.mkdir(parents=True, exist_ok=True)
    save(model, file, options["dynamic"], opset, is_external=is_external)
    onnx = library("onnx")
    if slim is not None:
        onnx.save_model(slim(onnx.load(file)), os.fspath(file))
    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"ONNX's checker rejects the model: {reason(error)}\nTry a newer operator version, "
            "such as opset=22 for bfloat16, or format=torch_export"
        ) from None


def save(
    model: ExportedModel, file: Path, dynamic: str, opset: int | None = None, *, is_external: bool
) -> None:
    """Write the model with the recorded names and inferred shapes; external data as `file`.data.

    Raises:
        ExportError: the graph cannot be captured, or ONNX has no equivalent of an operator.
    """
    onnx = library("onnx")
    library("onnxscript")
    program, signature, axes = captured(model, dynamic)
    try:
        with quiet():
            exported = _converted(program, signature, opset)
            exported.save(os.fspath(file), external_data=is_external)
            proto = onnx.load(file, load_external_data=False)
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception as error:  # the exporter can raise any type
        if isinstance(error, OSError):
            raise
        raise ExportError(
            f"the model cannot be written as ONNX: {reason(error)}\nformat=torch_export and "
            "format=torchscript have every operator of torch"
        ) from None
    written = next(opset.version for opset in proto.opset_import if not opset.domain)
    if opset not in (None, written):
        raise ConfigError(
            f"opset={opset} cannot be written, but {written} can; torch's exporter supports 18 "
            "and some later versions, and lower ones if this model's operators allow it"
        )
    _tidy(proto, axes)
    onnx.save_model(proto, os.fspath(file))


def _converted(program: ExportedProgram, signature: Signature, opset: int | None) -> Any:
    """Convert to ONNX; decompose the graph first if the exporter's decomposition contradicts it.

    With scaled_dot_product_attention, its first pass replaces reshape by view for the strides of a
    fused kernel, which its second pass then does not find (torch 2.13).
    """
    convert = partial(
        torch.onnx.export, input_names=signature.inputs, output_names=signature.outputs,
        opset_version=opset, dynamo=True, verbose=False,
    )  # fmt: skip
    try:
        return convert(program, ())
    except Exception as error:
        if "Cannot view a tensor" not in str(error):
            raise
    return convert(program.run_decompositions(), ())


def _tidy(proto: Any, axes: Axes) -> None:
    """Name the dynamic axes, and remove metadata, which has paths of this machine."""
    names: dict[str, str] = {}
    for tensor in proto.graph.input:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if dim.dim_param:
                names.setdefault(dim.dim_param, axes[tensor.name][axis])
    tensors = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    for tensor in tensors:
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    for node in (proto, proto.graph, *proto.graph.node, *tensors):
        del node.metadata_props[:]


def open_runner(path: Path, device: str) -> Runner:
    """Open it with onnxruntime."""
    runtime = library("onnxruntime")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    available = runtime.get_available_providers()
    if provider not in available:
        raise ConfigError(
            f"device={device}: onnxruntime has {', '.join(available)}, not {provider}; install "
            "onnxruntime-gpu instead, or use the CPU"
        )
    file = path / _MODEL if path.is_dir() else path
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    try:
        session = runtime.InferenceSession(os.fspath(file), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(
            f"onnxruntime cannot open it: {reason(error)}\nMany operators have no CPU kernel for "
            "bfloat16; use fp32 or fp16"
        ) from None
    return _Runner(session)


class _Runner:
    """An onnxruntime session; see `contract.Runner`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._dtypes = {item.name: _DTYPES[item.type] for item in session.get_inputs()}
        self.inputs = list(self._dtypes)
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.ascontiguousarray(inputs[name], dtype=dtype)
            for name, dtype in self._dtypes.items()
        }
        return dict(zip(self.outputs, self._session.run(self.outputs, arrays), strict=True))


def _number(options: Mapping[str, str], key: str) -> int | None:
    if not options[key]:
        return None
    if not options[key].isdecimal():
        raise ConfigError(f"{key}={options[key]} is not an integer")
    return int(options[key])
