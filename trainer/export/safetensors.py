"""`format=safetensors`: one file that safetensors' own readers open."""

import errno
from pathlib import Path

from torch import Tensor

SUFFIX = ".safetensors"


def write(weights: dict[str, Tensor], path: Path) -> None:
    """Write the weights; tensors that share storage are written once each, as the format needs."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    try:
        save_file(separate, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
