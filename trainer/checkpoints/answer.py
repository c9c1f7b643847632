"""Values that the verbs of `python -m trainer.checkpoints` return, and the locations they open."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.dtypes import DTYPES
from trainer.checkpoint.inspection import CheckpointStatus
from trainer.checkpoint.location import Location, find_location, open_location
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.shard import element_count
from trainer.config.schema import ObjectStore, setting
from trainer.core.formatting import iso
from trainer.errors import ConfigError
from trainer.storage import local_path

Answer = tuple[int, Mapping[str, Any], str]
"""Exit code, content for `--json`, and text."""

_JSON_STATES = {"intact": "whole", "orphaned": "litter"}
"""Values of the JSON format for states that have another name in text."""


@dataclass(frozen=True)
class OneStep:
    """Options of a verb that reads one checkpoint."""

    step: str = setting("latest", "latest, best, or a number")


@dataclass(frozen=True)
class AllSteps(OneStep):
    """Options of a verb that reads all checkpoints, or one."""

    step: str = setting("all", "all, latest, best, or a number")


def open_checkpoints(url: str, settings: ObjectStore) -> Location:
    """Open a location. For another program's checkpoint, the error explains how to convert it.

    Raises:
        ConfigError: the path has no Perdure checkpoint.
    """
    location = find_location(url, settings)
    if location is not None:
        return location
    path = local_path(url)
    if path is not None and not path.exists():
        return open_location(url, settings)  # raises
    from trainer.importing.formats import open_external  # slow to import

    external = open_external(url, settings)
    if external is not None:
        raise ConfigError(
            f"{url} is {external.kind}: convert it with `python -m trainer.checkpoints copy {url} "
            f"FOLDER`, or start a run from its weights with init.weights={url}"
        )
    return open_location(url, settings)


def status_json(status: CheckpointStatus) -> dict[str, Any]:
    """Return a checkpoint's status for `--json`."""
    manifest, saved_s = status.manifest, status.saved_s
    return {
        "step": status.commit.step,
        "attempt": status.commit.attempt,
        "folder": status.commit.folder,
        "state": _JSON_STATES.get(status.state, status.state),
        "why": status.reason or None,
        "bytes": status.size_bytes,
        "saved": None if saved_s is None else iso(saved_s),
        "metrics": status.metrics,
        "world_size": manifest.world_size if manifest else None,
        "epoch": manifest.epoch if manifest else None,
        "samples": manifest.samples if manifest else None,
    }


def files_bytes(manifest: Manifest) -> int:
    """Return the size of a checkpoint's files."""
    return sum(file.bytes for file in manifest.files.values())


def tensor_bytes(entry: TensorEntry) -> int:
    """Return a tensor's size; 0 for another name of a tensor."""
    return 0 if entry.alias else element_count(entry.shape) * DTYPES[entry.dtype]
