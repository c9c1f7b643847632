"""A committed checkpoint, opened without a process group, with wrapper names removed."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer.checkpoint import Reader, select
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.location import open_location
from trainer.checkpoint.manifest import Manifest
from trainer.config import own_runs
from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError
from trainer.importing.name_matching import clean_names
from trainer.training.contents import EMA


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's manifest and reader, and the location they came from."""

    location: str
    commit: Commit
    manifest: Manifest
    reader: Reader
    is_own: bool
    """This user started the run, with the configuration of this checkpoint."""

    def __str__(self) -> str:
        return f"{self.location}: step {self.commit.step:,}"

    @property
    def has_averages(self) -> bool:
        """The run's evaluations used averages of its weights."""
        return any(name.startswith(EMA) for name in self.manifest.tensors)

    @property
    def has_evaluation_mode(self) -> bool:
        """The averages are the weights of the optimizer's evaluation mode, as schedule-free ones.

        The trained weights are then a point between them and others: no evaluation used it.
        """
        trainer = self.manifest.config.get("trainer")
        is_optimizers = isinstance(trainer, Mapping) and trainer.get("ema_decay") is None
        return self.has_averages and is_optimizers

    def model_names(self) -> list[str]:
        """Return the stored names of the model's tensors, without `model.`."""
        names = self.manifest.tensors
        return [name.removeprefix("model.") for name in names if name.startswith("model.")]

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the model's tensors on the CPU, checksums verified, without wrapper prefixes.

        Names that share storage get the same tensor.

        Args:
            averaged: use the moving average where a parameter has one.

        Raises:
            ConfigError: the checkpoint has no model, or no averages.
            DamagedError: a checksum differs.
        """
        names = self.model_names()
        if not names:
            raise ConfigError(f"{self} has no tensors named model.…, so it has no model to export")
        if averaged and not self.has_averages:
            raise ConfigError(
                f"{self} has no averaged weights: the run did not set trainer.ema_decay, and its "
                "optimizer has no evaluation mode. Export the plain weights with weights=model"
            )
        tensors: dict[str, Tensor] = {}
        for name in names:
            owner = self.manifest.tensors[f"model.{name}"].alias or f"model.{name}"
            if owner not in tensors:
                average = EMA + owner.removeprefix("model.")
                use_average = averaged and average in self.manifest.tensors
                tensors[owner] = self.reader.fetch(average if use_average else owner)
            tensors[f"model.{name}"] = tensors[owner]
        clean = clean_names(names)
        return {clean[name]: tensors[f"model.{name}"] for name in names}


def open_checkpoint(
    location: str,
    step: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> LoadedCheckpoint:
    """Open the checkpoint that `step` names.

    Args:
        location: a run directory, a folder of checkpoints, or one checkpoint's folder.
        step: `latest`, `best` or a step number.
        settings: object store settings.

    Raises:
        ConfigError: no such location, or no such checkpoint in it.
        CheckpointError: the manifest is damaged.
    """
    opened = open_location(location, settings)
    commit = select.pick(opened, step)
    manifest = opened.manifest(commit)
    run_url = opened.in_run(settings).store.url
    is_own = own_runs.is_own(run_url, manifest.config, settings)
    return LoadedCheckpoint(location, commit, manifest, opened.reader(commit), is_own)
