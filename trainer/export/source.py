"""A checkpoint as the source of an export: opened without a process group, names made clean."""

from dataclasses import dataclass

from torch import Tensor

from trainer.checkpoint import Reader, select
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.location import open_location
from trainer.checkpoint.manifest import Manifest
from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError
from trainer.importing.name_matching import clean_names
from trainer.training.contents import EMA


@dataclass(frozen=True)
class Source:
    """One committed checkpoint."""

    place: str
    commit: Commit
    manifest: Manifest
    reader: Reader

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Return the model's tensors on the CPU, every byte checked, names without wrappers.

        Names that share storage come as the same tensor.

        Args:
            averaged: return the moving averages of those parameters that have one.

        Raises:
            ConfigError: there is no model in it, or there are no averages.
            DamagedError: the checkpoint's bytes are wrong.
        """
        names = [name for name in self.manifest.tensors if name.startswith("model.")]
        if not names:
            raise ConfigError(
                f"{self.place}: no tensor of step {self.manifest.step:,} is called model.…, so "
                "there is no model in it to export"
            )
        averages = {name for name in self.manifest.tensors if name.startswith(EMA)}
        if averaged and not averages:
            raise ConfigError(
                f"{self.place}: step {self.manifest.step:,} has no averaged weights; the run was "
                "made without trainer.ema_decay. Export its weights as they are: weights=model"
            )
        clean = clean_names([name.removeprefix("model.") for name in names])
        tensors: dict[str, Tensor] = {}
        for name in names:
            owner = self.manifest.tensors[name].alias or name
            if owner not in tensors:
                average = EMA + owner.removeprefix("model.")
                chosen = average if averaged and average in averages else owner
                tensors[owner] = self.reader.fetch(chosen)
            tensors[name] = tensors[owner]
        return {clean[name.removeprefix("model.")]: tensors[name] for name in names}


def open_source(
    place: str,
    step: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> Source:
    """Open the newest (`latest`), best (`best`) or a given step's checkpoint.

    Args:
        place: a run's directory, a folder of checkpoints, or the folder of one.
        step: which of them.
        settings: of object stores.

    Raises:
        ConfigError: there is no such place, or no such checkpoint in it.
        CheckpointError: the manifest is damaged.
    """
    opened = open_location(place, settings)
    commit = select.pick(opened, step)
    return Source(place, commit, opened.manifest(commit), opened.reader(commit))
