"""Attempts, and which committed checkpoints belong to the timeline that survives.

The newest attempt wins. Every attempt records which checkpoint it resumed from before it saves;
a checkpoint of an older attempt, from after that point, is of an abandoned timeline and ignored,
however late its manifest appears.
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
    """One start of the processes of a run."""

    number: int
    token: str
    """Eight random hexadecimal digits; part of every shard's name."""


@dataclass(frozen=True, order=True)
class Commit:
    """A committed checkpoint of the surviving timeline."""

    step: int
    attempt: int
    folder: str
    """Key of its folder."""

    @property
    def manifest_key(self) -> str:
        """Key of its manifest."""
        return f"{self.folder}/{MANIFEST}"


def now() -> str:
    """Return the time as attempts record it: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _key(number: int) -> str:
    return f"attempts/{number:04d}.json"


def begin(store: Store, facts: Mapping[str, Any], *, above: int = 0) -> Attempt:
    """Create the next attempt's record, before anything else is written. Rank 0 only.

    Args:
        store: the run's store.
        facts: to be recorded.
        above: numbers up to this one are taken elsewhere.
    """
    token, number = secrets.token_hex(4), above
    while True:
        number = max(max(attempts(store), default=0), number) + 1
        attempt = Attempt(number, token)
        try:
            begin_as(store, attempt, facts)
        except AlreadyExists:
            continue  # another start took the number at the same moment; a list may lag
        return attempt


def begin_as(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Create the record of an attempt whose number is known. Rank 0 only.

    Raises:
        AlreadyExists: another attempt has that number.
    """
    record = {"attempt": attempt.number, "token": attempt.token, "started": now(), **facts}
    store.create(_key(attempt.number), _record_bytes(record))


def amend(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Add facts to an attempt's own record, durably. Rank 0 only."""
    record = _read(store, attempt.number)
    store.replace(_key(attempt.number), _record_bytes({**record, **facts}))


def tell(store: Store, attempt: Attempt, facts: Mapping[str, Any]) -> None:
    """Replace what the attempt says of itself now and then; counts if it dies without a word."""
    store.replace(_last_words_key(attempt.number), _record_bytes(facts))


def records(store: Store) -> list[dict[str, Any]]:
    """Return the records of all attempts, oldest first."""
    return [record(store, number) for number in attempts(store)]


def record(store: Store, number: int) -> dict[str, Any]:
    """Return the record of one attempt, with what it told last where it does not say more."""
    return {**_last_words(store, number), **_read(store, number)}


def restore_record(store: Store, record: Mapping[str, Any]) -> None:
    """Write a record as another store of the run has it. Rank 0 only."""
    store.replace(_key(record["attempt"]), _record_bytes(record))


def _last_words_key(number: int) -> str:
    return f"attempts/{number:04d}.last.json"


def _last_words(store: Store, number: int) -> dict[str, Any]:
    try:
        words = _parsed(store.read(_last_words_key(number)))
    except (FileNotFoundError, ValueError, RecursionError):  # nothing depends on it
        return {}
    return words if isinstance(words, dict) else {}


def _parsed(data: bytes) -> Any:
    """Return the JSON of a record; an integer of more digits than a counter has is a float."""
    return json.loads(data, parse_int=lambda text: int(text) if len(text) < 20 else float(text))


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # an error may name a file that is not UTF-8


def attempts(store: Store) -> list[int]:
    """Return the numbers of all attempts, rising."""
    matches = [_RECORD_KEY.fullmatch(key) for key in store.list("attempts")]
    return sorted(int(match[1]) for match in matches if match)


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
            f"{store.url}/{_key(number)} is not the record of an attempt ({error}); which "
            "checkpoints count depends on it. Restore it, or delete it if that attempt committed "
            "nothing"
        ) from None
    return record


def refuse_if_superseded(store: Store, attempt: Attempt) -> None:
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
    store: Store, *, damaged: bool = False, known: Sequence[Mapping[str, Any]] | None = None
) -> list[Commit]:
    """Return the committed checkpoints of the surviving timeline, oldest first.

    Args:
        store: the run's store.
        damaged: include those that carry a mark of proven damage.
        known: the records of all attempts; None: as the store has them.
    """
    keys = store.list(FOLDER)
    marked = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{DAMAGED}")}
    starts = [
        (record["attempt"], record["resumed_from"]["step"])
        for record in (records(store) if known is None else known)
        if record.get("resumed_from")
    ]
    found = []
    for key in keys:
        folder, _, name = key.rpartition("/")
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if name != MANIFEST or parsed is None or (folder in marked and not damaged):
            continue
        commit = Commit(*parsed, folder)
        if not _orphaned(commit, starts) and not _void(store, key):
            found.append(commit)
    return sorted(found)


def _orphaned(commit: Commit, starts: Sequence[tuple[int, int]]) -> bool:
    return any(attempt > commit.attempt and step < commit.step for attempt, step in starts)


def _void(store: Store, key: str) -> bool:
    try:
        return store.size(key) < _VOID_MAX_BYTES and is_void(store.read(key))
    except FileNotFoundError:  # deleted since it was listed
        return True


def read_manifest(store: Readable, commit: Commit) -> Manifest:
    """Read and validate a manifest. Any rank.

    Raises:
        CheckpointError: it is altered, void, of another version or checkpoint, or gone.
        StoreError: it could not be read; nothing is known to be damaged.
    """
    where = f"{store.url}/{commit.manifest_key}"
    try:
        manifest = from_bytes(store.read(commit.manifest_key), where)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: it was deleted meanwhile") from None
    if (manifest.step, manifest.attempt) != (commit.step, commit.attempt):
        raise CheckpointError(
            f"{where}: it is the manifest of step {manifest.step:,}, attempt {manifest.attempt}; "
            "somebody copied or renamed it"
        )
    return manifest


def measurements(manifest: Manifest) -> dict[str, float]:
    """Return what was measured at a checkpoint's own step, by name; of any manifest."""
    state = manifest.objects.get("run")
    if not isinstance(state, dict) or state.get("last_eval_step") != manifest.step:
        return {}
    metrics = state.get("metrics")
    found = metrics if isinstance(metrics, dict) else {}
    return {str(name): value for name, value in found.items() if type(value) in (int, float)}


def measured(manifest: Manifest, metric: str) -> float | None:
    """Return the metric that was measured at a checkpoint's own step, if it was."""
    return measurements(manifest).get(metric)


def retention_of(manifest: Manifest) -> dict[str, Any]:
    """Return the run's settings of checkpoints as the manifest has them; perhaps none."""
    config = manifest.config.get("checkpoint")
    found = dict(config) if isinstance(config, dict) else {}
    kinds = {
        "metric": str,
        "mode": str,
        "keep_last": int,
        "keep_best": int,
        "keep_every_steps": int,
    }
    wrong = [key for key, kind in kinds.items() if type(found.get(key, kind())) is not kind]
    return {key: value for key, value in found.items() if key not in wrong}


def mark_damaged(store: Store, commit: Commit, why: str) -> None:
    """Set a checkpoint aside whose bytes were proven wrong; it is kept. Rank 0 only."""
    data = _record_bytes({"found": now(), "why": why})
    store.replace(f"{commit.folder}/{DAMAGED}", data)


def delete(store: Store, folder: str) -> None:
    """Delete a checkpoint: the manifest first, so that no half of it ever counts. Rank 0 only."""
    names = store.entries(folder)
    if MANIFEST in names:
        store.delete([f"{folder}/{MANIFEST}"])
    ours = [name for name in names if is_shard_name(name) or name == DAMAGED]
    store.delete([f"{folder}/{name}" for name in ours])  # and nothing that somebody else put there


def keep(store: Store, attempt: Attempt, folders: Collection[str]) -> None:
    """Delete the checkpoints of this attempt and older ones, but `folders`. One rank of a node.

    For nodes that have directories of their own, where rank 0 cannot delete.
    """
    for folder in {key.rpartition("/")[0] for key in store.list(FOLDER)}:
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if parsed is not None and parsed[1] <= attempt.number and folder not in folders:
            delete(store, folder)


def discard(store: Store, folder: str, by: Attempt) -> None:
    """Delete a folder that was never committed. Rank 0 only.

    It is voided first, so that a writer which is still alive cannot commit what is being deleted;
    if that one is faster, the folder stays.
    """
    keys = store.list(folder, unfinished=True)
    try:
        store.create(f"{folder}/{MANIFEST}", void_bytes(by.number))
    except AlreadyExists:
        return  # lineage decides about it
    store.delete(keys)


def clean(store: Store, attempt: Attempt, newest: Commit) -> None:
    """Delete what no attempt will ever commit or read. Rank 0 only, after a commit.

    Folders of older attempts without a manifest, and checkpoints of abandoned timelines.
    """
    alive = {commit.folder for commit in commits(store, damaged=True)}
    folders: dict[str, list[str]] = {}
    for key in store.list(FOLDER, unfinished=True):
        folder, _, name = key.rpartition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        parsed = parse_folder(folder.removeprefix(FOLDER + "/"))
        if parsed is None or parsed[1] >= attempt.number or folder in alive:
            continue
        if MANIFEST not in names:
            discard(store, folder, attempt)
        elif parsed[0] <= newest.step and DAMAGED not in names:
            delete(store, folder)
