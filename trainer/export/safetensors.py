"""`format=safetensors`: one file, or a folder of shards.

The folder has Hugging Face's layout: `model-00001-of-00002.safetensors`, …, and
`model.safetensors.index.json`, which maps tensor names to files.
"""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.errors import ConfigError
from trainer.export.exported_model import ExportedModel

_INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights; the format has no shared storage, so shared tensors are copied."""
    max_bytes = _parse_bytes("max_shard_bytes", options["max_shard_bytes"])
    pointers: set[int] = set()
    separate = {}
    for name, tensor in model.weights().items():
        separate[name] = tensor.clone() if tensor.data_ptr() in pointers else tensor.contiguous()
        pointers.add(tensor.data_ptr())
    shards = _shards(separate, max_bytes)
    if len(shards) == 1:
        _save(separate, path)
        return
    path.mkdir()
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, path / name)
        files |= dict.fromkeys(shard, name)
    total_bytes = sum(tensor.nbytes for tensor in separate.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (path / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Split the tensors in order; a tensor larger than `max_bytes` gets a separate shard."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and shard_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += tensor.nbytes
    return shards


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


def _parse_bytes(key: str, text: str) -> int:
    """Return the number of bytes in a text such as `5GB` or `1.5 GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?B|)", text.strip().upper())
    count = round(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ConfigError(f"{key}={text} is not a size in bytes; write e.g. {key}=500MB")
    return count
