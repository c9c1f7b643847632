"""State sizes of a run, from a model on the meta device."""

import torch
from torch import nn

from trainer.config import targets
from trainer.config.schema import Run
from trainer.core.formatting import size
from trainer.doctor.finding import Finding
from trainer.monitoring.memory import Sizes, measure
from trainer.training import parameters


def sizes(run: Run, world_size: int) -> Sizes | None:
    """Return the state sizes of a run, with the full state on every rank.

    None if the model computes with its weights in its constructor, or loads them.
    """
    try:
        with torch.device("meta"):
            model = targets.make(run.model, "model")
    except (NotImplementedError, RuntimeError):
        return None
    if not isinstance(model, nn.Module):
        return None
    parameters.freeze(model, run.trainer.freeze)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    node = {key: value for key, value in run.optimizer.items() if key not in ("groups", "phases")}
    optimizer = targets.make(node, "optimizer", list(model.parameters()))
    averages = trained if run.trainer.ema_decay is not None else {}
    return measure(model, [optimizer], averages, world_size)


def check_sizes(needs: Sizes | None) -> Finding:
    """Report the state sizes."""
    if needs is None:
        advice = "the run logs its state sizes when it starts"
        return Finding(
            "model", "yellow", "unknown size: the model cannot be built on the meta device", advice
        )
    state, saved = needs.optimizer_bytes, needs.checkpoint_bytes
    return Finding(
        "model",
        "green",
        f"{needs.parameters:,} parameters: weights {size(needs.weights_bytes)}, gradients "
        f"{size(needs.gradients_bytes)}, optimizer {'?' if state is None else size(state)}; a "
        f"checkpoint {'?' if saved is None else size(saved)}",
    )
