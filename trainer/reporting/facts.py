"""What is known of a run from its directory or bucket. Reads only."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import yaml

from trainer.checkpoint import attempts, lineage
from trainer.checkpoint.attempts import Goodput, Standing
from trainer.checkpoint.inspection import CheckpointStatus, inspect
from trainer.checkpoint.location import Location
from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, PerdureError
from trainer.reporting import curves
from trainer.reporting.curves import is_number
from trainer.storage import Store, local_path, open_store
from trainer.tracking import jsonl

T = TypeVar("T")
SAVES = "saves.jsonl"
_MARKS = ("attempts/", jsonl.FILE_NAME)
"""One of these lies in every run's directory."""


@dataclass(frozen=True)
class Best:
    """The best of a figure, at the step where it was reached first."""

    metric: str
    mode: str
    value: float
    step: int


@dataclass(frozen=True)
class Facts:
    """A run as it was read at one moment."""

    url: str
    store: Store
    read_s: float
    """When, in seconds since 1970."""
    records: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of the newest attempt."""
    checkpoints: Sequence[CheckpointStatus] = ()
    saves: Sequence[Mapping[str, Any]] = ()
    """What saves took, where the run has noted it."""
    notes: Sequence[str] = ()
    """What could not be read, for people."""

    @property
    def name(self) -> str:
        """Return the run's name, or that of its directory."""
        name = self.config.get("name")
        path = local_path(self.url)
        found = path.resolve().name if path is not None else self.url.rstrip("/").rpartition("/")[2]
        return name if isinstance(name, str) and name else found or self.url

    @cached_property
    def standing(self) -> Standing:
        """Return whether it runs, and if not, how it ended."""
        newest = self.records[-1] if self.records else None
        return attempts.standing(newest, heard_s=heard_s(self.lines), now_s=self.read_s)

    @property
    def step(self) -> int:
        """Return the newest step that is known of."""
        return newest_step(self.lines, self.records[-1] if self.records else {})

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """Return how long an epoch is, if it is known."""
        told = self.records[-1].get("steps_per_epoch") if self.records else None
        return told if type(told) is int and told > 0 else curves.steps_per_epoch(self.lines)

    @property
    def max_steps(self) -> int | None:
        """Return how many steps the run is to take, if it is known."""
        newest = self.records[-1] if self.records else {}
        return max_steps(newest, self.config, self.steps_per_epoch)

    @property
    def goodput(self) -> Goodput:
        """Return what all attempts have done together."""
        return attempts.goodput(self.records, self.step)

    @cached_property
    def best(self) -> Best | None:
        """Return the best evaluation: of the metric that decides, else of the loss."""
        chosen = self.config.get("checkpoint")
        settings = chosen if isinstance(chosen, Mapping) else {}
        wanted = [(settings.get("metric"), settings.get("mode", "max")), ("loss", "min")]
        for metric, mode in wanted:
            found = curves.points(self.lines, "eval", metric) if isinstance(metric, str) else []
            if found:
                choose = min if mode == "min" else max
                step, value = choose(found, key=lambda point: point[1])
                return Best(str(metric), str(mode), value, step)
        return None

    def last(self, split: str) -> Mapping[str, Any]:
        """Return the newest line of a split; perhaps none."""
        return next((line for line in reversed(self.lines) if line["split"] == split), {})


def gather(url: str, settings: ObjectStore) -> Facts:
    """Read everything but the checkpoints' shards. What cannot be read becomes a note.

    Raises:
        ConfigError: no run lies there.
        StoreError: the place cannot be reached.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    refuse_other_places(url, store.entries(""))
    notes: list[str] = []

    def attempt(what: str, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except PerdureError as error:
            notes.append(f"{what} cannot be read: {error}")
            return otherwise

    found = attempt("The figures", lambda: jsonl.salvage(store), jsonl.Salvage())
    if found.damaged:
        were = "line was" if found.damaged == 1 else "lines were"
        notes.append(f"{found.damaged:,} damaged {were} skipped in {jsonl.FILE_NAME}.")
    saves = attempt("The saves", lambda: _saves(store), jsonl.Salvage())
    if saves.damaged:
        were = "line was" if saves.damaged == 1 else "lines were"
        notes.append(f"{saves.damaged:,} damaged {were} skipped in {SAVES}.")
    nobody: list[dict[str, Any]] = []
    records = attempt("The attempts", lambda: lineage.records(store), nobody)
    return Facts(
        url,
        store,
        time.time(),
        records,
        sorted(found.lines, key=lambda line: line["step"]),
        attempt("The configuration", lambda: read_config(store), {}),
        attempt("The checkpoints", lambda: inspect(Location(url, store)), []),
        saves.lines,
        notes,
    )


def is_run(names: Sequence[str]) -> bool:
    """Return whether these are the entries of a run's directory."""
    return any(mark in names for mark in _MARKS)


def refuse_other_places(url: str, names: Sequence[str]) -> None:
    """Make sure that a run lies there.

    Raises:
        ConfigError: something else does, or nothing.
    """
    if is_run(names):
        return
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    found = f"holds no run (there is {shown})" if names else "does not exist, or is empty"
    raise ConfigError(
        f"{url} {found}; give the directory of a run, as `python -m trainer.run` printed it"
    )


def heard_s(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return when the newest line was written, in seconds since 1970."""
    times = [line.get("time") for line in lines[-20:]]
    return max((float(at) for at in times if is_number(at)), default=None)  # type: ignore[arg-type]


def newest_step(lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> int:
    """Return the newest step that the figures or the newest attempt's record know of."""
    told = [record.get(key) for key in ("last_step", "first_step")]
    known = [step for step in told if type(step) is int]
    return max([*known, *(line["step"] for line in lines[-20:])], default=0)


def max_steps(
    record: Mapping[str, Any], config: Mapping[str, Any], steps_per_epoch: int | None
) -> int | None:
    """Return how many steps a run is to take: as it said itself, else as its configuration says."""
    told = record.get("max_steps")
    if type(told) is int:
        return told
    limits = config.get("trainer")
    if not isinstance(limits, Mapping):
        return None
    steps, epochs = limits.get("max_steps"), limits.get("max_epochs")
    by_epochs = epochs * steps_per_epoch if type(epochs) is int and steps_per_epoch else None
    known = [n for n in (steps, by_epochs) if type(n) is int and n < 1 << 63]
    return min(known, default=None)


def read_config(store: Store) -> dict[str, Any]:
    """Return the configuration of the newest attempt; empty where there is none yet.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        found = yaml.safe_load(store.read("config.yaml"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"config.yaml is not YAML ({text})") from None
    return found if isinstance(found, dict) else {}


def _saves(store: Store) -> jsonl.Salvage:
    found = jsonl.Salvage()
    try:
        texts = store.read(SAVES).split(b"\n")
    except FileNotFoundError:
        return found
    for text in filter(bytes.strip, texts):
        try:
            line = json.loads(text)
            is_whole = type(line["step"]) is int
        except (ValueError, LookupError, TypeError, RecursionError):
            is_whole = False
        if is_whole:
            found.lines.append(line)
        else:
            found.damaged += 1
    return found
