"""A run's model, data and task again, from one of its checkpoints. One process."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from trainer.checkpoint import state_tree
from trainer.config import allowed_targets
from trainer.config.merge import merge
from trainer.config.schema import Parallel, Run
from trainer.errors import ConfigError, problems_text
from trainer.export.source import Source
from trainer.training import build

_GROUPS = ("model", "data", "task")
"""Parts of the configuration that are built again."""


def configuration(source: Source, settings: Sequence[str] = (), allowed: Sequence[str] = ()) -> Run:
    """Return the checkpoint's configuration, for one process that does not train.

    The optimizer, the scheduler, the trackers and the wrappers of the training are left out.

    Args:
        source: the checkpoint.
        settings: `key=value` to change in its configuration.
        allowed: packages or names that it may call besides `trust.ALLOWED`.

    Raises:
        ConfigError: it has none, it calls what is not allowed, or a setting does not fit it.
    """
    stored = source.manifest.config
    if not stored:
        raise ConfigError(
            f"{source.place}: step {source.commit.step:,} was not written by a run, so it does not "
            "say what its model and data are; export its weights instead (format=safetensors)"
        )
    for setting in settings:
        key = setting.partition("=")[0]
        if "." not in key and isinstance(stored.get(key), Mapping):
            raise ConfigError(
                f"{setting}: groups are chosen when a run is made; here, change single settings, "
                f"such as {key}.…=…"
            )
    try:
        typed = OmegaConf.from_dotlist(list(settings))
        composed = OmegaConf.merge(OmegaConf.create(dict(stored)), typed)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{' '.join(settings)}: {text}") from None
    run, problems = merge(composed)  # type: ignore[arg-type]
    if problems:
        raise ConfigError(problems_text(problems))
    own = [s.partition("=")[2] for s in settings if s.partition("=")[0].endswith("._target_")]
    nodes = {group: getattr(run, group) for group in _GROUPS}
    allowed_targets.reject_targets(nodes, [*allowed, *own])
    alone = replace(
        run,
        parallel=Parallel(strategy="single"),
        optimizer={"_target_": "torch.optim.SGD"},
        scheduler={},
        tracker={},
        trainer=replace(run.trainer, accumulate=1, freeze=[], ema_decay=None),
    )
    problems = build.check(alone)
    if problems:
        raise ConfigError(problems_text(problems))
    return alone


def load_model(run: Run, source: Source, *, averaged: bool = False) -> nn.Module:
    """Return the plain model with the checkpoint's weights, on the CPU and in eval mode.

    Args:
        run: what `configuration` returned.
        source: the checkpoint.
        averaged: whether the parameters are their moving averages, where they have one.

    Raises:
        ConfigError: names or shapes of the weights are not the model's.
        DamagedError: the checkpoint's bytes are wrong.
    """
    model = build.build_model(run)
    fill(model, source, averaged=averaged)
    return model.eval()


def fill(model: nn.Module, source: Source, *, averaged: bool = False) -> None:
    """Load the checkpoint's weights into a plain model of its configuration; as `load_model`."""
    tensors: dict[str, Any] = source.weights(averaged=averaged)
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes
        raise ConfigError(f"{source.place} does not fit its own model: {error}") from None
    missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
    if missing or found.unexpected_keys:
        raise ConfigError(
            f"{source.place} does not fit its own model: it lacks {missing[:4] or 'nothing'}, and "
            f"holds {found.unexpected_keys[:4] or 'nothing'} besides; was the model's code changed?"
        )
    state_tree.load_model(model, source.manifest.objects, source.reader.fetch)
