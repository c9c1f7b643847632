"""Progress and files of a run, observed from outside; every byte verified."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.chaos_ranks import KEEP_LAST

START_UP = "start-up"
TRAINING = "training alone"
WRITING = "a save: shards"
PUBLISHING = "a save: manifest"
PRUNING = "after a commit: pruning"
STATES = (START_UP, TRAINING, WRITING, PUBLISHING, PRUNING)
"""Activities of a killed attempt, as counted in the tally."""


class Watch:
    """Progress of an attempt, observed from outside."""

    def __init__(self, run_dir: Path) -> None:
        self._attempts, self._checkpoints = run_dir / "attempts", run_dir / "checkpoints"
        self._earlier_folders = set(file_names(self._checkpoints))
        self.earlier_attempts = len(self._records())

    def _records(self) -> list[str]:
        return [name for name in file_names(self._attempts) if not _is_temporary(name)]

    def has_begun(self) -> bool:
        """Return whether the attempt has a record, and so owns the run."""
        return len(self._records()) > self.earlier_attempts

    def is_training(self) -> bool:
        """Return whether it has recorded where it starts from; its first step comes next."""
        if not self.has_begun():
            return False
        record = json.loads((self._attempts / max(self._records())).read_text())
        return "resumed_from" in record

    def is_saving(self) -> bool:
        """Return whether a checkpoint of this attempt is being written (or deleted)."""
        from trainer.checkpoint.lineage import MANIFEST

        return any(MANIFEST not in files for _, files in self._folders())

    def is_publishing(self) -> bool:
        """Return whether a manifest is being published."""
        return any(_is_temporary(name) for _, files in self._folders() for name in files)

    def committed_step(self) -> int:
        """Return the newest step that this attempt has committed, or 0."""
        from trainer.checkpoint.lineage import MANIFEST

        return max((step for step, files in self._folders() if MANIFEST in files), default=0)

    def _folders(self) -> list[tuple[int, list[str]]]:
        """Return the step and files of each checkpoint of this attempt."""
        from trainer.checkpoint.manifest import parse_folder

        folders = set(file_names(self._checkpoints)) - self._earlier_folders
        parsed = [(parse_folder(name), file_names(self._checkpoints / name)) for name in folders]
        return [(finding[0], files) for finding, files in parsed if finding]


def file_names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it is missing."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _is_temporary(name: str) -> bool:
    """Return whether a file has not been given its name yet, as a LocalStore does it."""
    return name.startswith(".tmp-")


@dataclass(frozen=True)
class Finding:
    """Files of a killed attempt, every byte verified."""

    newest_step: int
    """Step of the newest checkpoint; 0 without one."""
    resumed_step: int | None
    """Step that the attempt recorded as its start, if any."""
    state: str
    """Activity, one of STATES."""
    left_files: int
    """Files of no use, which a later attempt has to delete."""


def examine(run_dir: Path, earlier_attempts: int) -> dict[str, Any]:
    """Return a Finding as a dict. It computes: call it in a child."""
    from trainer import checkpoint
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    newest, commits = checkpoint.latest(store), checkpoint.steps(store)
    for commit in commits:
        checkpoint.verify(store, lineage.read_manifest(store, commit))
    records = lineage.records(store)
    record = records[-1] if len(records) > earlier_attempts else {}
    start = record.get("resumed_from")
    return vars(
        Finding(
            newest_step=newest.step if newest else 0,
            resumed_step=start["step"] if start else None,
            state=_state(run_dir, record["attempt"], commits) if start else START_UP,
            left_files=len(useless_files(run_dir)),
        )
    )


def _state(run_dir: Path, attempt: int, commits: Sequence[Any]) -> str:
    """Return the activity of an attempt that had started to train. Saves follow each other."""
    from trainer.checkpoint.lineage import MANIFEST
    from trainer.checkpoint.manifest import parse_folder

    newest_step = commits[-1].step if commits else 0
    checkpoints = run_dir / "checkpoints"
    folders = {name: file_names(checkpoints / name) for name in file_names(checkpoints)}
    has_committed = any(commit.attempt == attempt for commit in commits)
    used = [name for name, files in folders.items() if not all(map(_is_temporary, files))]
    state = PRUNING if has_committed and len(used) > KEEP_LAST else TRAINING
    for name, files in folders.items():
        parsed = parse_folder(name)
        if parsed is None or parsed[1] != attempt:
            continue  # an earlier attempt left it
        if MANIFEST not in files and parsed[0] > newest_step:
            return PUBLISHING if any(map(_is_temporary, files)) else WRITING
        if MANIFEST not in files or any(map(_is_temporary, files)):
            state = PRUNING
    return state


def useless_files(run_dir: Path) -> list[str]:
    """Return the files that belong neither to the run itself nor to a checkpoint that counts."""
    from trainer.checkpoint import lineage
    from trainer.storage import LocalStore

    store = LocalStore(run_dir)
    useful = {"config.yaml", "metrics.jsonl", *store.list("attempts")}
    for commit in lineage.commits(store):
        shards = lineage.read_manifest(store, commit).files
        useful |= {commit.manifest_key, *(f"{commit.folder}/{shard}" for shard in shards)}
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return sorted({path.relative_to(run_dir).as_posix() for path in files} - useful)


def compare(undisturbed: Path, run_dir: Path) -> tuple[list[str], list[str]]:
    """Return how two finished runs differ, and the second's useless files. For a child."""
    from scripts.compare_runs import differences

    return differences(str(undisturbed), str(run_dir)), useless_files(run_dir)
