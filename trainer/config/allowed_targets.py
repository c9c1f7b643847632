"""Allow-list of the targets that a configuration from a checkpoint may call."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import targets
from trainer.core.nested import dotted, leaves
from trainer.errors import ConfigError

ALLOWED = ("models", "torch.nn", "trainer.data", "trainer.task")
"""Packages and modules whose classes and functions a checkpoint may name."""


def reject_targets(nodes: Mapping[str, Any], allowed: Sequence[str] = ()) -> None:
    """Reject every `_target_` that is not on the allow-list; import nothing outside `ALLOWED`.

    Checkpoints may come from untrusted sources, and a target is called with arguments that are
    stored in the checkpoint too.

    Args:
        nodes: parts of a configuration by their keys; nested nodes are checked as well.
        allowed: more packages, modules or full names that the user trusts.

    Raises:
        ConfigError: a target is neither in `ALLOWED` nor in `allowed`.
    """
    trusted = (*ALLOWED, *allowed)
    rejected = {
        key: target
        for key, target in named_targets(nodes)
        if not (
            _is_below(target, trusted)
            and _is_defined_below(target, trusted)
            and (_is_public(target) or target in allowed)
        )
    }
    if rejected:
        listed = "".join(f"\n  {key}: {target}" for key, target in rejected.items())
        names = ",".join(dict.fromkeys(rejected.values()))
        raise ConfigError(
            "the checkpoint's configuration calls targets that are not on the allow-list; "
            f"checkpoints may come from untrusted sources:{listed}\n"
            f"If you trust it, repeat with allow={names}"
        )


def named_targets(nodes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every `_target_`."""
    for path, leaf in leaves(nodes):
        if "_target_" in path:
            yield dotted(path), str(leaf)


def _is_below(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_public(target: str) -> bool:
    """Return whether no part of the name is private; private helpers trust their arguments."""
    return not any(part.startswith("_") for part in target.split("."))


def _is_defined_below(target: str, trusted: Sequence[str]) -> bool:
    """Return whether a trusted module defines the target, not just imports it (`models.x.os`)."""
    if target in trusted:
        return True
    value, _ = targets.find(target)
    home = getattr(value, "__module__", None)
    return value is None or (isinstance(home, str) and _is_below(home, trusted))
