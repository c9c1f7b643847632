"""The size of a run's state, from a model that has no memory."""

import torch
from torch import nn

from trainer.config import targets
from trainer.config.schema import Run
from trainer.core.formatting import size
from trainer.doctor.finding import Finding
from trainer.monitoring.memory import Sizes, measure
from trainer.training import parameters


def sizes(run: Run, world_size: int) -> Sizes | None:
    """Return the sizes of a run's state, all of it on each rank; None where they are not known.

    That is where the model computes with its weights when it is made, or loads them.
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


def judge(needs: Sizes | None) -> Finding:
    """Tell the sizes."""
    if needs is None:
        advice = "sizes are unknown before the run, which tells them at its start"
        return Finding("model", "yellow", "it cannot be built without memory", advice)
    kept, saved = needs.optimizer_bytes, needs.checkpoint_bytes
    return Finding(
        "model",
        "green",
        f"{needs.parameters:,} parameters: weights {size(needs.weights_bytes)}, gradients "
        f"{size(needs.gradients_bytes)}, optimizer {'?' if kept is None else size(kept)}; a "
        f"checkpoint {'?' if saved is None else size(saved)}",
    )
