"""`format=safetensors`: one file that safetensors' own readers open, or a folder of shards.

A folder is laid out as Hugging Face does it: `model-00001-of-00002.safetensors`, …, and
`model.safetensors.index.json`, which says in which file each tensor is.
"""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.errors import ConfigError
from trainer.export.subject import Subject

SUFFIX = ".safetensors"
OPTIONS: Mapping[str, str] = {"max_shard_bytes": "5GB"}
HELP: Mapping[str, str] = {
    "max_shard_bytes": "above so many bytes, a folder of files that are no larger: 500MB, 2GiB"
}
LAST = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights; tensors that share storage are written once each, as the format needs."""
    most = _bytes("max_shard_bytes", options["max_shard_bytes"])
    seen: set[int] = set()
    separate = {}
    for name, tensor in subject.weights().items():
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    shards = _shards(separate, most)
    if len(shards) == 1:
        _save(separate, path)
        return
    path.mkdir()
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}{SUFFIX}"
        _save(shard, path / name)
        files |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in separate.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / LAST).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Fill one shard after the other; a tensor that is larger has one of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


def _bytes(key: str, text: str) -> int:
    """Return the number of bytes that a text such as `5GB` or `1.5 GiB` means."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?B|)", text.strip().upper())
    count = round(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if count < 1:
        raise ConfigError(f"{key}={text} is no number of bytes; write one such as {key}=500MB")
    return count
