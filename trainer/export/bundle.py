"""`format=bundle`: several models and their optimizers in one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.export import training_state
from trainer.export.exported_model import ExportedModel

_ROOT = "model"
"""Key prefix for tensors that are in no submodule."""


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write `<child>_state_dict` per child module, and the state of the optimizers.

    Optimizers are `optimizer_<phase>_state_dict`, or `optimizer_state_dict` if there is only one.

    Raises:
        ConfigError: `choices` would change the weights, or two keys would be equal.
    """
    training_state.reject_changes(model.choices, "bundle")
    checkpoint = model.checkpoint
    content = training_state.progress(checkpoint)
    weights = {**model.weights(), **training_state.extra_state(checkpoint)}
    _add(content, _by_child(weights), "_state_dict")
    if checkpoint.has_averages:
        _add(content, _by_child(checkpoint.weights(averaged=True)), "_ema_state_dict")
    for state in training_state.optimizer_states(checkpoint):
        end = f"_{state.phase}" if state.phase else ""
        parts = {
            f"optimizer{end}_state_dict": state.optimizer,
            f"scheduler{end}_state_dict": state.scheduler,
            f"parameter_names{end}": state.names,
        }
        _add(content, parts)
    training_state.save(content, path)


def _by_child(weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    children: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        child, dot, rest = name.partition(".")
        if child == _ROOT and dot and any("." not in other for other in weights):
            raise ConfigError(
                f"the model has both a submodule named {_ROOT!r} and top-level tensors, which a "
                f"bundle stores as {_ROOT!r}; use format=checkpoint"
            )
        children.setdefault(child if dot else _ROOT, {})[rest if dot else name] = value
    return children


def _add(content: dict[str, Any], parts: Mapping[str, Any], end: str = "") -> None:
    for name, value in parts.items():
        key = name + end
        if key in content:
            raise ConfigError(
                f"two parts of this run would both be named {key!r} in a bundle; use "
                "format=checkpoint or safetensors"
            )
        content[key] = value
