"""`format=oneflow`: OneFlow's folders, one per variable."""

from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.memory import bytes_of
from trainer.errors import CheckpointError
from trainer.export.contract import ExportError
from trainer.export.subject import Subject
from trainer.importing import oneflow
from trainer.importing.dcp_folder import inside

SUFFIX = ".oneflow"
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}
LAST = oneflow.DONE


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights; the folder says that it is whole last.

    Raises:
        ExportError: OneFlow has no such dtype, or no folder can have a tensor's name.
    """
    path.mkdir()
    for name, tensor in subject.weights().items():
        try:
            folder = path / inside(name, str(subject.source.place))
            text = oneflow.meta_text(tensor.dtype, tuple(tensor.shape))
        except CheckpointError as error:
            raise ExportError(f"tensor {name!r}: {error}; take format=safetensors") from None
        if "/" in name or name == oneflow.DONE:
            raise ExportError(f"no folder can have the tensor's name {name!r}; rename it")
        folder.mkdir()
        (folder / oneflow.META).write_text(text)
        with open(folder / oneflow.OUT, "wb") as file:
            if tensor.numel():
                file.write(bytes_of(tensor.contiguous()).data)
    (path / oneflow.DONE).touch()
