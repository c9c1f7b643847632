"""`format=checkpoint`: one `.ckpt` with the customary keys, to go on in a plain PyTorch script."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import state_tree
from trainer.errors import ConfigError
from trainer.export.source import Source
from trainer.export.subject import Subject
from trainer.export.updates import refuse_changes, updates
from trainer.importing.name_matching import clean_names
from trainer.training.contents import EMA

SUFFIX = ".ckpt"
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write weights, optimizer, schedule and counters; no class but torch's is needed to read it.

    Raises:
        ConfigError: the run has several optimizers, or something was asked for that does not go
            with them.
    """
    refuse_changes(subject.choices, "checkpoint")
    source = subject.source
    found = updates(source)
    if len(found) > 1:
        names = ", ".join(update.name for update in found)
        raise ConfigError(
            f"{source.place} has an optimizer for each of {names}; format=bundle writes them"
        )
    content = {
        **progress(source),
        "model_state_dict": {**subject.weights(), **extra_state(source)},
        "optimizer_state_dict": found[0].optimizer,
        "scheduler_state_dict": found[0].scheduler,
        "parameter_names": found[0].names,
    }
    if has_averages(source):
        content["ema_state_dict"] = source.weights(averaged=True)
    save(content, path)


def progress(source: Source) -> dict[str, Any]:
    """Return how far the run is: `loss` and `metrics` are of its newest evaluation."""
    state = source.manifest.objects["run"]
    scaler = source.manifest.objects.get("scaler", {})
    return {
        "epoch": state["cursor"]["epoch"],
        "global_step": state["step"],
        "samples": state["samples"],
        "loss": state["metrics"].get("loss"),
        "metrics": dict(state["metrics"]),
        "scaler_state_dict": state_tree.join(scaler, source.reader.fetch),
    }


def extra_state(source: Source) -> dict[str, Any]:
    """Return what modules keep besides tensors, under the names of a plain state dict."""
    stored = source.manifest.objects.get("model_extra", {})
    names = [n.removeprefix("model.") for n in source.manifest.tensors if n.startswith("model.")]
    clean = clean_names([*names, *stored])
    return {
        clean[name]: state_tree.join(value, source.reader.fetch) for name, value in stored.items()
    }


def has_averages(source: Source) -> bool:
    """Whether the run averages its weights."""
    return any(name.startswith(EMA) for name in source.manifest.tensors)


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write with torch.save; shared storage stays shared."""
    with open(path, "wb") as file:  # by its name, torch would put that name into the file
        torch.save(content, file)
