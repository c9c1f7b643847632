"""`format=checkpoint`: one `.ckpt` with the usual keys, to resume in a plain PyTorch script."""

from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigError
from trainer.export import training_state
from trainer.export.exported_model import ExportedModel


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write weights, optimizer, scheduler and counters; only torch is needed to read them.

    Raises:
        ConfigError: the run has several optimizers, or `choices` would change the weights.
    """
    training_state.reject_changes(model.choices, "checkpoint")
    checkpoint = model.checkpoint
    states = training_state.optimizer_states(checkpoint)
    if len(states) > 1:
        phases = ", ".join(state.phase for state in states)
        raise ConfigError(
            f"{checkpoint.location} has one optimizer per phase ({phases}); use format=bundle"
        )
    content = {
        **training_state.progress(checkpoint),
        "model_state_dict": {**model.weights(), **training_state.extra_state(checkpoint)},
        "optimizer_state_dict": states[0].optimizer,
        "scheduler_state_dict": states[0].scheduler,
        "parameter_names": states[0].names,
    }
    if checkpoint.has_averages:
        content["ema_state_dict"] = checkpoint.weights(averaged=True)
    training_state.save(content, path)
