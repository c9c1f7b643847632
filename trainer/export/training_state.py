"""Optimizer, scheduler and counters of a checkpoint, as torch's state dicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import state_tree
from trainer.errors import CheckpointError, ConfigError
from trainer.export.exported_model import Choices
from trainer.export.loaded_checkpoint import LoadedCheckpoint
from trainer.importing.name_matching import clean_names


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer of a run, with its scheduler."""

    phase: str
    """The phase it trains; empty in runs with one optimizer."""
    optimizer: dict[str, Any]
    """Argument of `Optimizer.load_state_dict`, with parameters as numbers."""
    names: Sequence[Sequence[str]]
    """Parameter names per group, in the order of their numbers."""
    scheduler: dict[str, Any] | None


def optimizer_states(checkpoint: LoadedCheckpoint) -> list[OptimizerState]:
    """Return a run's optimizers in the order of its phases; checksums are verified.

    With one optimizer and one group, its parameters are those of `model.parameters()`, including
    frozen ones. Otherwise the groups are the run's groups, without frozen parameters. A tensor with
    several names is one parameter.

    Raises:
        ConfigError: the checkpoint was not written by a run.
        DamagedError: a checksum differs.
    """
    objects = checkpoint.manifest.objects
    if "run" not in objects or "optimizer" not in objects:
        raise ConfigError(
            f"{checkpoint} was not written by a run, so its optimizer is unknown; export its "
            "weights with format=state_dict"
        )
    stored = objects["optimizer"]
    groups = list(stored["groups"])
    phases = objects.get("phases") or [["", len(groups)]]
    if sum(count for _, count in phases) != len(groups):
        raise CheckpointError(
            f"{checkpoint}: {len(groups)} optimizer groups do not match the phases {phases}"
        )
    frozen = stored.get("frozen", []) if len(groups) == 1 and not phases[0][0] else []
    clean = clean_names(checkpoint.model_names())
    states = []
    for phase, count in phases:
        phase_groups, groups = groups[:count], groups[count:]
        names = [list(group["params"]) for group in phase_groups]
        for index, name in frozen:
            names[0].insert(index, name)
        scheduler = objects.get("scheduler")
        if scheduler is not None:
            node = scheduler[phase] if phase else scheduler
            scheduler = state_tree.join(node, checkpoint.reader.fetch)
        optimizer = _state_dict(checkpoint, phase_groups, names)
        cleaned = [[clean[name] for name in group] for group in names]
        states.append(OptimizerState(phase, optimizer, cleaned, scheduler))
    return states


def _state_dict(
    checkpoint: LoadedCheckpoint,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> dict[str, Any]:
    fetch = checkpoint.reader.fetch
    numbers = {name: n for n, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for key in checkpoint.manifest.tensors:
        name, _, slot = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and name in numbers:
            state.setdefault(numbers[name], {})[slot] = fetch(key)
    for name, values in checkpoint.manifest.objects["optimizer"]["state"].items():
        if name in numbers:
            state.setdefault(numbers[name], {}).update(state_tree.join(values, fetch))
    packed = []
    for group, group_names in zip(groups, names, strict=True):
        values = {key: value for key, value in group.items() if key != "params"}
        params = [numbers[name] for name in group_names]
        packed.append({**state_tree.join(values, fetch), "params": params})
    return {"state": dict(sorted(state.items())), "param_groups": packed}


def reject_changes(choices: Choices, format: str) -> None:
    """Reject choices that would change the weights, which the optimizer states belong to.

    Raises:
        ConfigError: a choice changes them.
    """
    changes = {
        "weights=ema": choices.averaged,
        f"dtype={choices.dtype}": choices.dtype,
        f"part={choices.part}": choices.part,
    }
    for text, is_requested in changes.items():
        if is_requested:
            raise ConfigError(
                f"{text} does not work with format={format}, which resumes training: its "
                "optimizers need the weights unchanged (averages are stored under a separate "
                "key). Use format=state_dict or safetensors"
            )


def progress(checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Return the counters; `loss` and `metrics` come from the newest evaluation."""
    state = checkpoint.manifest.objects["run"]
    scaler = checkpoint.manifest.objects.get("scaler", {})
    return {
        "epoch": state["cursor"]["epoch"],
        "global_step": state["step"],
        "samples": state["samples"],
        "loss": state["metrics"].get("loss"),
        "metrics": dict(state["metrics"]),
        "scaler_state_dict": state_tree.join(scaler, checkpoint.reader.fetch),
    }


def extra_state(checkpoint: LoadedCheckpoint) -> dict[str, Any]:
    """Return the modules' `get_extra_state` values under the names of a plain state dict."""
    stored = checkpoint.manifest.objects.get("model_extra", {})
    clean = clean_names([*checkpoint.model_names(), *stored])
    fetch = checkpoint.reader.fetch
    return {clean[name]: state_tree.join(value, fetch) for name, value in stored.items()}


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write with torch.save; shared storage stays shared."""
    with open(path, "wb") as file:  # given a path, torch would store its name in the file
        torch.save(content, file)
