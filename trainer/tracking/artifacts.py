"""Checkpoints and exports of a finished run as artifacts of Weights & Biases."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import lineage, select
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.replicas import Replicas
from trainer.storage import Store, local_path

_EXPORTS = "exports"


def log_artifacts(run: Any, facts: Mapping[str, Any], *, with_files: bool) -> None:
    """Log the best and newest checkpoint as `checkpoint-<name>`, and exports as `exports-<name>`.

    Args:
        run: the open W&B run.
        facts: of the attempt, as passed to trackers.
        with_files: log the shards too, not only the manifest with their location.
    """
    store: Store = facts["store"]
    name = re.sub(r"[^\w.-]", "-", str(facts["config"].get("name", "run")))
    folder = local_path(facts["run_dir"])
    for commit, manifest, aliases in _selected(store):
        keys = [commit.manifest_key]
        if with_files:
            keys += [f"{commit.folder}/{file}" for file in manifest.files]
        metadata = {
            "url": f"{store.url}/{commit.folder}",
            "step": manifest.step,
            "epoch": manifest.epoch,
            "attempt": manifest.attempt,
            "metrics": manifest.objects["run"]["metrics"],
        }
        _log(run, f"checkpoint-{name}", "checkpoint", store, folder, keys, metadata, aliases)
    if exports := store.list(_EXPORTS):
        metadata = {"url": f"{store.url}/{_EXPORTS}"}
        _log(run, f"exports-{name}", "model", store, folder, exports, metadata, ())


def _selected(store: Store) -> list[tuple[Commit, Manifest, list[str]]]:
    """Return the best checkpoint that the run recorded, if stored, and the newest; with aliases."""
    survey = Replicas(store).survey()
    if not survey.commits:
        return []
    newest = select.newest_intact(survey, store.url)
    best = (newest.manifest.objects["run"].get("best") or {}).get("step")
    commits = {newest.commit}
    if best is not None and (commit := select.at_step(survey, best)):
        commits.add(commit)
    selected = []
    for commit in sorted(commits):
        aliases = [
            alias
            for alias, step in (("best", best), ("newest", newest.commit.step))
            if step == commit.step
        ]
        manifest = lineage.read_manifest(store, commit)
        selected.append((commit, manifest, [*aliases, f"step-{commit.step}"]))
    return selected


def _log(
    run: Any,
    name: str,
    kind: str,
    store: Store,
    run_folder: Path | None,
    keys: Sequence[str],
    metadata: Mapping[str, Any],
    aliases: Sequence[str],
) -> None:
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
    for key in keys:
        artifact_name = "/".join(key.split("/")[2 if kind == "checkpoint" else 1 :])
        if run_folder is not None:  # without a copy
            path = run_folder / key
            artifact.add_file(str(path), name=artifact_name, policy="immutable", skip_cache=True)
        else:
            with tempfile.NamedTemporaryFile() as file:
                file.write(store.read(key))
                file.flush()
                artifact.add_file(file.name, name=artifact_name, skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases) or None)
