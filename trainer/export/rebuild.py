"""Rebuild a run's model, data and task from a checkpoint, in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from trainer.checkpoint import state_tree
from trainer.config import allowed_targets
from trainer.config.compose import compose_groups
from trainer.config.merge import merge
from trainer.config.schema import Parallel, Run
from trainer.errors import ConfigError, problems_text
from trainer.export.loaded_checkpoint import LoadedCheckpoint
from trainer.training import build, structure

_GROUPS = ("model", "data", "task")
"""Configuration groups that are rebuilt."""
_REPLACEABLE = ("data", "task")
"""Groups of which another may be chosen after the run; the weights fit only the run's model."""


def configuration(
    checkpoint: LoadedCheckpoint,
    settings: Sequence[str] = (),
    allowed: Sequence[str] = (),
    config_dirs: Sequence[Path] = (),
) -> Run:
    """Return the checkpoint's configuration, reduced to one process that does not train.

    It has no scheduler, trackers or training wrappers, and a default optimizer. Targets of a run
    that this user started need no permission, nor do those of groups that `settings` choose.

    Args:
        checkpoint: the checkpoint.
        settings: `key=value` overrides; `data=NAME` and `task=NAME` replace the group.
        allowed: packages or names it may call in addition to `allowed_targets.ALLOWED`.
        config_dirs: folders with additional groups.

    Raises:
        ConfigError: the checkpoint has no configuration, a target is not allowed, or an override
            does not fit.
    """
    stored = checkpoint.manifest.config
    if not stored:
        raise ConfigError(
            f"{checkpoint} was not written by a run, so its model and data are unknown; export "
            "its weights instead (format=safetensors)"
        )
    choices = [s for s in settings if s.partition("=")[0] in _REPLACEABLE]
    settings = [s for s in settings if s not in choices]
    for setting in settings:
        key = setting.partition("=")[0]
        if "." not in key and isinstance(stored.get(key), Mapping):
            raise ConfigError(
                f"{setting}: only {' and '.join(_REPLACEABLE)} can be replaced after the run; "
                f"override single keys: {key}.…=…"
            )
    replaced = compose_groups(choices, config_dirs) if choices else {}
    try:
        overrides = OmegaConf.from_dotlist(list(settings))
        composed = OmegaConf.merge(OmegaConf.create({**stored, **replaced}), overrides)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{' '.join(settings)}: {text}") from None
    run, problems = merge(composed)  # type: ignore[arg-type]
    if problems:
        raise ConfigError(problems_text(problems))
    overridden = [
        s.partition("=")[2] for s in settings if s.partition("=")[0].endswith("._target_")
    ]
    trusted = [*allowed, *overridden]
    stored_nodes = {group: getattr(run, group) for group in _GROUPS if group not in replaced}
    if not checkpoint.is_own:
        allowed_targets.reject_targets(stored_nodes, trusted)
    chosen_nodes = {group: getattr(run, group) for group in replaced}  # may refer to stored values
    trusted += [target for _, target in allowed_targets.named_targets(replaced)]
    allowed_targets.reject_targets(chosen_nodes, trusted)
    single = replace(
        run,
        parallel=Parallel(strategy="single"),
        optimizer={"_target_": "torch.optim.SGD"},
        scheduler={},
        tracker={},
        checkpoint=replace(run.checkpoint, mode=None),
        trainer=replace(run.trainer, accumulate=1, freeze=[], ema_decay=None),
    )
    problems = build.check(single)
    if problems:
        raise ConfigError(problems_text(problems))
    return single


def load_model(run: Run, checkpoint: LoadedCheckpoint, *, averaged: bool = False) -> nn.Module:
    """Return the unwrapped model with the checkpoint's weights, on the CPU and in eval mode.

    Args:
        run: the result of `configuration`.
        checkpoint: the checkpoint.
        averaged: use the moving average where a parameter has one.

    Raises:
        ConfigError: names or shapes of the weights differ from the model's.
        DamagedError: a checksum differs.
    """
    model = build.build_model(run)
    load_weights(model, checkpoint, averaged=averaged)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: LoadedCheckpoint, *, averaged: bool = False) -> None:
    """Load the checkpoint's weights into an unwrapped model; arguments as in `load_model`."""
    tensors: dict[str, Any] = checkpoint.weights(averaged=averaged)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    structure.create_buffers(model, shapes, torch.device("cpu"))
    try:
        keys = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes
        raise ConfigError(f"{checkpoint} does not fit its model: {error}") from None
    missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
    if missing or keys.unexpected_keys:
        raise ConfigError(
            f"{checkpoint} does not fit its model: missing {missing[:4] or 'nothing'}, unexpected "
            f"{keys.unexpected_keys[:4] or 'nothing'}. Has the model's code changed?"
        )
    manifest = checkpoint.manifest
    state_tree.load_model(model, manifest.objects, manifest.tensors, checkpoint.reader.fetch)
