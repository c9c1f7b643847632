"""Checkpoints and exports of a finished run as artifacts of Weights & Biases."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.manifest import Manifest
from trainer.storage import Store, is_local

_EXPORTS = "exports"


def log_artifacts(run: Any, facts: Mapping[str, Any], *, with_files: bool) -> None:
    """Log `checkpoint-<name>`, of the best and the newest checkpoint, and `exports-<name>`.

    Args:
        run: the open run there.
        facts: of the attempt, as trackers get them.
        with_files: the shards too; else the manifest alone, which says where they are.
    """
    store: Store = facts["store"]
    name = re.sub(r"[^\w.-]", "-", str(facts["config"].get("name", "run")))
    place = facts["run_dir"] if is_local(facts["run_dir"]) else None
    for commit, manifest, aliases in _chosen(store):
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
        _log(run, f"checkpoint-{name}", "checkpoint", store, place, keys, metadata, aliases)
    if exports := store.list(_EXPORTS):
        metadata = {"url": f"{store.url}/{_EXPORTS}"}
        _log(run, f"exports-{name}", "model", store, place, exports, metadata, ())


def _chosen(store: Store) -> list[tuple[Commit, Manifest, list[str]]]:
    """Return the best checkpoint, if one is known to be, and the newest, with their names there."""
    commits = {commit.step: commit for commit in lineage.commits(store)}
    if not commits:
        return []
    newest = max(commits)
    manifest = lineage.read_manifest(store, commits[newest])
    best = (manifest.objects["run"].get("best") or {}).get("step")
    found = []
    for step in sorted({step for step in (best, newest) if step in commits}):
        names = [word for word, at in (("best", best), ("newest", newest)) if at == step]
        made = lineage.read_manifest(store, commits[step])
        found.append((commits[step], made, [*names, f"step-{step}"]))
    return found


def _log(
    run: Any,
    name: str,
    kind: str,
    store: Store,
    place: str | None,
    keys: Sequence[str],
    metadata: Mapping[str, Any],
    aliases: Sequence[str],
) -> None:
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
    for key in keys:
        inner = "/".join(key.split("/")[2 if kind == "checkpoint" else 1 :])
        if place is not None:  # from where it lies, without a copy
            path = Path(place.removeprefix("file://")) / key
            artifact.add_file(str(path), name=inner, policy="immutable", skip_cache=True)
        else:
            with tempfile.NamedTemporaryFile() as file:
                file.write(store.read(key))
                file.flush()
                artifact.add_file(file.name, name=inner, skip_cache=True)
    run.log_artifact(artifact, aliases=list(aliases) or None)
