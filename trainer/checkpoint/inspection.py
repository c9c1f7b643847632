"""State of every checkpoint folder at a location. Reads manifests and lists shards only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.checkpoint import lineage
from trainer.checkpoint.lineage import DAMAGED, FOLDER, MANIFEST, Commit
from trainer.checkpoint.location import Location, numbers
from trainer.checkpoint.manifest import Manifest, is_shard_name, parse_folder
from trainer.core import intervals, metric_mode
from trainer.errors import CheckpointError
from trainer.storage import Store
from trainer.storage.store import has_size

State = Literal["intact", "damaged", "abandoned", "unfinished", "orphaned"]


@dataclass(frozen=True)
class CheckpointStatus:
    """State of one checkpoint folder."""

    commit: Commit
    state: State
    """abandoned: of a timeline that a later attempt left. unfinished: of an attempt that has not
    ended. orphaned: never committed, and never will be."""
    reason: str = ""
    """Description of the damage, or the reason for the state."""
    manifest: Manifest | None = None
    size_bytes: int = 0
    saved_s: float | None = None
    """Time of the commit, in seconds since 1970."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metrics measured at this step; checkpoint.metric first, then by name."""
        if self.manifest is None:
            return {}
        first = lineage.retention_of(self.manifest).get("metric")
        values = lineage.measurements(self.manifest)
        return {key: values[key] for key in sorted(values, key=lambda key: (key != first, key))}


def best(statuses: Sequence[CheckpointStatus]) -> CheckpointStatus | None:
    """Return the intact checkpoint with the best `checkpoint.metric`, the earliest of equals."""
    intact = {s.commit.step: s for s in statuses if s.state == "intact" and s.manifest is not None}
    newest = intact[max(intact)].manifest if intact else None
    policy = lineage.retention_of(newest) if newest is not None else {}
    metric = policy.get("metric")
    if not metric:
        return None
    values = {step: status.metrics.get(metric) for step, status in intact.items()}
    ranked = intervals.best_first(values, metric_mode.resolve(metric, policy.get("mode")))
    return intact[ranked[0]] if ranked else None


def inspect(location: Location) -> list[CheckpointStatus]:
    """Return the state of every checkpoint folder, oldest first."""
    store = location.store
    if location.folders is not None:
        statuses = [
            _committed(location, None, folder, store.entries(folder)) for folder in location.folders
        ]
        return sorted(statuses, key=lambda status: status.commit)
    contents = lineage.folders(store)
    records = lineage.records(store)  # after the list, so that it has every attempt listed there
    present = set(lineage.commits(store, records=records, damaged=True))
    statuses = []
    for folder, names in contents.items():
        parsed = parse_folder(folder.removeprefix(f"{FOLDER}/"))
        if parsed is None:
            continue  # not a checkpoint folder
        commit = Commit(*parsed, folder)
        if commit in present:
            statuses.append(_committed(location, commit, folder, names))
        else:
            statuses.append(_uncommitted(store, commit, names, records))
    return sorted(statuses, key=lambda status: status.commit)


def is_complete(store: Store, status: CheckpointStatus) -> bool:
    """Return whether every shard has the size in the manifest. Asks the store for each shard."""
    files = status.manifest.files if status.manifest else {}
    return bool(status.manifest) and all(
        has_size(store, f"{status.commit.folder}/{name}", file.bytes)
        for name, file in files.items()
    )


def _committed(
    location: Location, commit: Commit | None, folder: str, names: Sequence[str]
) -> CheckpointStatus:
    """Return the state of a committed checkpoint; outside of a run `commit` is None."""
    try:
        if commit is None:
            manifest = lineage.manifest_in(location.store, folder)
        else:
            manifest = location.manifest(commit)
    except CheckpointError as error:
        commit = commit or Commit(*numbers(folder), folder)
        return CheckpointStatus(commit, "damaged", str(error))
    commit = commit or Commit(manifest.step, manifest.attempt, folder)
    missing = sorted(manifest.files.keys() - set(names))
    size_bytes = sum(file.bytes for file in manifest.files.values())
    saved_s = _modified_s(location.store, f"{folder}/{MANIFEST}")
    state: State = "intact"
    reason = ""
    if DAMAGED in names:
        state, reason = "damaged", _mark(location.store, folder)
    elif missing:
        state, reason = "damaged", f"{missing[0]} is missing"
    return CheckpointStatus(commit, state, reason, manifest, size_bytes, saved_s)


def _mark(store: Store, folder: str) -> str:
    try:
        return str(json.loads(store.read(f"{folder}/{DAMAGED}"))["why"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return f"marked by {DAMAGED}"


def _uncommitted(
    store: Store, commit: Commit, names: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> CheckpointStatus:
    """Return the state of a folder that is not part of the surviving timeline."""
    shards = [f"{commit.folder}/{name}" for name in names if is_shard_name(name)]
    size_bytes = sum(_size(store, key) for key in shards)
    later = [
        record
        for record in records
        if record["attempt"] > commit.attempt
        and record.get("resumed_from")
        and record["resumed_from"]["step"] < commit.step
    ]
    if later and MANIFEST in names and not lineage.is_void_in(store, commit):
        number, step = later[0]["attempt"], later[0]["resumed_from"]["step"]
        reason = f"attempt {number} resumed from step {step}"
        return CheckpointStatus(commit, "abandoned", reason, None, size_bytes)
    if any("ended" not in record for record in records[-1:]):
        reason = f"attempt {records[-1]['attempt']} has not ended"
        return CheckpointStatus(commit, "unfinished", reason, None, size_bytes)
    return CheckpointStatus(commit, "orphaned", "never committed", None, size_bytes)


def _modified_s(store: Store, key: str) -> float | None:
    try:
        return store.modified_s(key)
    except FileNotFoundError:  # deleted in the meantime
        return None


def _size(store: Store, key: str) -> int:
    try:
        return store.size(key)
    except FileNotFoundError:  # deleted in the meantime, or parts of an upload
        return 0
