"""What can be configured: frozen dataclasses with defaults, units and docs, and a strict merge.

Hydra composes the YAML files and the command line; `merge` judges the result. It collects every
problem instead of stopping at the first, starts nothing and changes nothing.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from trainer.core.formatting import pluralize
from trainer.errors import Problem, closest

_MAX_SEED = (1 << 63) - 1


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a field: its default, its one-line doc with the unit, and what values are valid."""
    metadata = {"doc": doc, "choices": choices, "at_least": at_least, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type) and is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one sample of the data looks like; model configurations refer to it."""

    shape: list[int] = setting([1, 28, 28], "Shape of one input without the batch axis.")
    classes: int = setting(10, "Number of classes of the labels.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long to train, on how much at a time, and when to look."""

    max_epochs: int | None = setting(15, "Stop after this many passes over the data.", at_least=1)
    max_steps: int | None = setting(None, "Stop after this many steps.", at_least=1)
    max_time: str | None = setting(
        None, "Save and leave with exit code 75 this long after the start: 90, 30:00, 1-12:00:00."
    )
    global_batch_size: int = setting(64, "Samples per step over all ranks.", at_least=1)
    accumulate: int = setting(1, "Microbatches per step on each rank.", at_least=1)
    freeze: list[str] = setting([], "Patterns of names of parameters that are not trained.")
    clip_norm: float | None = setting(None, "Clip the gradients to this 2-norm.", above=0)
    precision: str = setting(
        "fp32", "Arithmetic of forward and backward.", choices=("fp32", "tf32", "bf16", "fp16")
    )
    on_nonfinite: str = setting(
        "stop",
        "The loss or the gradient is NaN or infinite: stop before the next save, or skip and count "
        "the step (looks at every gradient).",
        choices=("stop", "skip"),
    )
    on_damaged: str = setting(
        "stop",
        "A sample cannot be read: stop and name it, or skip and count it.",
        choices=("stop", "skip"),
    )
    ema_decay: float | None = setting(
        None, "Average the weights, keeping this share at each step; evaluated and kept.", above=0
    )
    patience_evals: int | None = setting(
        None, "End after so many evaluations without a better checkpoint.metric.", at_least=1
    )
    eval_every_epochs: int | None = setting(1, "Evaluate after every N epochs.", at_least=1)
    eval_every_steps: int | None = setting(None, "Evaluate after every N steps.", at_least=1)
    eval_batch_size: int | None = setting(
        None, "Samples per rank and evaluation batch; default: a rank's share.", at_least=1
    )
    data_workers: int = setting(
        0, "Processes per rank that fetch data ahead; 0: the rank itself.", at_least=0
    )
    log_every_steps: int = setting(10, "Log the training loss every N steps.", at_least=1)
    peak_flops_per_s: float | None = setting(
        None, "Peak of one device, for the MFU; default: of the GPUs that we know.", above=0
    )
    profile_first_step: int = setting(
        10, "With profile=true: the first step of the attempt that is traced.", at_least=1
    )
    profile_steps: int = setting(5, "With profile=true: steps that are traced.", at_least=1)
    deterministic: bool = setting(True, "Choose deterministic kernels on GPUs.")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How ranks come to be when no launcher has started us."""

    nproc: str = setting("auto", "Ranks on this node: a number, or auto = GPUs, else 1.")
    threads: str = setting(
        "auto", "CPU threads per rank: a number, or auto = cores / ranks; kept on resume."
    )
    device: str = setting("auto", "Where to train.", choices=("auto", "cpu", "cuda"))
    max_restarts: int = setting(0, "Restarts of all ranks after one died.", at_least=0)
    max_attempts_without_progress: int = setting(
        3, "So many attempts in a row that died and saved nothing end the run; 0: never.",
        at_least=0,
    )  # fmt: skip
    watchdog_s: float | None = setting(
        1800.0, "No step for this long: leave stacks in the run, exit with 75.", above=0
    )
    peer_timeout_s: float = setting(
        60.0, "A rank that is silent for this long is lost: the others exit with 75.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is spread over the ranks, and what is done to its blocks."""

    strategy: str = setting("ddp", "How ranks share the work.", choices=("single", "ddp", "fsdp"))
    bucket_cap_mb: float = setting(25.0, "Size of a gradient bucket in MiB.", above=0)
    gradient_as_bucket_view: bool = setting(True, "Gradients live in the buckets.")
    static_graph: bool = setting(False, "The graph is the same in every step.")
    find_unused_parameters: bool = setting(False, "Some parameters get no gradient.")
    blocks: list[str] = setting([], "Classes of the modules that are blocks; none: by size.")
    min_parameters: int = setting(
        1_000_000, "By size, a module of so many parameters is a block.", at_least=1
    )
    compile: str = setting(
        "no",
        "torch.compile: the whole model, or block by block.",
        choices=("no", "model", "blocks"),
    )
    compile_backend: str = setting("inductor", "What torch.compile compiles with.")
    recompute: bool = setting(
        False, "Activation checkpointing: compute those of a block again in the backward."
    )
    reshard_after_forward: bool = setting(
        True,
        "FSDP2: free a block after its forward, gather it again in the backward.",
    )
    param_dtype: str = setting(
        "fp32",
        "FSDP2: in which blocks are gathered and computed.",
        choices=("fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and what to keep."""

    every_steps: int | None = setting(None, "Save every N steps.", at_least=1)
    every_s: float | None = setting(
        600.0, "Save when this many seconds have passed since the last save.", above=0
    )
    every_epochs: int | None = setting(1, "Save after every N epochs.", at_least=1)
    keep_last: int = setting(2, "Newest checkpoints to keep.", at_least=1)
    keep_best: int = setting(1, "Best checkpoints to keep, where metric is set.", at_least=0)
    keep_every_steps: int | None = setting(
        None, "Keep checkpoints whose step is a multiple of this for good.", at_least=1
    )
    timeout_s: float = setting(
        1800.0, "A save that has not ended after this long ends the attempt (75).", above=0
    )
    metric: str | None = setting(None, "Metric of the evaluation that decides what is best.")
    mode: str = setting("max", "Whether a larger metric is better.", choices=("max", "min"))
    mirror: str | None = setting(
        None, "Second place for checkpoints, s3://… or a directory: copied beside the training."
    )
    mirror_keep_last: int = setting(2, "Newest checkpoints to keep in the mirror.", at_least=1)
    mirror_keep_best: int = setting(
        1, "Best checkpoints to keep in the mirror, where metric is set.", at_least=0
    )
    mirror_keep_every_steps: int | None = setting(
        None, "Keep checkpoints of such steps in the mirror for good.", at_least=1
    )
    on_error: str = setting(
        "continue",
        "A save failed: stop, or go on and try at the next interval (three in a row stop).",
        choices=("continue", "stop"),
    )


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """How places on S3 and other object stores are reached. Credentials: see docs/storage.md."""

    endpoint_url: str | None = setting(
        None, "Address of an S3 server; default: AWS_ENDPOINT_URL, else Amazon's."
    )
    region: str | None = setting(None, "Region of the bucket; default: the environment's.")
    path_style: bool = setting(
        False, "Ask for server/bucket/key instead of bucket.server/key, which older servers need."
    )
    timeout_s: float = setting(
        60.0, "A request without an answer for this long is repeated.", above=0
    )
    retries: int = setting(8, "How often a request is repeated that may succeed later.", at_least=0)
    options: dict[str, Any] = setting({}, "More options of the fsspec file system.")


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """Which signals mean: save and leave with exit code 75."""

    signals: list[str] = setting(
        ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"], "Names of the signals."
    )
    grace_s: float | None = setting(
        None, "Seconds between the signal and SIGKILL; default: the batch script's, else 30.",
        above=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Init:
    """What a run begins with when it has no checkpoint yet."""

    weights: str | None = setting(
        None,
        "Path or URL of the model's weights: a safetensors file or folder, a torch.save file, a "
        "DCP or OneFlow folder, or a run or checkpoint of ours.",
    )
    strict: bool = setting(True, "Refuse weights that do not fit whole; false: take what fits.")
    skip: list[str] = setting(
        [], "Patterns of names of the model that stay as they are initialised."
    )
    rename: dict[str, str] = setting(
        {}, "New names by pattern for the weights' names; each * stands for the same in both."
    )
    allow_pickle: bool = setting(
        False, "Load weights that are in a pickle, running any code that is in it."
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The configuration of a run. Groups with a `_target_` are open; all else is fixed."""

    name: str = setting("???", "Name of the run; by default data and model.")
    run_dir: str = setting("???", "Directory of the run; the same directory is the same run.")
    seed: int = setting(0, "Decides initial weights, order of the data, dropout.", at_least=0)
    resume: str = setting("auto", "auto, never, best, a step, or the path of a checkpoint or run.")
    sample: Sample = setting(Sample, "What one sample of the data looks like.")
    model: dict[str, Any] = setting({}, "The nn.Module, by _target_.")
    data: dict[str, Any] = setting({}, "The data, by _target_.")
    task: dict[str, Any] = setting({}, "Loss and metrics, by _target_.")
    optimizer: dict[str, Any] = setting({}, "The optimizer, by _target_.")
    scheduler: dict[str, Any] = setting({}, "The learning-rate scheduler, by _target_, or empty.")
    parallel: Parallel = setting(Parallel, "How the model is spread over ranks.")
    trainer: Trainer = setting(Trainer, "How long, how much at a time, when to look.")
    launch: Launch = setting(Launch, "How ranks come to be.")
    store: ObjectStore = setting(ObjectStore, "How an object store is reached.")
    checkpoint: Checkpoint = setting(Checkpoint, "When to save and what to keep.")
    preemption: Preemption = setting(Preemption, "Signals that mean save and leave.")
    tracker: dict[str, Any] = setting({}, "Trackers by name, each by _target_.")
    report: bool = setting(False, "Write report.html into the run when it is finished.")
    profile: bool = setting(
        False, "Trace a few steps into <run_dir>/profile, and show what takes longest."
    )
    init: Init = setting(Init, "What a fresh run begins with.")


def merge(composed: DictConfig) -> tuple[Run, list[Problem]]:
    """Merge a composed configuration onto the schema.

    Returns the frozen configuration, and every unknown key, wrong type, unresolvable
    interpolation and value out of range. Where there are problems the configuration is only good
    for finding more of them: what could not be merged has its default. Values inside open groups
    are judged by `build.check`.
    """
    schema = OmegaConf.structured(Run)
    problems = _merge_node(Run, composed, schema, "")
    for key in ("name", "run_dir"):
        if OmegaConf.is_missing(schema, key):
            if key not in {problem.key for problem in problems}:
                problems.append(Problem(key, "is not set; give it a value"))
            schema[key] = "unnamed"
    run: Run = OmegaConf.to_object(schema)  # type: ignore[assignment]
    told = {problem.key for problem in problems}
    told |= {key.partition(".")[0] for key in told}  # an open group that could not be merged
    return run, problems + [problem for problem in check(run) if problem.key not in told]


def _merge_node(cls: type, node: DictConfig, schema: DictConfig, prefix: str) -> list[Problem]:
    hints = get_type_hints(cls)
    OmegaConf.set_readonly(schema, False)  # a frozen dataclass makes its own node read-only
    problems = []
    for key in map(str, node):
        full = prefix + key
        if key not in hints:
            problems.append(Problem(full, f"no such key{closest(key, hints)}"))
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(Problem(full, _without_value(error)))
            continue
        if is_dataclass(hints[key]) and isinstance(value, DictConfig):
            inner: type = hints[key]
            problems += _merge_node(inner, value, schema[key], full + ".")
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            unresolved = _unresolved(value, full)
            if unresolved:
                problems += unresolved
                continue
            value = OmegaConf.to_container(value, resolve=True)
        if escaped := [f"{full}{where}" for where in _escaped(value)]:
            text = "a text with ${ in it, which would be resolved once more; leave that out"
            problems += [Problem(where, text) for where in escaped]
            continue
        try:
            if hints[key] == dict[str, Any] and value is None:
                value = {}
            schema[key] = value
        except OmegaConfBaseException as error:
            text = f"{value!r} does not fit: {_first_line(error)}"
            problems.append(Problem(full, text))
    return problems


def _escaped(value: Any) -> Iterator[str]:
    """Yield where a text is that looks like an interpolation, though all of them are resolved.

    Such a text would be one again for whoever takes the configuration next; out of a checkpoint,
    it would call what nobody has looked at.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (f".{key}{where}" for where in (*_escaped(key), *_escaped(inner)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from (f"[{index}]{where}" for where in _escaped(inner))
    elif isinstance(value, str) and "${" in value:
        yield ""


def _unresolved(node: DictConfig | ListConfig, prefix: str) -> list[Problem]:
    """Return what has no value inside an open group or a list, each with its full key."""
    problems = []
    for key, full in _inner_keys(node, prefix):
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(Problem(full, _without_value(error)))
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            problems += _unresolved(value, full)
    return problems


def _inner_keys(node: DictConfig | ListConfig, prefix: str) -> list[tuple[Any, str]]:
    if isinstance(node, ListConfig):
        return [(index, f"{prefix}[{index}]") for index in range(len(node))]
    return [(key, f"{prefix}.{key!s}") for key in node]


def _without_value(error: OmegaConfBaseException) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "is not set; give it a value"
    return f"cannot be resolved: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def check(run: Run) -> list[Problem]:
    """Return what is wrong with values that have the right type. Changes nothing."""
    problems = _check_ranges(run, "") + _check_numbers(run)
    if not re.fullmatch(r"(?!\.+$)[\w.,=+@-]+", run.name):
        text = f"{run.name!r} must be made of letters, digits and . , = + @ _ -, not dots alone"
        problems.append(Problem("name", text))
    problems += _check_place("run_dir", run.run_dir)
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


def _check_init(init: Init) -> list[Problem]:
    problems = [
        Problem(f"init.{key}", "needs init.weights, the place of the weights that are meant")
        for key in ("skip", "rename")
        if getattr(init, key) and not init.weights
    ]
    for old, new in init.rename.items():
        if new.count("*") > old.count("*"):
            text = f"{new!r} has more * than {old!r}, which they stand for"
            problems.append(Problem("init.rename", text))
    return problems


def _check_mirror(run: Run) -> list[Problem]:
    mirror = run.checkpoint.mirror or ""
    problems = _check_place("checkpoint.mirror", mirror)
    here, there = (f"{place.rstrip('/')}/" for place in (run.run_dir, mirror))
    if not problems and (here.startswith(there) or there.startswith(here)):
        text = f"{mirror!r} and run_dir={run.run_dir} lie in each other; give two places"
        problems.append(Problem("checkpoint.mirror", text))
    return problems


def _check_place(key: str, place: str) -> list[Problem]:
    host = place.partition("://")[2].partition("/")[0]
    text = ""
    if not place:
        text = "is empty; give the directory of the run"
    elif "@" in host:
        text = "has credentials in it, which would be written down; see docs/storage.md"
    elif re.fullmatch(r"[\w+.-]+://[^/]*/*", place):
        text = f"{place!r} is a whole bucket; give the run a name in it"
    return [Problem(key, text)] if text else []


def seconds(text: str) -> float | None:
    """Return the seconds of `[[[D-]HH:]MM:]SS`; None where it is no such time, or zero."""
    matched = re.fullmatch(r"(?:(?:(?:(\d+)-)?(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if matched is None:
        return None
    days, hours, minutes, rest = (float(part or 0) for part in matched.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None


def check_world(run: Run, world_size: int) -> list[Problem]:
    """Return what is wrong with `run` on `world_size` ranks, with the nearest sizes that fit."""
    problems = []
    unit = world_size * run.trainer.accumulate
    size = run.trainer.global_batch_size
    if size % unit:
        lower, upper = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{lower:,} or {upper:,}" if lower else f"{upper:,}"
        text = (
            f"{size:,} samples cannot be divided over {pluralize(world_size, 'rank')} x "
            f"{run.trainer.accumulate:,} microbatches (nearest: {nearest})"
        )
        problems.append(Problem("trainer.global_batch_size", text))
    if world_size > 1 and run.parallel.strategy == "single":
        text = f"'single' cannot use {world_size:,} ranks; use parallel=ddp or launch.nproc=1"
        problems.append(Problem("parallel.strategy", text))
    return problems


def _check_numbers(run: Run) -> list[Problem]:
    problems = []
    if not all(size >= 1 for size in run.sample.shape):
        problems.append(Problem("sample.shape", f"{run.sample.shape} has an axis below 1"))
    if run.seed > _MAX_SEED:
        problems.append(Problem("seed", f"{run.seed} is too large (nearest: {_MAX_SEED})"))
    if run.trainer.ema_decay is not None and run.trainer.ema_decay >= 1:
        text = f"{run.trainer.ema_decay} would never let a weight in; give a number below 1"
        problems.append(Problem("trainer.ema_decay", text))
    if run.trainer.patience_evals is not None and run.checkpoint.metric is None:
        text = "needs checkpoint.metric: the figure that is to become better"
        problems.append(Problem("trainer.patience_evals", text))
    halves = run.parallel.strategy == "fsdp" and run.parallel.param_dtype == "fp16"
    if halves and run.trainer.precision != "fp16":
        text = "'fp16' loses small gradients unless the loss is scaled; set trainer.precision=fp16"
        problems.append(Problem("parallel.param_dtype", text))
    if run.preemption.grace_s is not None and math.isinf(run.preemption.grace_s):
        problems.append(Problem("preemption.grace_s", "inf is not a number of seconds"))
    return problems


def _check_ranges(node: Any, prefix: str) -> list[Problem]:
    problems = []
    for item in fields(node):
        value, rule = getattr(node, item.name), item.metadata
        full = prefix + item.name
        if is_dataclass(value):
            problems += _check_ranges(value, full + ".")
        elif value is None:
            continue
        elif rule["choices"] and value not in rule["choices"]:
            hint = closest(value, rule["choices"])
            problems.append(Problem(full, f"{value!r} is not one of its values{hint}"))
        elif rule["at_least"] is not None and value < rule["at_least"]:
            problems.append(Problem(full, f"{value} is too small (nearest: {rule['at_least']})"))
        elif rule["above"] is not None and not value > rule["above"]:
            problems.append(Problem(full, f"{value} must be larger than {rule['above']}"))
    return problems


_SECRET = re.compile(
    r"(^|_)(password|passwd|pwd|passphrase|secrets?|credentials?|api_?key"
    r"|(access|secret|private)_?key"
    r"|(?<!per_)(?<!pad_)(?<!bos_)(?<!eos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token)$"
)


def _is_secret(key: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # hfToken as hf_token
    return _SECRET.search(snake.lower()) is not None


def stored(composed: DictConfig) -> dict[str, Any]:
    """Return the configuration as it is stored: plain JSON values, secrets redacted.

    Interpolations are resolved, except those that read the environment: they stay as text, so
    that what a variable held never reaches a file. A value that refers to a secret, or to such a
    text, gets what is stored there.
    """
    safe = copy.deepcopy(composed)
    texts: dict[str, str] = {}
    options = OmegaConf.select(safe, "store.options")
    for key in options or ():
        options[key] = "<redacted>"  # any of them may be a key to the store
    _hide(safe, texts)
    found: dict[str, Any] = _plain(safe, texts)
    return found


def _hide(node: Any, texts: dict[str, str]) -> None:
    """Replace secrets, and texts that read the environment by keys of `texts`."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    items: Any = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in items:
        if isinstance(key, str) and _is_secret(key) and value is not None:
            node[key] = "<redacted>"
        elif isinstance(value, str) and "oc.env" in value:
            name = f"PERDURE_TEXT_{len(texts)}_"
            texts[name] = value
            node[key] = name
        elif isinstance(value, (dict, list)):
            _hide(node[key], texts)


def _plain(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, ListConfig):
        return [_plain(_resolved(value, index), texts) for index in range(len(value))]
    if isinstance(value, DictConfig):
        return {str(key): _plain(_resolved(value, key), texts) for key in value}
    if isinstance(value, str):
        for name, text in texts.items():
            value = value.replace(name, text)
    return value


def _resolved(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException:  # computed from a text that reads the environment
        raw: Any = OmegaConf.to_container(node, resolve=False)
        return raw[key]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
