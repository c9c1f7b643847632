"""Objects from a configuration, and the checks of it that come first."""

import inspect
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer.cluster import stop
from trainer.cluster.world import World
from trainer.config import targets
from trainer.config.schema import Run
from trainer.core import metric_mode, rng
from trainer.core.intervals import Every
from trainer.data.batches import row_tensors
from trainer.data.source import Datasets, EvalStream, TrainStream
from trainer.data.streams import Streamed, is_stream
from trainer.errors import ConfigError, DataError, PerdureError, Problem, closest
from trainer.monitoring import flops
from trainer.protocols import Batch, DataSource, Task, Tracker
from trainer.storage import local_path
from trainer.tracking.guarded import Guarded
from trainer.tracking.jsonl import Jsonl
from trainer.tracking.several import Several, Silent
from trainer.training import modes, optimizers, parallel, parameters, schedules, structure
from trainer.training.ema import Ema
from trainer.training.job import Job, Phase, TaskOptions

_GROUPING_KEYS = ("groups", "phases")
"""Keys in `optimizer` that are not arguments of the optimizer."""
_HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
_SIGNALS = [item.name for item in signal.Signals]


# --- checks before anything runs ---------------------------------------------------------------


def check(run: Run) -> list[Problem]:
    """Return the problems of every `_target_` in `run`: names, arguments, types of values.

    Imports the targets; calls only the `problem` method of tracker classes.
    """
    problems = []
    for group, provided in (("model", 0), ("data", 0), ("task", 0), ("optimizer", 1)):
        if getattr(run, group).get("_target_"):  # the schema reports missing ones
            node = _arguments(run.optimizer) if group == "optimizer" else getattr(run, group)
            problems += targets.check_target(node, group, provided)
    if text := parameters.check_rules(run.optimizer.get("groups", [])):
        problems.append(Problem("optimizer.groups", text))
    optimizer = targets.find(str(run.optimizer.get("_target_", "")))[0]
    if text := parameters.check_step(optimizer):
        problems.append(Problem("optimizer._target_", text))
    problems += _check_phases(run)
    problems += schedules.check(run.scheduler)
    for name, node in run.tracker.items():
        key = f"tracker.{name}"
        problems += targets.check_target(node, key, 0) or _check_tracker(key, node)
    problems += _check_metric_mode(run)
    weights = run.init.weights or ""
    path = local_path(weights)
    if weights and path is not None and not path.exists():
        problems.append(Problem("init.weights", f"{weights!r} is not a file or folder"))
    for name in stop.signal_problems(run.preemption.signals):
        text = f"{name!r} is not a signal that can be handled{closest(name, _SIGNALS)}"
        problems.append(Problem("preemption.signals", text))
    return problems


def _arguments(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in optimizer.items() if key not in _GROUPING_KEYS}


def _check_phases(run: Run) -> list[Problem]:
    """Return the problems of `optimizer.phases`, using the phases of the task's class if any."""
    settings = run.optimizer.get("phases", {})
    phases = getattr(targets.find(str(run.task.get("_target_", "")))[0], "phases", None)
    if text := parameters.check_phases(settings, phases if isinstance(phases, Mapping) else None):
        return [Problem("optimizer.phases", text)]
    problems = []
    for name, changes in settings.items():
        key = f"optimizer.phases.{name}"
        if "_target_" in changes:
            problems.append(Problem(f"{key}._target_", "all phases use the same optimizer class"))
        elif run.optimizer.get("_target_"):
            node = {"_partial_": True, **changes, "_target_": run.optimizer["_target_"]}
            problems += targets.check_target(node, key, 1)
    return problems


def _check_metric_mode(run: Run) -> list[Problem]:
    metric, mode = run.checkpoint.metric, run.checkpoint.mode
    text = metric_mode.contradiction(metric, mode) if metric is not None else ""
    return [Problem("checkpoint.mode", text)] if text else schedules.check_plateau(run, mode)


def _check_tracker(key: str, node: Mapping[str, Any]) -> list[Problem]:
    """Return the problem that the tracker's class itself reports, such as a missing library."""
    check_arguments = getattr(targets.find(str(node["_target_"]))[0], "problem", None)
    if check_arguments is None:
        return []
    text = check_arguments({k: v for k, v in node.items() if k not in _HYDRA_KEYS})
    return [Problem(key, text)] if text else []


# --- data --------------------------------------------------------------------------------------


def build_data(run: Run) -> DataSource:
    """Build the data. A plain dataset becomes training data without an evaluation.

    Raises:
        ConfigError: a stream needs settings that do not depend on its length.
        DataError: the training data is neither a dataset nor a stream.
    """
    rng.seed_all(rng.derive("data", run.seed))  # the same random data in every attempt
    data = targets.make(run.data, "data")
    absent = object()  # static look-ups: a property may load the data
    parts = [inspect.getattr_static(data, part, absent) for part in ("train", "eval")]
    is_source = all(part is not absent for part in parts)
    source: DataSource = data if is_source else Datasets(train=data)
    if is_stream(source.train):
        _check_stream(run)
    elif not hasattr(source.train, "__len__"):
        raise DataError(
            f"data: {run.data['_target_']} returns training data without a length; a dataset needs "
            "__len__ and __getitem__, a stream an __iter__ that starts over for each epoch"
        )
    return source


def _check_stream(run: Run) -> None:
    subject = f"data: {run.data['_target_']} is a stream of unknown length"
    if run.trainer.max_steps is None:
        raise ConfigError(f"{subject}; set trainer.max_steps to end the run")
    words = schedules.horizon_words(run.scheduler)
    unknown = [f"scheduler.{key}={word}" for key, word in words.items() if word != "total_steps"]
    if unknown:
        raise ConfigError(
            f"{subject}, so {' and '.join(unknown)} cannot be computed; use numbers, or a schedule "
            "of total_steps"
        )


def _build_training(run: Run, world: World, source: DataSource) -> TrainStream | Streamed:
    tensors = row_tensors(source.train)
    if tensors and list(tensors[0].shape[1:]) != list(run.sample.shape):
        raise ConfigError(
            f"sample.shape={list(run.sample.shape)}, but {run.data['_target_']} has inputs of "
            f"shape {list(tensors[0].shape[1:])}; set sample.shape={list(tensors[0].shape[1:])}"
        )
    kind = Streamed if is_stream(source.train) else TrainStream
    return kind(
        dataset=source.train,
        world=world,
        seed=run.seed,
        global_batch_size=run.trainer.global_batch_size,
        accumulate=run.trainer.accumulate,
        workers=run.trainer.data_workers,
        skip_damaged=run.trainer.on_damaged == "skip",
    )


def _build_evaluation(
    run: Run, world: World, source: DataSource, phases: Sequence[Phase]
) -> EvalStream | None:
    if source.eval is None:
        _check_without_evaluation(run, phases)
        return None
    if is_stream(source.eval):
        raise DataError(
            f"data: {run.data['_target_']} has a stream as evaluation data; it needs __len__ and "
            "__getitem__, so that every sample is evaluated once on any number of ranks"
        )
    if not len(source.eval):
        raise DataError(
            f"data: {run.data['_target_']} has empty evaluation data; add samples, or use None "
            "for no evaluation"
        )
    settings = run.trainer
    microbatch = settings.global_batch_size // world.size // settings.accumulate
    batch_size = settings.eval_batch_size or max(microbatch, 1)
    skip_damaged = settings.on_damaged == "skip"
    return EvalStream(source.eval, world, batch_size, settings.data_workers, skip_damaged)


def _check_without_evaluation(run: Run, phases: Sequence[Phase]) -> None:
    plateau = any(isinstance(phase.scheduler, ReduceLROnPlateau) for phase in phases)
    needs = {
        "trainer.patience_evals": run.trainer.patience_evals is not None,
        "checkpoint.metric": run.checkpoint.metric is not None,
        "scheduler: ReduceLROnPlateau": plateau,
    }
    if settings := [key for key, is_set in needs.items() if is_set]:
        raise ConfigError(
            f"{', '.join(settings)} {'need' if len(settings) > 1 else 'needs'} an evaluation, but "
            f"{run.data['_target_']} has no evaluation data"
        )


# --- model, trackers, job ----------------------------------------------------------------------


def build_model(run: Run) -> nn.Module:
    """Build the plain model on the CPU; its initial weights are a function of `seed`."""
    rng.seed_all(run.seed)
    model = targets.make(run.model, "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: {run.model['_target_']} returns a {type(model).__name__}, not a "
            "torch.nn.Module"
        )
    return model


def build_tracker(run: Run, world: World) -> Tracker:
    """Build rank 0's trackers, including `metrics.jsonl`; other ranks get a silent one.

    Errors of a tracker do not stop the training, except those of `metrics.jsonl`, which is part
    of the run.

    Raises:
        ConfigError: a tracker cannot be created.
    """
    if world.rank != 0:
        return Silent()
    trackers = [Guarded(name, _make_tracker(name, node)) for name, node in run.tracker.items()]
    return Several([Jsonl(), *trackers])


def _make_tracker(name: str, node: Mapping[str, Any]) -> Any:
    try:
        return targets.make(node, f"tracker.{name}")
    except PerdureError:
        raise
    except Exception as error:
        raise ConfigError(
            f"tracker.{name}: cannot create {node['_target_']}: {type(error).__name__}: {error}. "
            f"Fix its arguments, or remove it with ~tracker.{name}"
        ) from error


def build_job(run: Run, world: World, source: DataSource, tracker: Tracker) -> Job:
    """Build everything that training needs, before any state is loaded. Collective."""
    settings = run.trainer
    data = _build_training(run, world, source)
    per_epoch = data.steps_per_epoch or 0
    limits = [settings.max_steps, (settings.max_epochs or 0) * per_epoch or None]
    max_steps = min(limit for limit in limits if limit is not None)
    model = build_model(run).to(world.device)
    declared = structure.declared(model)
    notes = parameters.freeze(model, settings.freeze)
    frozen = structure.frozen_modules(model)
    if not settings.freeze_eval and (warning := structure.statistics_warning(frozen)):
        notes.append(warning)
    peak = settings.peak_flops_per_s or _peak_flops_per_s(run, world)
    counter = flops.StepFlops(model) if peak is not None and world.rank == 0 else None
    parallel.modify(model, run.parallel)
    task = targets.make(run.task, "task")
    phases, matches = build_phases(run, world, model, task, max_steps, per_epoch)
    notes += matches
    evaluation = _build_evaluation(run, world, source, phases)
    if counter is not None:
        losses = [
            (partial(_phase_loss, task, phase), _trained_names(model, phase)) for phase in phases
        ]
        counter.count(losses, data.first)
        notes += [counter.problem] if counter.problem else []
    rng.seed_all(rng.derive("rank", run.seed, 0, world.rank))
    ema = None
    if settings.ema_decay is not None:
        ema = Ema(model, settings.ema_decay, phases[0].wrapped)
    return Job(
        world=world,
        model=model,
        task=task,
        phases=phases,
        scheduler_interval=run.scheduler.get("interval", "step"),
        scaler=parallel.gradient_scaler(settings.precision, world.device),
        precision=settings.precision,
        data=data,
        evaluation=evaluation,
        tracker=tracker,
        max_steps=max_steps,
        step_limit=settings.max_steps,
        max_epochs=settings.max_epochs,
        eval_every=Every(steps=settings.eval_every_steps, epochs=settings.eval_every_epochs),
        log_every_steps=settings.log_every_steps,
        clip_norm=settings.clip_norm,
        skip_nonfinite=settings.on_nonfinite == "skip",
        ema=ema,
        patience_evals=settings.patience_evals,
        declared=declared,
        frozen=list(frozen.values()) if settings.freeze_eval else [],
        notes=notes,
        metric=run.checkpoint.metric,
        metric_mode=run.checkpoint.mode,
        seed=run.seed,
        flops_per_step=counter.total if counter is not None else None,
        peak_flops_per_s=peak,
    )


def _peak_flops_per_s(run: Run, world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    gathered = run.parallel.param_dtype if run.parallel.strategy == "fsdp" else "fp32"
    arithmetic = run.trainer.precision if gathered == "fp32" else gathered
    return flops.peak_flops_per_s(torch.cuda.get_device_name(world.device), arithmetic)


def _phase_loss(task: Task, phase: Phase, model: nn.Module, batch: Batch) -> Tensor:
    return task.loss(model, batch, *phase.task_arguments)[0]


def _trained_names(model: nn.Module, phase: Phase) -> set[str]:
    ids = {id(parameter) for parameter in phase.parameters(model)}
    return {name for name, p in model.named_parameters() if p.requires_grad and id(p) in ids}


def build_phases(
    run: Run, world: World, model: nn.Module, task: Task, max_steps: int, steps_per_epoch: int
) -> tuple[list[Phase], list[str]]:
    """Build the phases of a step, and one line per name pattern with its matches. Collective."""
    changes = run.optimizer.get("phases", {})
    patterns = dict(TaskOptions.of(task).phases)
    if text := parameters.check_phases(changes, patterns):
        raise ConfigError(f"optimizer.phases {text}")
    names, lines = parameters.phases(model, patterns) if patterns else ({}, [])
    if patterns:
        wrapped = parallel.wrap_phases(model, world, run.parallel, names)
    else:
        wrapped = {"": parallel.wrap(model, world, run.parallel)}
    rules = run.optimizer.get("groups", [])
    groups, matches = parameters.groups(model, rules)
    named = dict(model.named_parameters())
    phases = []
    for name, module in wrapped.items():
        ids = {id(named[parameter]) for parameter in names.get(name, named)}
        parts = [{**g, "params": [p for p in g["params"] if id(p) in ids]} for g in groups]
        parts = [part for part in parts if part["params"] or not patterns]
        node = {**_arguments(run.optimizer), **changes.get(name, {})}
        optimizer = optimizers.make(node, parts, model)
        if run.trainer.ema_decay is not None and modes.has_modes(optimizer):
            raise ConfigError(
                f"trainer.ema_decay={run.trainer.ema_decay}, but {node['_target_']} averages "
                "the weights itself; remove one of the two"
            )
        make = schedules.maker(run.scheduler, optimizer, steps_per_epoch)
        small = partial(optimizers.small, node, parts)
        schedules.check_state(run.scheduler, small, max_steps, steps_per_epoch)
        phases.append(
            Phase(
                name=name,
                wrapped=module,
                optimizer=optimizer,
                scheduler=make(max_steps) if make is not None else None,
                make_scheduler=make,
            )
        )
    return phases, [*lines, *matches]
