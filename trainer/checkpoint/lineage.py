"""Attempt records, and the committed checkpoints of the surviving timeline.

The newest attempt wins. Before it saves, every attempt records the checkpoint that it resumed from.
Checkpoints that an older attempt saved after that step belong to an abandoned timeline. They are
ignored, no matter when their manifests appear.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trainer.checkpoint.manifest import (
    Manifest,
    from_bytes,
    is_shard_name,
    is_void,
    parse_folder,
    void_bytes,
)
from trainer.errors import CheckpointError, StoreError, SupersededError
from trainer.storage.store import AlreadyExists, Readable, Store

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
_VOID_MAX_BYTES = 64
_RECORD_KEY = re.compile(r"attempts/([0-9]{4,})\.json")


@dataclass(frozen=True)
class Attempt:
    """Start of a run's processes: its number and random token."""

    number: int
    token: str
    """Eight random hexadecimal digits, part of every shard's name."""


@dataclass(frozen=True, order=True)
class Commit:
    """A committed checkpoint of the surviving timeline."""

    step: int
    attempt: int
    folder: str
    """Key of the checkpoint's folder."""

    @property
    def manifest_key(self) -> str:
        """Key of the checkpoint's manifest."""
        return f"{self.folder}/{MANIFEST}"


def now() -> str:
    """Return the current time in the format of attempt records: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key(number: int) -> str:
    return f"attempts/{number:04d}.json"


def begin(store: Store, facts: Mapping[str, Any], *, above: int = 0) -> Attempt:
    """Create the next attempt's record, before anything else is written. Rank 0 only.

    Args:
        store: the run's store.
        facts: values to record.
        above: the new attempt's number is larger than this.
    """
    token, number = secrets.token_hex(4), above
    while True:
        number = max(max(attempts(store), default=0), number) + 1
        attempt = Attempt(number, token)
        try:
            create_record(store, attempt, facts)
        except AlreadyExists:
            continue  # a concurrent start has the number; lists may lag behind
        return attempt


def create_record(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Create an attempt's record. Rank 0 only.

    Raises:
        AlreadyExists: another attempt has that number.
    """
    record = {"attempt": attempt.number, "token": attempt.token, "started": now(), **facts}
    store.create(_key(attempt.number), _record_bytes(record))


def amend(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Add values to an attempt's record, durably. Rank 0 only."""
    record = _read(store, attempt.number)
    store.replace(_key(attempt.number), _record_bytes({**record, **facts}))


def write_heartbeat(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Update the attempt's heartbeat record; used when it is killed before it writes its end."""
    store.replace(_heartbeat_key(attempt.number), _record_bytes(facts))


def records(store: Store) -> list[dict[str, Any]]:
    """Return the records of all attempts, oldest first."""
    return [record(store, number) for number in attempts(store)]


def record(store: Store, number: int) -> dict[str, Any]:
    """Return the record of one attempt; keys that it does not have come from the heartbeat.

    Except `resumed_from`, which decides which checkpoints are used.
    """
    heartbeat = _heartbeat(store, number)
    heartbeat.pop("resumed_from", None)
    return {**heartbeat, **_read(store, number)}


def restore_record(store: Store, record: Mapping[str, Any]) -> None:
    """Write a record that was read from another store of the run. Rank 0 only."""
    store.replace(_key(record["attempt"]), _record_bytes(record))


def _heartbeat_key(number: int) -> str:
    return f"attempts/{number:04d}.last.json"


def _heartbeat(store: Store, number: int) -> dict[str, Any]:
    try:
        values = _parsed(store.read(_heartbeat_key(number)))
    except (FileNotFoundError, ValueError, RecursionError):  # nothing depends on it
        return {}
    return values if isinstance(values, dict) else {}


def _parsed(data: bytes) -> Any:
    """Parse a record's JSON; integers of 20 or more characters become floats."""
    return json.loads(data, parse_int=lambda text: int(text) if len(text) < 20 else float(text))


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # an error may name a file that is not UTF-8


def attempts(store: Store) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    matches = [_RECORD_KEY.fullmatch(key) for key in store.list("attempts")]
    numbers = ((int(match[1]), match[0]) for match in matches if match)
    return sorted(number for number, key in numbers if key == _key(number))


def _read(store: Store, number: int) -> dict[str, Any]:
    try:
        record: dict[str, Any] = _parsed(store.read(_key(number)))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
        resumed_from = record.get("resumed_from")
        if record.get("attempt") != number or not (
            resumed_from is None or type(resumed_from["step"]) is int
        ):
            raise ValueError(f"attempt {record.get('attempt')!r}, from {resumed_from!r}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{store.url}/{_key(number)} is not a valid attempt record ({error}), and it decides "
            "which checkpoints are used. Restore it, or delete it if that attempt committed nothing"
        ) from None
    return record


def check_not_superseded(store: Store, attempt: Attempt) -> None:
    """Raise SupersededError if a newer attempt exists. Rank 0 only, before every commit."""
    newest = max(attempts(store), default=0)
    if newest > attempt.number:
        record = _read(store, newest)
        raise SupersededError(
            f"attempt {attempt.number} of {store.url} was superseded: attempt {newest} was started "
            f"{record.get('started')} on {record.get('host')} (process {record.get('pid')}). The "
            "newest attempt owns the run; this one stops and commits nothing more"
        )


def commits(
    store: Store, *, damaged: bool = False, records: Sequence[Mapping[str, Any]] | None = None
) -> list[Commit]:
    """Return the committed checkpoints of the surviving timeline, oldest first.

    Args:
        store: the run's store.
        damaged: include checkpoints that are marked as damaged.
        records: records of all attempts; default: read from the store.
    """
    listed = candidates(store, damaged=damaged, records=records)
    return [commit for commit in listed if not is_void_in(store, commit)]


def candidates(
    store: Store, *, damaged: bool = False, records: Sequence[Mapping[str, Any]] | None = None
) -> list[Commit]:
    """Return what `commits` does, including folders whose manifest is void."""
    keys = store.list(FOLDER)
    marked = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{DAMAGED}")}
    if records is None:
        records = [record(store, number) for number in attempts(store)]
    starts = [
        (record["attempt"], record["resumed_from"]["step"])
        for record in records
        if record.get("resumed_from")
    ]
    listed = []
    for key in keys:
        folder, _, name = key.rpartition("/")
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if name != MANIFEST or parsed is None or (folder in marked and not damaged):
            continue
        commit = Commit(*parsed, folder)
        if not any(attempt > commit.attempt and step < commit.step for attempt, step in starts):
            listed.append(commit)
    return sorted(listed)


def is_void_in(store: Store, commit: Commit) -> bool:
    """Return whether a listed manifest is void, so that its folder can never be committed."""
    key = commit.manifest_key
    try:
        return store.size(key) < _VOID_MAX_BYTES and is_void(store.read(key))
    except FileNotFoundError:  # deleted since it was listed
        return True


def folders(store: Store) -> dict[str, list[str]]:
    """Return the file names in every checkpoint folder, by its key; unfinished files included."""
    contents: dict[str, list[str]] = {}
    for key in store.list(FOLDER, unfinished=True):
        folder, _, name = key.rpartition("/")
        contents.setdefault(folder, []).append(name)
    return contents


def read_manifest(store: Readable, commit: Commit) -> Manifest:
    """Read and validate a manifest. Any rank.

    Raises:
        CheckpointError: the manifest is damaged, void, deleted, or of another version or step.
        StoreError: the store failed; the checkpoint may be intact.
    """
    manifest = manifest_in(store, commit.folder)
    if (manifest.step, manifest.attempt) != (commit.step, commit.attempt):
        raise CheckpointError(
            f"{store.url}/{commit.manifest_key}: this is the manifest of step {manifest.step:,}, "
            f"attempt {manifest.attempt}; it was copied or renamed"
        )
    return manifest


def manifest_in(store: Readable, folder: str) -> Manifest:
    """Read and validate the manifest of a folder with any name. Any rank; raises the same errors.

    Its step and attempt may differ from those in the folder's name.
    """
    key = f"{folder}/{MANIFEST}"
    try:
        return from_bytes(store.read(key), f"{store.url}/{key}")
    except FileNotFoundError:
        raise CheckpointError(f"{store.url}/{key}: deleted in the meantime") from None


def measurements(manifest: Manifest) -> dict[str, float]:
    """Return the metrics measured at a checkpoint's own step, by name."""
    state = manifest.objects.get("run")
    if not isinstance(state, dict) or state.get("last_eval_step") != manifest.step:
        return {}
    metrics = state.get("metrics")
    items = metrics.items() if isinstance(metrics, dict) else ()
    return {str(name): value for name, value in items if type(value) in (int, float)}


def measured(manifest: Manifest, metric: str) -> float | None:
    """Return a metric if it was measured at the checkpoint's own step."""
    return measurements(manifest).get(metric)


def retention_of(manifest: Manifest) -> dict[str, Any]:
    """Return the run's `checkpoint` settings; values of a wrong type are omitted."""
    config = manifest.config.get("checkpoint")
    settings = dict(config) if isinstance(config, dict) else {}
    kinds = {
        "metric": str,
        "mode": str,
        "keep_last": int,
        "keep_best": int,
        "keep_every_steps": int,
    }
    wrong = [key for key, kind in kinds.items() if type(settings.get(key, kind())) is not kind]
    return {key: value for key, value in settings.items() if key not in wrong}


def mark_damaged(store: Store, commit: Commit, reason: str) -> None:
    """Mark a checkpoint as damaged, so that it is ignored but not deleted. Rank 0 only."""
    data = _record_bytes({"found": now(), "why": reason})
    store.replace(f"{commit.folder}/{DAMAGED}", data)


def delete(store: Store, folder: str) -> None:
    """Delete a checkpoint, its manifest first, and keep files of other programs. Rank 0 only."""
    names = store.entries(folder)
    if MANIFEST in names:
        store.delete([f"{folder}/{MANIFEST}"])
    shards = [name for name in names if is_shard_name(name) or name == DAMAGED]
    store.delete([f"{folder}/{name}" for name in shards])


def delete_except(store: Store, attempt: Attempt, retained: Collection[str]) -> None:
    """Delete checkpoints of this and older attempts, except `retained`. One rank per node.

    For nodes with a node-local directory, where rank 0 cannot delete.
    """
    for folder in {key.rpartition("/")[0] for key in store.list(FOLDER)}:
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if parsed is not None and parsed[1] <= attempt.number and folder not in retained:
            delete(store, folder)


def discard(store: Store, folder: str, by: Attempt) -> None:
    """Delete a folder that was never committed. Rank 0 only.

    A void manifest is created first, so that a process that still writes cannot commit the folder.
    If that process commits before, the folder stays.
    """
    keys = store.list(folder, unfinished=True)
    try:
        store.create(f"{folder}/{MANIFEST}", void_bytes(by.number))
    except AlreadyExists:
        return  # committed in the meantime
    store.delete(keys)


def clean(store: Store, attempt: Attempt, newest: Commit) -> None:
    """Delete the orphaned files of older attempts and abandoned checkpoints up to `newest`.

    Rank 0 only, after a commit.
    """
    current = {commit.folder for commit in commits(store, damaged=True)}
    for folder, names in folders(store).items():
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if parsed is None or parsed[1] >= attempt.number or folder in current:
            continue
        if MANIFEST not in names:
            discard(store, folder, attempt)
        elif parsed[0] <= newest.step and DAMAGED not in names:
            delete(store, folder)
