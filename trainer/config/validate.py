"""Validation of values that have the right type."""

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from trainer.config.schema import Init, Run
from trainer.core.formatting import pluralize
from trainer.errors import Problem, closest

_MAX_SEED = (1 << 63) - 1


def validate(run: Run) -> list[Problem]:
    """Return the problems of values that have the right type."""
    problems = check_ranges(run) + _check_numbers(run)
    if not re.fullmatch(r"(?!\.+$)[\w.,=+@-]+", run.name):
        text = f"{run.name!r} must consist of letters, digits and . , = + @ _ -, not only dots"
        problems.append(Problem("name", text))
    problems += _check_location("run_dir", run.run_dir)
    if run.checkpoint.mirror is not None:
        problems += _check_mirror(run)
    if not run.resume:
        problems.append(Problem("resume", "is empty; use auto, never, best, a step or a path"))
    for key in ("nproc", "threads"):
        value = getattr(run.launch, key)
        if value != "auto" and not (value.isdecimal() and int(value) >= 1):
            problems.append(Problem(f"launch.{key}", f"{value!r} is neither auto nor 1, 2, …"))
    if run.trainer.max_epochs is None and run.trainer.max_steps is None:
        text = "both trainer.max_steps and trainer.max_epochs are null: the run would never end"
        problems.append(Problem("trainer.max_epochs", text))
    if run.trainer.max_time is not None and seconds(run.trainer.max_time) is None:
        text = f"{run.trainer.max_time!r} is not a time: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS"
        problems.append(Problem("trainer.max_time", text))
    for group in ("model", "data", "task", "optimizer"):
        if not getattr(run, group).get("_target_"):
            text = "has no _target_; choose one, for example with "
            problems.append(Problem(group, text + f"{group}=<name> (see --help)"))
    problems += _check_init(run.init)
    interval = run.scheduler.get("interval", "step")
    if interval not in ("step", "epoch"):
        text = f"{interval!r} is not step or epoch{closest(str(interval), ('step', 'epoch'))}"
        problems.append(Problem("scheduler.interval", text))
    return problems


def validate_world(run: Run, world_size: int) -> list[Problem]:
    """Return the problems of `run` on `world_size` ranks, with the nearest valid batch sizes."""
    problems = []
    unit = world_size * run.trainer.accumulate
    size = run.trainer.global_batch_size
    if size % unit:
        lower, upper = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{lower:,} or {upper:,}" if lower else f"{upper:,}"
        text = (
            f"{size:,} samples cannot be divided over {pluralize(world_size, 'rank')} x "
            f"{pluralize(run.trainer.accumulate, 'microbatch')} (nearest: {nearest})"
        )
        problems.append(Problem("trainer.global_batch_size", text))
    if world_size > 1 and run.parallel.strategy == "single":
        text = f"'single' cannot use {world_size:,} ranks; use parallel=ddp or launch.nproc=1"
        problems.append(Problem("parallel.strategy", text))
    return problems


def check_ranges(node: Any, prefix: str = "") -> list[Problem]:
    """Return the problems of values outside the choices and ranges of their settings."""
    problems = []
    for item in fields(node):
        value, rule = getattr(node, item.name), item.metadata
        full = prefix + item.name
        if is_dataclass(value):
            problems += check_ranges(value, full + ".")
        elif value is None:
            continue
        elif isinstance(value, float) and math.isnan(value):
            problems.append(Problem(full, "nan is not a number"))
        elif rule["choices"] and value not in rule["choices"]:
            hint = closest(value, rule["choices"])
            problems.append(Problem(full, f"{value!r} is not one of its values{hint}"))
        elif rule["at_least"] is not None and not value >= rule["at_least"]:
            problems.append(Problem(full, f"{value} is too small (nearest: {rule['at_least']})"))
        elif rule["at_most"] is not None and not value <= rule["at_most"]:
            problems.append(Problem(full, f"{value} is too large (nearest: {rule['at_most']})"))
        elif rule["above"] is not None and not value > rule["above"]:
            problems.append(Problem(full, f"{value} must be larger than {rule['above']}"))
    return problems


def seconds(text: str) -> float | None:
    """Return the seconds of `[[[D-]HH:]MM:]SS`; None if the text is not a time, or zero."""
    matched = re.fullmatch(r"(?:(?:(?:(\d+)-)?(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if matched is None:
        return None
    days, hours, minutes, rest = (float(part or 0) for part in matched.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None


def _check_init(init: Init) -> list[Problem]:
    problems = [
        Problem(f"init.{key}", "needs init.weights, the location of the weights")
        for key in ("skip", "rename")
        if getattr(init, key) and not init.weights
    ]
    for old, new in init.rename.items():
        if new.count("*") > old.count("*"):
            problems.append(Problem("init.rename", f"{new!r} has more * than {old!r}"))
    return problems


def _check_mirror(run: Run) -> list[Problem]:
    mirror = run.checkpoint.mirror or ""
    problems = _check_location("checkpoint.mirror", mirror)
    here, there = (f"{location.rstrip('/')}/" for location in (run.run_dir, mirror))
    if not problems and (here.startswith(there) or there.startswith(here)):
        text = f"{mirror!r} and run_dir={run.run_dir} are nested; use two separate locations"
        problems.append(Problem("checkpoint.mirror", text))
    return problems


def _check_location(key: str, location: str) -> list[Problem]:
    host = location.partition("://")[2].partition("/")[0]
    text = ""
    if not location:
        text = "is empty; give the directory of the run"
    elif "@" in host:
        text = "contains credentials, which would be stored as plain text; see docs/storage.md"
    elif re.fullmatch(r"[\w+.-]+://[^/]*/*", location):
        text = f"{location!r} is a bucket; add the name of a directory in it"
    return [Problem(key, text)] if text else []


def _check_numbers(run: Run) -> list[Problem]:
    problems = []
    if not all(size >= 1 for size in run.sample.shape):
        problems.append(Problem("sample.shape", f"{run.sample.shape} has a dimension below 1"))
    if run.seed > _MAX_SEED:
        problems.append(Problem("seed", f"{run.seed} is too large (nearest: {_MAX_SEED})"))
    if run.trainer.ema_decay is not None and run.trainer.ema_decay >= 1:
        text = f"{run.trainer.ema_decay} would never update the average; use a number below 1"
        problems.append(Problem("trainer.ema_decay", text))
    if run.trainer.patience_evals is not None and run.checkpoint.metric is None:
        text = "needs checkpoint.metric, the metric that has to improve"
        problems.append(Problem("trainer.patience_evals", text))
    halves = run.parallel.strategy == "fsdp" and run.parallel.param_dtype == "fp16"
    if halves and run.trainer.precision != "fp16":
        text = "'fp16' loses small gradients unless the loss is scaled; set trainer.precision=fp16"
        problems.append(Problem("parallel.param_dtype", text))
    if run.preemption.grace_s is not None and math.isinf(run.preemption.grace_s):
        problems.append(Problem("preemption.grace_s", "inf is not a number of seconds"))
    return problems
