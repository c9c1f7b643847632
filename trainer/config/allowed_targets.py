"""Which targets of a configuration that came with a checkpoint may be called."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import targets
from trainer.errors import ConfigError

ALLOWED = ("models", "torch.nn", "trainer.data", "trainer.task")
"""Packages and modules whose classes and functions a checkpoint may name."""


def refuse_targets(nodes: Mapping[str, Any], allowed: Sequence[str] = ()) -> None:
    """Refuse every `_target_` that is not allowed; nothing outside of `ALLOWED` is imported.

    A checkpoint may come from anybody, and a target is called with arguments that are in it too.

    Args:
        nodes: parts of a configuration by their keys, as deep as they are.
        allowed: more packages, modules or full names that the user trusts.

    Raises:
        ConfigError: a target is neither in `ALLOWED` nor in `allowed`.
    """
    trusted = (*ALLOWED, *allowed)
    refused = {
        key: target
        for key, target in _targets(nodes, "")
        if not (
            _is_below(target, trusted)
            and _is_at_home(target, trusted)
            and (_is_public(target) or target in allowed)
        )
    }
    if refused:
        listed = "".join(f"\n  {key}: {target}" for key, target in refused.items())
        names = ",".join(dict.fromkeys(refused.values()))
        raise ConfigError(
            "the checkpoint's configuration names what is not called unasked, since a checkpoint "
            f"may come from anybody:{listed}\nIf you trust it, repeat with allow={names}"
        )


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            inner = f"{key}.{name}" if key else str(name)
            if name == "_target_":
                yield inner, str(value)
            yield from _targets(value, inner)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{key}[{index}]")


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_public(target: str) -> bool:
    """Whether no part of the name is private: such helpers trust their arguments."""
    return not any(part.startswith("_") for part in target.split("."))


def _is_at_home(target: str, trusted: Sequence[str]) -> bool:
    """Whether it is defined in a trusted module, not only imported there, as `models.x.os` is."""
    if target in trusted:
        return True
    found, _ = targets.find(target)
    home = getattr(found, "__module__", None)
    return found is None or (isinstance(home, str) and _is_below(home, trusted))
