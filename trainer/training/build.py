"""The only place where configuration becomes objects, and where it is judged before."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer import schedule
from trainer.cluster import stop
from trainer.cluster.world import World
from trainer.config import targets
from trainer.config.schema import Run
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.data.source import Datasets, EvalStream, TrainStream
from trainer.data.streams import Streamed, is_stream
from trainer.errors import ConfigError, DataError, Problem, closest
from trainer.monitoring import flops
from trainer.protocols import Batch, DataSource, Task, Tracker
from trainer.storage import is_local
from trainer.tracking.guarded import Guarded
from trainer.tracking.jsonl import Jsonl
from trainer.tracking.several import Several, Silent
from trainer.training import parallel, parameters
from trainer.training.ema import Ema
from trainer.training.job import Job, Phase, TaskOptions

_OURS = ("groups", "phases")
"""What stands beside an optimizer's arguments."""
_PARTS = ("train", "eval")
_HYDRA_WORDS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


# --- before anything runs ----------------------------------------------------------------------


def check(run: Run) -> list[Problem]:
    """Return what is wrong with every `_target_` of `run`: names, arguments, types of values.

    Imports the targets and calls none of them.
    """
    problems = []
    for group, provided in (("model", 0), ("data", 0), ("task", 0), ("optimizer", 1)):
        if getattr(run, group).get("_target_"):  # config.check tells where there is none
            node = _arguments(run.optimizer) if group == "optimizer" else getattr(run, group)
            problems += targets.check_target(node, group, provided)
    if text := parameters.check_rules(run.optimizer.get("groups", [])):
        problems.append(Problem("optimizer.groups", text))
    problems += _check_phases(run)
    if run.scheduler:
        known = {key: value for key, value in run.scheduler.items() if key != "interval"}
        words = {
            k: 1 if v in schedule.HORIZON_WORDS else v for k, v in known.items() if _hashable(v)
        }
        problems += targets.check_target({**known, **words}, "scheduler", 1)
    for name, node in run.tracker.items():
        problems += targets.check_target(node, f"tracker.{name}", 0) or _check_tracker(name, node)
    weights = run.init.weights or ""
    if weights and is_local(weights) and not Path(weights.removeprefix("file://")).exists():
        problems.append(Problem("init.weights", f"{weights!r} is not a file or folder"))
    for name in stop.signal_problems(run.preemption.signals):
        text = f"{name!r} is not a signal that can be handled{closest(name, _signal_names())}"
        problems.append(Problem("preemption.signals", text))
    return problems


def _arguments(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in optimizer.items() if key not in _OURS}


def _check_phases(run: Run) -> list[Problem]:
    """Return what is wrong with `optimizer.phases`, as far as the task's class tells its phases."""
    given = run.optimizer.get("phases", {})
    stated = getattr(targets.find(str(run.task.get("_target_", "")))[0], "phases", None)
    if text := parameters.check_phases(given, stated if isinstance(stated, Mapping) else None):
        return [Problem("optimizer.phases", text)]
    problems = []
    for name, changes in given.items():
        key = f"optimizer.phases.{name}"
        if "_target_" in changes:
            problems.append(Problem(f"{key}._target_", "all phases have the optimizer's own class"))
        elif run.optimizer.get("_target_"):
            node = {"_partial_": True, **changes, "_target_": run.optimizer["_target_"]}
            problems += targets.check_target(node, key, 1)
    return problems


def _check_tracker(name: str, node: Mapping[str, Any]) -> list[Problem]:
    """Ask a tracker that can tell, whether its library is there, say."""
    target, _ = targets.find(str(node["_target_"]))
    tell = getattr(target, "problem", None)
    text = tell({k: v for k, v in node.items() if k not in _HYDRA_WORDS}) if tell else ""
    return [Problem(f"tracker.{name}", text)] if text else []


def _signal_names() -> list[str]:
    import signal

    return [item.name for item in signal.Signals]


def _hashable(value: Any) -> bool:
    return not isinstance(value, (list, dict))


# --- objects -----------------------------------------------------------------------------------


def build_data(run: Run) -> DataSource:
    """Build the data; a plain dataset is trained on and nothing is evaluated."""
    rng.seed_all(rng.derive("data", run.seed))  # whatever it draws, every attempt draws it
    made = targets.make(run.data, "data")
    source: DataSource = made if _is_source(made) else Datasets(train=made)
    if is_stream(source.train):
        _check_stream(run, source)
    elif not hasattr(source.train, "__len__"):
        raise DataError(
            f"data: {run.data['_target_']} gives training data without a length; a dataset needs "
            "__len__ and __getitem__, a stream an __iter__ that begins anew for each epoch"
        )
    return source


def _check_stream(run: Run, source: DataSource) -> None:
    """Refuse what needs to know how long a stream is."""
    what = f"data: {run.data['_target_']} gives a stream, whose length is not known"
    if run.trainer.max_steps is None:
        raise ConfigError(f"{what}; set trainer.max_steps: where the run ends")
    words = [
        f"scheduler.{key}={value}"
        for key, value in run.scheduler.items()
        if value in ("total_epochs", "steps_per_epoch")
    ]
    if words:
        raise ConfigError(
            f"{what}, so {' and '.join(words)} cannot be counted; give numbers, or a schedule by "
            "total_steps"
        )


def _check_eval(run: Run, dataset: Any) -> None:
    if is_stream(dataset):
        raise DataError(
            f"data: {run.data['_target_']} gives a stream to evaluate on; that data needs __len__ "
            "and __getitem__, since every sample is measured once whatever the number of ranks"
        )
    if not len(dataset):
        raise DataError(
            f"data: {run.data['_target_']} gives nothing to evaluate on, an empty part; give it "
            "samples, or None for no evaluation"
        )


def _refuse_without_evaluation(run: Run, phases: Sequence[Phase]) -> None:
    plateau = any(isinstance(phase.scheduler, ReduceLROnPlateau) for phase in phases)
    wants = {
        "trainer.patience_evals": run.trainer.patience_evals is not None,
        "checkpoint.metric": run.checkpoint.metric is not None,
        "scheduler: ReduceLROnPlateau": plateau,
    }
    if found := [key for key, is_wanted in wants.items() if is_wanted]:
        raise ConfigError(
            f"{', '.join(found)} {'need' if len(found) > 1 else 'needs'} an evaluation, and "
            f"{run.data['_target_']} gives no data to evaluate on"
        )


def _is_source(made: Any) -> bool:
    """Whether it has both parts; looked up statically, since asking would load them."""
    missing = object()
    return all(inspect.getattr_static(made, part, missing) is not missing for part in _PARTS)


def _check_shape(run: Run, source: DataSource) -> None:
    tensors = getattr(source.train, "tensors", None)
    if tensors and list(tensors[0].shape[1:]) != list(run.sample.shape):
        raise ConfigError(
            f"sample.shape={list(run.sample.shape)}, but {run.data['_target_']} gives inputs of "
            f"shape {list(tensors[0].shape[1:])}; set sample.shape={list(tensors[0].shape[1:])}"
        )


def build_model(run: Run) -> nn.Module:
    """Build the plain model on the CPU; its initial weights are a function of `seed`."""
    rng.seed_all(run.seed)
    model = targets.make(run.model, "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {run.model['_target_']} gives a {type(model).__name__}, not a "
                          "torch.nn.Module")  # fmt: skip
    return model


def build_tracker(run: Run, world: World) -> Tracker:
    """Build rank 0's trackers, `metrics.jsonl` always among them; other ranks are silent.

    The others may fail, and training goes on; `metrics.jsonl` is part of the run.
    """
    if world.rank != 0:
        return Silent()
    made = {name: targets.make(node, f"tracker.{name}") for name, node in run.tracker.items()}
    return Several([Jsonl(), *(Guarded(name, tracker) for name, tracker in made.items())])


def _build_training_data(run: Run, world: World, source: DataSource) -> TrainStream | Streamed:
    settings = run.trainer
    kind = Streamed if is_stream(source.train) else TrainStream
    return kind(
        dataset=source.train,
        world=world,
        seed=run.seed,
        global_batch_size=settings.global_batch_size,
        accumulate=settings.accumulate,
        workers=settings.data_workers,
        skip_damaged=settings.on_damaged == "skip",
    )


def build_job(run: Run, world: World, source: DataSource, tracker: Tracker) -> Job:
    """Build everything that training needs, before any state is loaded. Collective."""
    _check_shape(run, source)
    settings = run.trainer
    data = _build_training_data(run, world, source)
    per_epoch = data.steps_per_epoch or 0
    limits = [settings.max_steps, (settings.max_epochs or 0) * per_epoch or None]
    max_steps = min(limit for limit in limits if limit is not None)
    model = build_model(run).to(world.device)
    notes = parameters.freeze(model, settings.freeze)
    peak = settings.peak_flops_per_s or _peak_flops_per_s(run, world)
    twin, uncounted = _twin(model) if peak is not None and world.rank == 0 else (None, [])
    parallel.modify(model, run.parallel)
    task = targets.make(run.task, "task")
    phases, matched = _build_phases(run, world, model, task, max_steps, per_epoch)
    share = settings.global_batch_size // world.size // settings.accumulate
    evaluation = None
    if source.eval is not None:
        _check_eval(run, source.eval)
        batch_size = settings.eval_batch_size or max(share, 1)
        skip = settings.on_damaged == "skip"
        evaluation = EvalStream(source.eval, world, batch_size, settings.data_workers, skip)
    else:
        _refuse_without_evaluation(run, phases)
    counted = None
    if twin is not None:
        counted, uncounted = _count_flops(twin, model, task, phases, data)
    rng.seed_all(rng.derive("rank", run.seed, 0, world.rank))
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
        max_epochs=None if per_epoch else settings.max_epochs,
        eval_every=Every(steps=settings.eval_every_steps, epochs=settings.eval_every_epochs),
        log_every_steps=settings.log_every_steps,
        clip_norm=settings.clip_norm,
        skip_nonfinite=settings.on_nonfinite == "skip",
        ema=(
            Ema(model, settings.ema_decay, phases[0].wrapped)
            if settings.ema_decay is not None
            else None
        ),
        patience_evals=settings.patience_evals,
        notes=[*notes, *matched, *uncounted],
        metric=run.checkpoint.metric,
        metric_mode=run.checkpoint.mode,
        seed=run.seed,
        flops_per_step=counted,
        peak_flops_per_s=peak,
    )


def _peak_flops_per_s(run: Run, world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    gathered = run.parallel.param_dtype if run.parallel.strategy == "fsdp" else "fp32"
    arithmetic = run.trainer.precision if gathered == "fp32" else gathered
    return flops.peak_flops_per_s(torch.cuda.get_device_name(world.device), arithmetic)


def _twin(model: nn.Module) -> tuple[nn.Module | None, list[str]]:
    try:
        return flops.on_meta(model), []
    except Exception as error:  # other people's models may not be copied
        return None, [_uncounted(error)]


def _uncounted(error: Exception) -> str:
    why = str(error).partition("\n")[0][:200]
    return f"no MFU: the FLOPs of the model cannot be counted: {type(error).__name__}: {why}"


def _count_flops(
    twin: nn.Module,
    model: nn.Module,
    task: Task,
    phases: Sequence[Phase],
    data: TrainStream | Streamed,
) -> tuple[int | None, list[str]]:
    """Return the model's FLOPs of a step on this rank, or why there are none. Rank 0 only."""
    named, found = dict(twin.named_parameters()), 0
    try:
        microbatches = data.first()
        for phase in phases:
            own = {id(parameter) for parameter in phase.parameters(model)}
            names = [name for name, parameter in model.named_parameters() if id(parameter) in own]
            trained = [named[name] for name in names if named[name].requires_grad]
            with parallel.training_only(twin, trained):
                loss = partial(_phase_loss, task, phase)
                found += flops.count(twin, loss, microbatches[0])
    except Exception as error:  # other people's code may do anything where there is no data
        return None, [_uncounted(error)]
    return found * len(microbatches), []


def _phase_loss(task: Task, phase: Phase, model: nn.Module, batch: Batch) -> Tensor:
    return task.loss(model, batch, *phase.task_arguments)[0]


def _build_phases(
    run: Run,
    world: World,
    model: nn.Module,
    task: Task,
    max_steps: int,
    steps_per_epoch: int,
) -> tuple[list[Phase], list[str]]:
    """Build what trains the model, and a line for each pattern of names. Collective."""
    stated = dict(TaskOptions.of(task).phases)
    if text := parameters.check_phases(run.optimizer.get("phases", {}), stated):
        raise ConfigError(f"optimizer.phases {text}")
    names, lines = parameters.phases(model, stated) if stated else ({}, [])
    if stated:
        wrapped = parallel.wrap_phases(model, world, run.parallel, names)
    else:
        wrapped = {"": parallel.wrap(model, world, run.parallel)}
    rules = run.optimizer.get("groups", [])
    groups, matched = parameters.groups(model, rules)
    named = dict(model.named_parameters())
    phases = []
    for phase, inner in wrapped.items():
        own = {id(named[name]) for name in names.get(phase, named)}
        parts = [{**g, "params": [p for p in g["params"] if id(p) in own]} for g in groups]
        parts = [part for part in parts if part["params"] or not stated]
        changes = run.optimizer.get("phases", {}).get(phase, {})
        node = {**_arguments(run.optimizer), **changes}
        optimizer = targets.make(node, "optimizer", parts if rules else parts[0]["params"])
        scheduler = _build_scheduler(run, optimizer, max_steps, steps_per_epoch)
        phases.append(Phase(name=phase, wrapped=inner, optimizer=optimizer, scheduler=scheduler))
    return phases, [*lines, *matched]


def _build_scheduler(
    run: Run, optimizer: Optimizer, max_steps: int, steps_per_epoch: int
) -> LRScheduler | None:
    if not run.scheduler:
        return None
    epochs = -(-max_steps // max(steps_per_epoch, 1))  # of a stream, nobody asks
    horizon = dict(zip(schedule.HORIZON_WORDS, (max_steps, epochs, steps_per_epoch), strict=True))
    node = {
        key: horizon.get(value, value) if isinstance(value, str) else value
        for key, value in run.scheduler.items()
        if key != "interval"
    }
    made: LRScheduler = targets.make(node, "scheduler", optimizer)
    return made
