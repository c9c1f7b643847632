"""`format=oneflow`: OneFlow's layout, one folder per variable."""

from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.memory import bytes_of
from trainer.errors import CheckpointError
from trainer.export.contract import ExportError
from trainer.export.exported_model import ExportedModel
from trainer.importing import oneflow
from trainer.importing.dcp_folder import relative_path


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights, and last the file that marks the folder as complete.

    Raises:
        ExportError: OneFlow has no equivalent dtype, or a tensor name cannot be a folder name.
    """
    path.mkdir()
    for name, tensor in model.weights().items():
        try:
            folder = path / relative_path(name, model.checkpoint.location)
            text = oneflow.meta_text(tensor.dtype, tuple(tensor.shape))
        except CheckpointError as error:
            raise ExportError(f"tensor {name!r}: {error}; use format=safetensors") from None
        if "/" in name or name == oneflow.DONE:
            raise ExportError(f"the tensor name {name!r} cannot be a folder name; rename it")
        folder.mkdir()
        (folder / oneflow.META).write_text(text)
        with open(folder / oneflow.OUT, "wb") as file:
            if tensor.numel():
                file.write(bytes_of(tensor.contiguous()).data)
    (path / oneflow.DONE).touch()
