"""Arguments of a changed `_target_`: only those that are written next to it.

Hydra merges a node of a user's file or of the command line onto the node of the chosen group file.
With another `_target_`, the file's arguments belong to the old one and would silently override the
defaults of the new one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_GROUPS = ("model", "data", "task", "optimizer", "scheduler", "tracker")

_EMPTY = "empty"
"""Name of an empty file of a group, which Hydra needs in place of none."""


def drop_inherited(composed: DictConfig) -> None:
    """Remove the group file's arguments of every node whose `_target_` is another one.

    Needs an initialized Hydra, and the HydraConfig of this composition.

    Args:
        composed: the configuration; changed.
    """
    from hydra import compose
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    texts: Any = OmegaConf.to_container(settings.overrides, resolve=False)
    for group in _GROUPS:
        choice = settings.runtime.choices.get(group)
        if choice in (None, "null"):
            continue
        names = [choice] if isinstance(choice, str) else list(choice)
        files = [_read(group, name, settings.runtime.config_sources) for name in names]
        merged, file = _plain(composed, group), _plain(OmegaConf.merge(*files), group)
        if not _has_other_target(merged, file):
            continue
        ConfigStore.instance().store(group=group, name=_EMPTY, node={})
        others = [text for text in texts["task"] if text.lstrip("+").partition("=")[0] != group]
        deleted = [text for text in others if text.startswith(f"~{group}.")]
        others = [text for text in others if text not in deleted]
        overrides = [*texts["hydra"], *others, f"{group}={_EMPTY}"]
        user = _plain(compose(settings.job.config_name, overrides), group)
        for text in deleted:  # after composing: the file's arguments are not there to be deleted
            _delete(user, text.removeprefix(f"~{group}.").partition("=")[0].split("."))
        composed[group] = without_inherited(merged, user, file)


def _read(group: str, name: str, sources: Any) -> DictConfig:
    """Return a group's file from the first source that has it; `{}` if it is not a plain file."""
    for source in sources:
        path = Path(source.path, group, f"{name.removesuffix('.yaml')}.yaml")
        if source.schema == "file" and path.is_file():
            node = OmegaConf.create(path.read_text())
            is_global = re.search(r"^#\s*@package\s+_global_", path.read_text(), re.MULTILINE)
            return node if is_global else OmegaConf.create({group: node})  # type: ignore[return-value]
    return OmegaConf.create({})


def without_inherited(
    merged: Mapping[str, Any], user: Mapping[str, Any], file: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `merged`, which is `user` merged onto `file`; a node with another target as in `user`.

    Args:
        merged: the composed node.
        user: the same node without the group's file.
        file: the node in the group's file.
    """
    if _is_other(user, file):
        return dict(user)
    result = dict(merged)
    for key, value in merged.items():
        parts = value, user.get(key), file.get(key)
        if all(isinstance(part, Mapping) for part in parts):
            result[key] = without_inherited(*parts)  # type: ignore[arg-type]
    return result


def _delete(node: dict[str, Any], path: Sequence[str]) -> None:
    *parents, key = path
    for parent in parents:
        node = node.get(parent, {})
    node.pop(key, None)


def _is_other(node: Mapping[str, Any], file: Mapping[str, Any]) -> bool:
    return "_target_" in node and "_target_" in file and node["_target_"] != file["_target_"]


def _has_other_target(node: Mapping[str, Any], file: Mapping[str, Any]) -> bool:
    return _is_other(node, file) or any(
        isinstance(value, Mapping)
        and isinstance(file.get(key), Mapping)
        and _has_other_target(value, file[key])
        for key, value in node.items()
    )


def _plain(node: Any, group: str) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    value = plain.get(group)
    return value if isinstance(value, dict) else {}
