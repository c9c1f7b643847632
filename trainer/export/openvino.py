"""`format=openvino`: OpenVINO's own files, an .xml and a .bin, by way of the ONNX graph."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.export.contract import Arrays, ExportError, Runner, library
from trainer.export.onnx import save
from trainer.export.subject import Subject
from trainer.export.tracing import reason

SUFFIX = ".openvino"
LIBRARIES = ("onnx", "onnxscript", "openvino")
LAST = "model.xml"
OPTIONS: Mapping[str, str] = {"dynamic": "batch"}
HELP: Mapping[str, str] = {
    "dynamic": "axes of every input that may have other sizes: batch, none, or such as batch,1",
}


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write a folder with `model.xml` and `model.bin`, weights in the precision that they have."""
    openvino = library("openvino", "openvino")
    path.mkdir()
    with tempfile.TemporaryDirectory(prefix="perdure-", dir=path.parent) as folder:
        file = Path(folder, "model.onnx")
        save(subject, file, options["dynamic"], is_external=True)
        try:
            found = openvino.Core().read_model(file)
            openvino.save_model(found, path / LAST, compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO cannot read the model: {reason(error)}\nformat=onnx may do"
            ) from None


def open_runner(path: Path, device: str = "cpu") -> Runner:
    """Compile it for the CPU, in the precision of the weights."""
    openvino = library("openvino", "openvino")
    if device != "cpu":
        raise ConfigError(f"device={device}: this runs OpenVINO on the CPU alone; use format=onnx")
    core = openvino.Core()
    try:
        model = core.read_model(path / LAST)
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 0}
        return _Runner(core.compile_model(model, "CPU", hints))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot open it: {reason(error)}") from None


class _Runner:
    """A compiled model; see `contract.Runner`."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._dtypes = {each.any_name: each.element_type.to_dtype() for each in compiled.inputs}
        self.inputs = list(self._dtypes)
        self.outputs = [each.any_name for each in compiled.outputs]

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        given = {name: inputs[name].astype(dtype) for name, dtype in self._dtypes.items()}
        found = self._compiled(given)
        ports = zip(self.outputs, self._compiled.outputs, strict=True)
        return {name: found[port].copy() for name, port in ports}
