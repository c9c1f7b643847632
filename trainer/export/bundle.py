"""`format=bundle`: several models and their optimizers in one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.export.checkpoint import extra_state, has_averages, progress, save
from trainer.export.subject import Subject
from trainer.export.updates import refuse_changes, updates

SUFFIX = ".tar"
"""As in PyTorch's tutorial on saving several models; what is in it is torch.save's."""
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}
_OWN = "model"
"""Stands for the tensors of the model itself, that are in none of its children."""


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write `<child>_state_dict` for each part of the model, and what trains them.

    An optimizer is `optimizer_<phase>_state_dict`, or `optimizer_state_dict` where there is one
    for all.

    Raises:
        ConfigError: something was asked for that does not go with it, or two names would be one.
    """
    refuse_changes(subject.choices, "bundle")
    source = subject.source
    content = progress(source)
    _add(content, "_state_dict", _by_child({**subject.weights(), **extra_state(source)}))
    if has_averages(source):
        _add(content, "_ema_state_dict", _by_child(source.weights(averaged=True)))
    for update in updates(source):
        end = f"_{update.name}" if update.name else ""
        found = {
            f"optimizer{end}_state_dict": update.optimizer,
            f"scheduler{end}_state_dict": update.scheduler,
            f"parameter_names{end}": update.names,
        }
        _add(content, "", found)
    save(content, path)


def _by_child(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        child, dot, rest = name.partition(".")
        if child == _OWN and dot and any("." not in other for other in weights):
            raise ConfigError(
                f"the model has a part called {_OWN!r} and tensors of its own, which a bundle "
                "calls so; take format=checkpoint"
            )
        parts.setdefault(child if dot else _OWN, {})[rest if dot else name] = value
    return parts


def _add(content: dict[str, Any], end: str, found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        key = name + end
        if key in content:
            raise ConfigError(
                f"two things of this run would both be called {key!r} in a bundle; take "
                "format=checkpoint or safetensors"
            )
        content[key] = value
