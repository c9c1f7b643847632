"""A line on each of many runs, read at little cost. Reads only."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.checkpoint import attempts as history
from trainer.checkpoint import lineage, select
from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, PerdureError, StoreError
from trainer.reporting import curves, facts
from trainer.reporting.curves import is_number
from trainer.storage import Store, open_store
from trainer.tracking import jsonl

UNREADABLE = "unreadable"
_DEPTH = 2
"""How far below a folder runs are looked for."""
_OVER = ("finished", "stopped", "died")
_ORDER = ("running", "starting", UNREADABLE, "silent", "died", "stopped", "unknown", "finished")


@dataclass(frozen=True)
class Row:
    """A run as a table of runs has it. Moments are in seconds since 1970."""

    run: str
    state: str
    why: str = ""
    since_s: float | None = None
    step: int = 0
    max_steps: int | None = None
    eta_s: float | None = None
    """Seconds until the end at the pace of late; None: it does not run, or nobody knows."""
    losses: Sequence[float] = ()
    """Of the training, lately, the newest last."""
    metric: str | None = None
    value: float | None = None
    """Of the newest evaluation."""
    eval_step: int | None = None
    checkpoint_step: int | None = None
    checkpoint_s: float | None = None
    attempts: Sequence[int] = field(default=())

    def json(self) -> dict[str, Any]:
        """Return the row for programs, losses left out."""
        values = asdict(self)
        values["loss"] = self.losses[-1] if self.losses else None
        values["attempts"] = len(self.attempts)
        return {key: value for key, value in values.items() if key != "losses"}


def find(url: str, settings: ObjectStore) -> list[str]:
    """Return the places of the runs that lie there: that one, or those in the folder.

    Raises:
        ConfigError: there is none.
        StoreError: the place cannot be reached.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if facts.is_run(names):
        return [url]
    found = _below(store, "", names, _DEPTH)
    if not found:
        facts.refuse_other_places(url, names)
    above = "" if url == "." else f"{url.rstrip('/')}/"
    return [above + key for key in found]


def _below(store: Store, folder: str, names: Sequence[str], depth: int) -> list[str]:
    found = []
    for name in names:
        if not name.endswith("/") or name.startswith("."):
            continue
        key = f"{folder}{name}".rstrip("/")
        try:
            inner = store.entries(key)
        except StoreError:
            found.append(key)  # its row says what is wrong
            continue
        if facts.is_run(inner):
            found.append(key)
        elif depth > 1:
            found += _below(store, f"{key}/", inner, depth - 1)
    return found


def look(url: str, settings: ObjectStore, before: Row | None = None) -> Row:
    """Return a run's row; one that cannot be read says so. `before`: what it was a moment ago.

    A run whose newest attempt is over is not read again.
    """
    try:
        store = open_store(url, settings)
        attempts = lineage.attempts(store)
        if before is not None and before.state in _OVER and before.attempts == attempts:
            return before
        return _read(url, store, attempts)
    except PerdureError as error:
        return Row(url, UNREADABLE, str(error))


def _read(url: str, store: Store, attempts: Sequence[int]) -> Row:
    record = lineage.record(store, attempts[-1]) if attempts else {}
    lines = jsonl.newest(store).lines
    try:
        config = facts.read_config(store)
    except ConfigError:
        config = {}
    heard_s = facts.heard_s(lines)
    standing = history.standing(record or None, heard_s=heard_s, now_s=time.time())
    step = facts.newest_step(lines, record)
    told = record.get("steps_per_epoch")
    per_epoch = told if type(told) is int else curves.steps_per_epoch(lines)
    most = facts.max_steps(record, config, per_epoch)
    metric, value, eval_step = _evaluation(lines, config)
    saved = _newest_checkpoint(store, record)
    losses = [value for _, value in curves.points(lines, "train", "loss")]
    return Row(
        url,
        standing.state,
        standing.why,
        standing.since_s,
        step,
        most,
        _eta_s(lines, record, step, most) if standing.state == "running" else None,
        losses[-200:],
        metric,
        value,
        eval_step,
        *saved,
        attempts=attempts,
    )


def _evaluation(
    lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[str | None, float | None, int | None]:
    """Return the figure that decides, or the loss, of the newest evaluation."""
    newest = next((line for line in reversed(lines) if line["split"] == "eval"), None)
    if newest is None:
        return None, None, None
    settings = config.get("checkpoint")
    wanted = settings.get("metric") if isinstance(settings, Mapping) else None
    for key in (str(wanted), "loss", *newest):
        if key not in ("step", "epoch", "samples", "time") and is_number(newest.get(key)):
            return str(key), float(newest[key]), newest["step"]
    return None, None, newest["step"]


def _eta_s(
    lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any], step: int, most: int | None
) -> float | None:
    """Return how long the rest takes, evaluations and saves included, as the last lines went."""
    first_step = record.get("first_step")
    first_step = first_step if type(first_step) is int else 0
    timed = [line for line in lines if is_number(line.get("time")) and line["step"] > first_step]
    if most is None or len(timed) < 2 or timed[-1]["step"] == timed[0]["step"]:
        return None
    took_s = timed[-1]["time"] - timed[0]["time"]
    pace_s = took_s / (timed[-1]["step"] - timed[0]["step"])
    return float(max(most - step, 0) * max(pace_s, 0.0))


def _newest_checkpoint(store: Store, record: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Return the step and commit time of the newest checkpoint."""
    commit = select.newest_listed(store, record)
    if commit is None:
        return None, None
    with suppress(FileNotFoundError):  # deleted in the meantime
        return commit.step, store.modified_s(commit.manifest_key)
    return None, None


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return what runs first, then what needs somebody, then what is finished."""
    return sorted(rows, key=lambda row: (_ORDER.index(row.state), row.run))
