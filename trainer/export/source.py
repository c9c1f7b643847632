"""A checkpoint as the source of an export: opened without a process group, names made clean."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from trainer import policy
from trainer.checkpoint import Reader, lineage
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.manifest import Manifest
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import open_store

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Source:
    """One committed checkpoint of a run."""

    run_dir: str
    commit: Commit
    manifest: Manifest

    def weights(self) -> dict[str, Tensor]:
        """Return the model's tensors on the CPU, every byte checked, names without wrappers.

        Names that share storage come as the same tensor.

        Raises:
            DamagedError: the checkpoint's bytes are wrong.
        """
        reader = Reader(open_store(self.run_dir), self.commit.folder, self.manifest)
        names = [name for name in self.manifest.tensors if name.startswith("model.")]
        clean = clean_names([name.removeprefix("model.") for name in names])
        tensors: dict[str, Tensor] = {}
        for name in names:
            owner = self.manifest.tensors[name].alias or name
            if owner not in tensors:
                tensors[owner] = reader.fetch(owner)
            tensors[name] = tensors[owner]
        return {clean[name.removeprefix("model.")]: tensors[name] for name in names}


def open_source(run_dir: str, step: str) -> Source:
    """Open the newest (`latest`), best (`best`) or a given step's checkpoint of a run.

    Raises:
        ConfigError: there is no run, or no such checkpoint in it.
        CheckpointError: the manifest is damaged.
    """
    store = open_store(run_dir)
    commits = lineage.commits(store)
    if not commits:
        raise ConfigError(
            f"{run_dir} holds no committed checkpoint; give the directory of a run, as "
            "`python -m trainer.run` printed it"
        )
    if step == "latest":
        commit = commits[-1]
    elif step == "best":
        commit = _best(run_dir, commits)
    else:
        chosen = [commit for commit in commits if str(commit.step) == step]
        if not chosen:
            steps = ", ".join(str(commit.step) for commit in commits)
            raise ConfigError(f"step={step}: {run_dir} has latest, best and the steps {steps}")
        commit = chosen[-1]
    return Source(run_dir, commit, lineage.read_manifest(store, commit))


def _best(run_dir: str, commits: list[Commit]) -> Commit:
    store = open_store(run_dir)
    config = lineage.read_manifest(store, commits[-1]).config.get("checkpoint", {})
    metric = config.get("metric")
    if metric is None:
        raise ConfigError(f"step=best: {run_dir} tracks no metric (checkpoint.metric is not set)")
    by_step = {commit.step: commit for commit in commits}
    values = {
        step: lineage.measured(lineage.read_manifest(store, commit), metric)
        for step, commit in by_step.items()
    }
    best = policy.best_first(values, config.get("mode", "max"))
    if not best:
        raise CheckpointError(
            f"step=best: no checkpoint of {run_dir} has {metric!r} of its own step; save as often "
            "as you evaluate (checkpoint.every_epochs, checkpoint.every_steps)"
        )
    return by_step[best[0]]


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name: name without the prefixes of wrappers}.

    A leading `module.` is a wrapper's if every name has it; `_orig_mod.` and the others, which no
    user writes, are removed wherever they stand.

    Raises:
        CheckpointError: two names would become one.
    """
    original = list(names)
    cleaned = original
    while True:
        shorter = [_without_wrappers(name) for name in cleaned]
        if shorter and all(name.startswith("module.") for name in shorter):
            shorter = [name.removeprefix("module.") for name in shorter]
        if shorter == cleaned:
            break
        cleaned = shorter
    if len(set(cleaned)) != len(cleaned):
        double = next(name for name in cleaned if cleaned.count(name) > 1)
        raise CheckpointError(f"two tensors would both be called {double!r} without prefixes")
    return dict(zip(original, cleaned, strict=True))


def _without_wrappers(name: str) -> str:
    pattern = "|".join(re.escape(wrapper) for wrapper in _WRAPPERS[1:])
    return re.sub(rf"(?:^|(?<=\.))(?:{pattern})\.", "", name)
