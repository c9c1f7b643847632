"""Directories of runs, written by hand."""

import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "name": "mine",
    "trainer": {"max_epochs": 4, "max_steps": None},
    "optimizer": {"lr": 0.1},
    "checkpoint": {"metric": "accuracy", "mode": "max"},
}


def moment(before_s: float) -> str:
    """A time before now as records have it."""
    return datetime.fromtimestamp(time.time() - before_s, UTC).isoformat(timespec="seconds")


def first(**more: Any) -> dict[str, Any]:
    """The record of an attempt that was preempted a while ago."""
    return {
        "started": moment(1000), "host": "n1", "world_size": 2, "device": "cpu", "threads": 1,
        "versions": {"torch": "2.1"}, "first_step": 0, "last_step": 20, "ended": moment(979),
        "outcome": "preempted", "reason": "SIGTERM", "starting_s": 2.0, "training_s": 19.0,
        "resumed_from": {"step": 0, "attempt": None}, **more,
    }  # fmt: skip


def second(**more: Any) -> dict[str, Any]:
    """The record of the attempt that went on and finished."""
    origin = {"step": 18, "attempt": 1}
    return first(
        started=moment(600), ended=moment(570), outcome="done", reason=None, first_step=18,
        last_step=40, world_size=4, resumed_from=origin, changed=["optimizer.lr: 0.2 -> 0.1"],
        **more,
    )  # fmt: skip


def lines(last: int = 40, began_s: float = 1000.0, per_epoch: int = 10) -> list[dict[str, Any]]:
    """A training line of every step, one a second; an evaluation at each epoch's end."""
    metric_lines, zero_s = [], time.time() - began_s
    for step in range(1, last + 1):
        at = {"step": step, "epoch": step // per_epoch, "samples": 8 * step}
        at["time"] = zero_s + step
        speed = {"lr": 0.1 / step, "samples_per_s": 100.0 + step}
        metric_lines.append({**at, "split": "train", "loss": 3.0 / step, "accuracy": 0.5, **speed})
        if step % per_epoch == 0:
            accuracy = 0.9 - abs(step - 30) / 100  # the best is at 30
            metric_lines.append({**at, "split": "eval", "loss": 3.5 / step, "accuracy": accuracy})
    return metric_lines


def write(
    folder: Path,
    metrics: Iterable[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = CONFIG,
    records: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Write a run's directory."""
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for number, record in enumerate(records, 1):
        complete = {"attempt": number, "token": "aaaaaaaa", **record}
        (folder / f"attempts/{number:04d}.json").write_text(json.dumps(complete))
    return folder


HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked=alert(1)</script>"
    "<img src=x onerror=alert(2)>\" onload='alert(3)"
)


def hostile_run(folder: Path) -> Path:
    """Write a run whose names, values and texts try to become part of a page."""
    bad = lines()
    for line in bad:
        line[HOSTILE] = 0.5
    bad[0]["loss"] = HOSTILE
    hostile = {"host": HOSTILE, "outcome": "error", "error": HOSTILE, "changed": [HOSTILE]}
    record = {**second(), **hostile, HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}
    config = {**CONFIG, "name": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}
    write(folder, bad, config, [first(), record])
    samples = folder / "samples"
    samples.mkdir()
    (samples / "a.txt").write_text(HOSTILE)
    predicted = {
        "samples": [{"index": HOSTILE, "label": HOSTILE, "prediction": 0, "probability": 2.0}],
        "confusion": [[1, 2], [3, 4]], "classes": [HOSTILE, "b"], "confusion_samples": HOSTILE,
    }  # fmt: skip
    (samples / "predictions.json").write_text(json.dumps(predicted))
    return folder
