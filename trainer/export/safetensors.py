"""`format=safetensors`: one file that safetensors' own readers open."""

import errno
from collections.abc import Mapping
from pathlib import Path

from trainer.export.subject import Subject

SUFFIX = ".safetensors"
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights; tensors that share storage are written once each, as the format needs."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    separate = {}
    for name, tensor in subject.weights().items():
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    try:
        save_file(separate, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
