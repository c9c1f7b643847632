"""`format=openvino`: OpenVINO's .xml and .bin files, converted from an ONNX graph."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.export.contract import Arrays, ExportError, Runner, library
from trainer.export.exported_model import ExportedModel
from trainer.export.onnx import save
from trainer.export.tracing import reason

_XML = "model.xml"


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write a folder with `model.xml` and `model.bin`, weights in their stored precision."""
    openvino = library("openvino", "openvino")
    path.mkdir()
    with tempfile.TemporaryDirectory(prefix="perdure-", dir=path.parent) as folder:
        file = Path(folder, "model.onnx")
        save(model, file, options["dynamic"], is_external=True)
        try:
            converted = openvino.Core().read_model(file)
            openvino.save_model(converted, path / _XML, compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO cannot read the model: {reason(error)}\nTry format=onnx"
            ) from None


def open_runner(path: Path, device: str) -> Runner:
    """Compile it for the CPU, in the precision of the weights."""
    openvino = library("openvino", "openvino")
    if device != "cpu":
        raise ConfigError(f"device={device}: OpenVINO runs on the CPU only here; use format=onnx")
    core = openvino.Core()
    try:
        model = core.read_model(path / _XML)
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 0}
        return _Runner(core.compile_model(model, "CPU", hints))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot open it: {reason(error)}") from None


class _Runner:
    """A compiled model; see `contract.Runner`."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._dtypes = {port.any_name: port.element_type.to_dtype() for port in compiled.inputs}
        self.inputs = list(self._dtypes)
        self.outputs = [port.any_name for port in compiled.outputs]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        arrays = {name: inputs[name].astype(dtype) for name, dtype in self._dtypes.items()}
        outputs = self._compiled(arrays)
        ports = zip(self.outputs, self._compiled.outputs, strict=True)
        return {name: outputs[port].copy() for name, port in ports}
