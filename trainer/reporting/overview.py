"""The table of runs: a row per run, read with few requests."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.checkpoint import lineage, select
from trainer.config.schema import ObjectStore
from trainer.core.threads import in_parallel
from trainer.errors import ConfigError, PerdureError, StoreError
from trainer.reporting import curves, facts
from trainer.reporting.curves import is_number
from trainer.reporting.facts import Best, Facts
from trainer.storage import Store, open_store
from trainer.tracking import jsonl

UNREADABLE = "unreadable"
_MOST_AT_ONCE = 8
_DEPTH = 2
"""Folder levels searched for runs."""
_OVER = ("finished", "stopped", "died")
_ORDER = ("running", "starting", UNREADABLE, "silent", "died", "stopped", "unknown", "finished")


@dataclass(frozen=True)
class Row:
    """Row of a run in the table of runs. Times are in seconds since 1970."""

    run: str
    state: str
    reason: str = ""
    since_s: float | None = None
    step: int = 0
    max_steps: int | None = None
    eta_s: float | None = None
    """Seconds until the end at the recent speed; None if not running or unknown."""
    losses: Sequence[float] = ()
    """Recent training losses, the newest last."""
    metric: str | None = None
    value: float | None = None
    """Metric of the newest evaluation."""
    eval_step: int | None = None
    best: Best | None = None
    """Best value of the run's metric so far."""
    checkpoint_step: int | None = None
    checkpoint_s: float | None = None
    attempts: Sequence[int] = field(default=())

    def json(self) -> dict[str, Any]:
        """Return the row as JSON values, with the last loss only."""
        values = asdict(self)
        values["loss"] = self.losses[-1] if self.losses else None
        values["attempts"] = len(self.attempts)
        values["why"] = values.pop("reason")  # the key of --json
        return {key: value for key, value in values.items() if key != "losses"}


def find(url: str, settings: ObjectStore) -> list[str]:
    """Return the URLs of the runs there: the run itself, or those in the folder.

    Raises:
        ConfigError: no run exists there.
        StoreError: the store is unreachable.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    names = store.entries("")
    if facts.is_run(names):
        return [url]
    keys = _below(store, "", names, _DEPTH)
    if not keys:
        facts.require_run(url, names)
    above = "" if url == "." else f"{url.rstrip('/')}/"
    return [above + key for key in keys]


def _below(store: Store, folder: str, names: Sequence[str], depth: int) -> list[str]:
    keys = []
    for name in names:
        if not name.endswith("/") or name.startswith("."):
            continue
        key = f"{folder}{name}".rstrip("/")
        try:
            entries = store.entries(key)
        except StoreError:
            keys.append(key)  # its row shows the error
            continue
        if facts.is_run(entries):
            keys.append(key)
        elif depth > 1:
            keys += _below(store, f"{key}/", entries, depth - 1)
    return keys


def read_row(url: str, settings: ObjectStore, before: Row | None = None) -> Row:
    """Return the row of a run, with the error if it cannot be read.

    Args:
        url: of the run.
        settings: of the store.
        before: the previous row; kept if the newest attempt had ended and no other has started.
    """
    try:
        store = open_store(url, settings)
        attempts = lineage.attempts(store)
        if before is not None and before.state in _OVER and before.attempts == attempts:
            return before
        return _assemble(url, store, attempts)
    except PerdureError as error:
        return Row(url, UNREADABLE, str(error))


def _assemble(url: str, store: Store, attempts: Sequence[int]) -> Row:
    record = lineage.record(store, attempts[-1]) if attempts else {}
    lines = jsonl.newest(store).lines
    try:
        config = facts.read_config(store)
    except ConfigError:
        config = {}
    run = Facts(url, store, time.time(), [record] if record else [], lines, config)
    condition = run.condition
    metric, value, eval_step = _evaluation(run)
    saved = _newest_checkpoint(store, record)
    losses = [value for _, value in curves.points(lines, "train", "loss")]
    return Row(
        url,
        condition.state,
        condition.reason,
        condition.since_s,
        run.step,
        run.max_steps,
        _eta_s(run) if condition.state == "running" else None,
        losses[-200:],
        metric,
        value,
        eval_step,
        run.best,
        *saved,
        attempts=attempts,
    )


def _evaluation(run: Facts) -> tuple[str | None, float | None, int | None]:
    """Return name, value and step of the newest evaluation: `checkpoint.metric`, or the loss."""
    newest = run.last("eval")
    settings = run.config.get("checkpoint")
    metric_setting = settings.get("metric") if isinstance(settings, Mapping) else None
    for key in (str(metric_setting), "loss", *newest):
        if key not in ("step", "epoch", "samples", "time") and is_number(newest.get(key)):
            return str(key), float(newest[key]), newest["step"]
    return None, None, newest.get("step")


def _eta_s(run: Facts) -> float | None:
    """Return the remaining seconds at the recent speed, evaluations and saves included."""
    first_step, limit = run.record.get("first_step"), run.max_steps
    first_step = first_step if type(first_step) is int else 0
    timed = [
        line for line in run.lines if is_number(line.get("time")) and line["step"] > first_step
    ]
    if limit is None or len(timed) < 2 or timed[-1]["step"] == timed[0]["step"]:
        return None
    elapsed_s = timed[-1]["time"] - timed[0]["time"]
    step_s = elapsed_s / (timed[-1]["step"] - timed[0]["step"])
    return float(max(limit - run.step, 0) * max(step_s, 0.0))


def _newest_checkpoint(store: Store, record: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Return the step and commit time of the newest checkpoint."""
    commit = select.newest_listed(store, record)
    if commit is None:
        return None, None
    with suppress(FileNotFoundError):  # deleted in the meantime
        return commit.step, store.modified_s(commit.manifest_key)
    return None, None


def read_rows(
    urls: Sequence[str], settings: ObjectStore, before: Mapping[str, Row] | None = None
) -> list[Row]:
    """Return the rows of runs, several read at a time, in the order of `ordered`.

    Args:
        urls: of the runs.
        settings: of the store.
        before: previous rows by URL.
    """
    rows: dict[str, Row] = {}

    def read(url: str) -> None:
        rows[url] = read_row(url, settings, (before or {}).get(url))

    in_parallel(read, list(dict.fromkeys(urls)), _MOST_AT_ONCE)
    return ordered(list(rows.values()))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return runs of the same metric from the best value to the worst, then those without a value.

    Among equal ones, running runs come first, then those that need attention.
    """
    return sorted(rows, key=lambda row: (facts.rank(row.best), _ORDER.index(row.state), row.run))
