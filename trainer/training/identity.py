"""Digests of the configuration and of the code that an attempt runs."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainer.config import targets
from trainer.core import sources
from trainer.core.nested import flatten

_IGNORED = (
    "launch.forgive",
    "launch.max_attempts_without_progress",
    "launch.max_losses_without_progress",
)
"""Settings that change when an attempt may start, not what it does."""


def identity(config: Mapping[str, Any], world_size: int) -> dict[str, str]:
    """Return the values of an attempt's record that identify its configuration and code.

    Imports the configuration's targets.

    Args:
        config: the configuration as stored in checkpoints.
        world_size: number of ranks.
    """
    settings = {key: value for key, value in flatten(config).items() if key not in _IGNORED}
    text = json.dumps([settings, world_size], sort_keys=True, default=str)
    return {"config_digest": _digest(text.encode()), "code_digest": _code_digest(config)}


def _code_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of all source files of Perdure, of the targets, and of what these import.

    Installed libraries do not count, except for torch's version and modules that a target names.
    """
    files = {str(path.relative_to(sources.PROJECT)): path for path in sources.PROJECT.rglob("*.py")}
    named = set()
    for target in _targets(config):
        value, _ = targets.find(target)
        named.add(getattr(value, "__module__", None))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or file.startswith(f"{sources.PROJECT}/"):
            continue
        if file.endswith(".py") and (name in named or not sources.is_library(file)):
            files[name] = Path(file)
    lines = [str(torch.__version__)]
    for name in sorted(files):
        with suppress(OSError):  # a file that was deleted since its import
            lines.append(f"{name} {_digest(files[name].read_bytes())}")
    return _digest("\n".join(lines).encode())


def _targets(node: Any) -> Iterator[str]:
    """Return all `_target_`s in a configuration."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
