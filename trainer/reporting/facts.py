"""The facts of a run, read from its directory or bucket."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import yaml

from trainer.checkpoint import attempts, lineage
from trainer.checkpoint.attempts import Condition, Goodput
from trainer.checkpoint.inspection import CheckpointStatus, inspect
from trainer.checkpoint.location import Location
from trainer.config.schema import ObjectStore
from trainer.core import metric_mode
from trainer.errors import ConfigError, PerdureError
from trainer.reporting import curves
from trainer.reporting.curves import is_number
from trainer.storage import Store, local_path, open_store
from trainer.tracking import jsonl

T = TypeVar("T")
_MARKS = ("attempts/", jsonl.FILE_NAME)
"""Entries of which every run directory has at least one."""


@dataclass(frozen=True)
class Best:
    """Best value of a metric, at the step where it was first reached."""

    metric: str
    mode: str
    value: float
    step: int


def rank(best: Best | None) -> tuple[Any, ...]:
    """Return a sort key: by metric and mode, from the best value to the worst; None is last."""
    if best is None:
        return (True,)
    return False, best.metric, best.mode, best.value if best.mode == "min" else -best.value


@dataclass(frozen=True)
class Facts:
    """Facts of a run, read at one time."""

    url: str
    store: Store
    read_s: float
    """Time of reading, in seconds since 1970."""
    records: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the newest attempt."""
    checkpoints: Sequence[CheckpointStatus] = ()
    saves: Sequence[Mapping[str, Any]] = ()
    """Lines of saves.jsonl."""
    notes: Sequence[str] = ()
    """Messages about unreadable parts."""

    @property
    def name(self) -> str:
        """Return the run's name, or that of its directory."""
        name = self.config.get("name")
        path = local_path(self.url)
        folder = path.resolve().name if path is not None else self.url.rpartition("/")[2]
        return name if isinstance(name, str) and name else folder or self.url

    @property
    def record(self) -> Mapping[str, Any]:
        """Return the newest attempt's record; empty without one."""
        return self.records[-1] if self.records else {}

    @cached_property
    def condition(self) -> Condition:
        """Return whether the run is active, and if not, how it ended."""
        times = [line.get("time") for line in self.lines[-20:]]
        last_activity_s = max((float(at) for at in times if is_number(at)), default=None)  # type: ignore[arg-type]
        return attempts.condition(
            self.record or None, last_activity_s=last_activity_s, now_s=self.read_s
        )

    @property
    def step(self) -> int:
        """Return the newest step in the metrics or the newest attempt's record."""
        recorded = [self.record.get(key) for key in ("last_step", "first_step")]
        steps_known = [step for step in recorded if type(step) is int]
        return max([*steps_known, *(line["step"] for line in self.lines[-20:])], default=0)

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """Return the number of steps per epoch, if recorded or derivable."""
        recorded = self.record.get("steps_per_epoch")
        is_valid = type(recorded) is int and recorded > 0
        return recorded if is_valid else curves.steps_per_epoch(self.lines)

    @property
    def max_steps(self) -> int | None:
        """Return the step at which the run ends, as recorded or from its configuration."""
        recorded = self.record.get("max_steps")
        if type(recorded) is int:
            return recorded
        limits = self.config.get("trainer")
        if not isinstance(limits, Mapping):
            return None
        steps, epochs, length = (
            limits.get("max_steps"),
            limits.get("max_epochs"),
            self.steps_per_epoch,
        )
        by_epochs = epochs * length if type(epochs) is int and length else None
        steps_known = [n for n in (steps, by_epochs) if type(n) is int and n < 1 << 63]
        return min(steps_known, default=None)

    @property
    def goodput(self) -> Goodput:
        """Return the goodput over all attempts."""
        return attempts.goodput(self.records, self.step)

    @cached_property
    def best(self) -> Best | None:
        """Return the best evaluation, by `checkpoint.metric` or else by the loss.

        The newest attempt's record has it too, for readers of the newest lines only.
        """
        checkpoint_settings = self.config.get("checkpoint")
        settings = checkpoint_settings if isinstance(checkpoint_settings, Mapping) else {}
        for metric in (settings.get("metric"), "loss"):
            if not isinstance(metric, str):
                continue
            points = [*self._recorded_best(metric), *curves.points(self.lines, "eval", metric)]
            if points:
                mode = metric_mode.resolve(metric, settings.get("mode"))
                bests = [Best(metric, mode, value, step) for step, value in points]
                return min(bests, key=lambda best: (rank(best), best.step))
        return None

    def _recorded_best(self, metric: str) -> curves.Points:
        best = self.record.get("best")
        if not isinstance(best, Mapping) or best.get("metric") != metric:
            return []
        step: Any = best.get("step")
        value: Any = best.get("value")
        return [(step, float(value))] if type(step) is int and is_number(value) else []

    def last(self, split: str) -> Mapping[str, Any]:
        """Return the newest line of a split; empty without one."""
        return next((line for line in reversed(self.lines) if line["split"] == split), {})


def gather(url: str, settings: ObjectStore) -> Facts:
    """Read everything except the shards of checkpoints. Unreadable parts become notes.

    Raises:
        ConfigError: the URL is not a run.
        StoreError: the store is unreachable.
    """
    url = url.rstrip("/") or "/"
    store = open_store(url, settings)
    require_run(url, store.entries(""))
    notes: list[str] = []

    def attempt(subject: str, read: Callable[[], T], default: T) -> T:
        try:
            return read()
        except PerdureError as error:
            notes.append(f"{subject} cannot be read: {error}")
            return default

    def lines(name: str) -> list[dict[str, Any]]:
        salvaged = attempt(name, lambda: jsonl.salvage(store, name), jsonl.Salvage())
        if salvaged.damaged:
            verb = "line was" if salvaged.damaged == 1 else "lines were"
            notes.append(f"{salvaged.damaged:,} damaged {verb} skipped in {name}.")
        return salvaged.lines

    metrics, saves = lines(jsonl.FILE_NAME), lines(jsonl.SAVES_NAME)
    no_records: list[dict[str, Any]] = []
    records = attempt("attempts/", lambda: lineage.records(store), no_records)
    return Facts(
        url,
        store,
        time.time(),
        records,
        sorted(metrics, key=lambda line: line["step"]),
        attempt("config.yaml", lambda: read_config(store), {}),
        attempt("checkpoints/", lambda: inspect(Location(url, store)), []),
        saves,
        notes,
    )


def is_run(names: Sequence[str]) -> bool:
    """Return whether these are the entries of a run's directory."""
    return any(mark in names for mark in _MARKS)


def require_run(url: str, names: Sequence[str]) -> None:
    """Raise unless these are the entries of a run directory.

    Raises:
        ConfigError: they are not.
    """
    if is_run(names):
        return
    listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    problem = f"is not a run (it has {listed})" if names else "does not exist, or is empty"
    raise ConfigError(
        f"{url} {problem}; give the directory of a run, as `python -m trainer.run` printed it"
    )


def read_config(store: Store) -> dict[str, Any]:
    """Return the configuration of the newest attempt; empty without one.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        config = yaml.safe_load(store.read("config.yaml"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"config.yaml is not YAML ({text})") from None
    return config if isinstance(config, dict) else {}
