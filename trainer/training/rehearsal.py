"""Rehearsal of a step and an evaluation before the first step, without a trace.

It finds wrong shapes, channels, labels, metric names and metrics that are not numbers before any
training time is spent.
"""

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.cluster import launch
from trainer.cluster.world import World
from trainer.config import targets
from trainer.config.schema import Parallel, Run
from trainer.core import nested, rng
from trainer.core.state import State
from trainer.data.fingerprint import fingerprint
from trainer.data.replication import check_replicated
from trainer.data.source import EvalStream, TrainStream
from trainer.errors import ConfigError, PerdureError
from trainer.protocols import Batch
from trainer.tracking.several import Silent
from trainer.training import (
    build,
    evaluation,
    metric_setup,
    parallel,
    parameters,
    schedules,
    structure,
    unused_parameters,
)
from trainer.training.evaluation import check_name
from trainer.training.job import Job

_SHAPE_ERRORS = re.compile(
    r"shape|size|dimension|channel|broadcast|out of bounds|index out of range in self|dtype|"
    r"scalar type|must match|should contain \d+ elements|expected .*(input|target|tensor|[1-5]D)",
    re.IGNORECASE,
)
"""Texts of PyTorch's errors about inputs that do not fit a module."""


def check_start(run: Run, job: Job) -> None:
    """Rehearse if `trainer.smoke` is set; check that all ranks read the same data. Collective.

    Raises:
        ConfigError: as in `rehearse`, or the data divides itself by rank.
        DataError: the data cannot be read.
    """
    if run.trainer.smoke:
        rehearse(run, job)
    for data in (job.data, job.evaluation):
        if data is not None:
            check_replicated(str(run.data["_target_"]), data)
    if job.world.rank == 0:
        parts = {"training": job.data, "evaluation": job.evaluation}
        job.fingerprints = {
            name: fingerprint(data)
            for name, data in parts.items()
            if isinstance(data, (TrainStream, EvalStream))
        }


def rehearse(run: Run, job: Job, *, world_size: int | None = None) -> None:
    """Compute the loss of the first training batch and evaluate one batch. Collective.

    Weights, buffers, generators, numbers kept in modules and the task, metrics, and the position in
    the data are unchanged. Call it before any state is loaded.

    Args:
        run: the configuration.
        job: its objects.
        world_size: number of ranks of the run; None: that of the job.

    Raises:
        ConfigError: data, model, task or metrics do not fit together.
        DataError: the data cannot be read.
    """
    problem: PerdureError | None = None
    must_use_all = (world_size or job.world.size) > 1 and _waits_for_all(run.parallel)
    with _without_trace(run, job):
        try:
            _rehearse_training(job, must_use_all=must_use_all)
            metrics = _rehearse_evaluation(job)
            structure.check(job.model, job.declared)
        except PerdureError as error:
            problem = error
        job.world.run_on_all(lambda: _raise(problem))
        if job.evaluation is not None:
            names = evaluation.compute(job, metrics, is_rehearsal=True)
            uncertain = [name for name in metrics if not any(key.startswith(name) for key in names)]
            check_name(job, names, uncertain=uncertain)


def check(run: Run, world_size: int) -> None:
    """Build everything but trackers in this process and rehearse; writes nothing.

    Args:
        run: the configuration.
        world_size: number of ranks of the run; the batch is that of one rank.

    Raises:
        ConfigError, DataError: as in `rehearse`, or a schedule ends before the run.
    """
    rank_batch_size = run.trainer.global_batch_size // world_size
    single = replace(
        run,
        parallel=replace(run.parallel, strategy="single"),
        trainer=replace(run.trainer, global_batch_size=rank_batch_size),
    )
    world = World(device=torch.device(launch.device_name(run.launch)))
    job = build.build_job(single, world, build.build_data(single), Silent())
    metric_setup.set_up(single, job)
    if world_size > 1 and job.metrics is not None:
        evaluation.check_mergeable(job.metrics)
    if _starts_over(run):
        schedules.check_length(job, State())
    rehearse(run, job, world_size=world_size)


def check_optimizer(run: Run) -> None:
    """Build the optimizers and schedules for the shapes of the model, without data or its memory.

    Checks nothing if the model cannot be built on torch's meta device. Lengths of schedules are
    checked if the number of steps does not depend on the data.

    Raises:
        ConfigError: an optimizer or schedule rejects its arguments or parameters, keeps state that
            a checkpoint would not contain, or ends before the run.
    """
    steps = run.trainer.max_steps
    words = set(schedules.horizon_words(run.scheduler).values())
    has_length = steps is not None and run.trainer.max_epochs is None and words <= {"total_steps"}
    single = replace(
        run, parallel=Parallel(strategy="single"), scheduler=run.scheduler if has_length else {}
    )
    try:
        with torch.device("meta"):
            model = build.build_model(single)
        task = targets.make(run.task, "task")
    except Exception:
        return
    try:
        parameters.freeze(model, run.trainer.freeze)
        phases, _ = build.build_phases(single, World(), model, task, steps or 1, 0)
    except PerdureError:
        raise
    except Exception:
        return
    if has_length and steps and _starts_over(run) and run.scheduler.get("interval") != "epoch":
        schedules.check_steps(phases, steps, "step")


def _starts_over(run: Run) -> bool:
    """Return whether the schedule of a new run starts at step 0, unlike a fork's."""
    return run.resume in ("auto", "never") and not run.resume_override


def _raise(problem: PerdureError | None) -> None:
    if problem is not None:
        raise problem


@contextmanager
def _without_trace(run: Run, job: Job) -> Iterator[None]:
    """Restore everything that a forward pass may change; compile nothing; keep quiet."""
    metrics, job.metrics = job.metrics, None
    attributes = dict(getattr(job.task, "__dict__", {}))
    with ExitStack() as stack:
        stack.enter_context(rng.forked(rng.derive("rehearsal", job.seed, job.world.rank)))
        stack.enter_context(parallel.buffers_restored(job.model))
        stack.enter_context(_numbers_restored(job.model))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if run.parallel.compile != "no":
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            if attributes:
                vars(job.task).clear()
                vars(job.task).update(attributes)
            job.metrics = metrics
            evaluation.to_training(job)
            for phase in job.phases:
                parallel.reshard(phase.wrapped)


@contextmanager
def _numbers_restored(model: nn.Module) -> Iterator[None]:
    """Restore the numbers that modules keep as plain attributes, such as counters."""
    before = [(module, _numbers(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, numbers in before:
            for key in _numbers(module).keys() - numbers.keys():
                delattr(module, key)  # counted from a default of the class
            vars(module).update(numbers)


def _numbers(module: nn.Module) -> dict[str, int | float]:
    return {key: value for key, value in vars(module).items() if type(value) in (int, float)}


def _waits_for_all(options: Parallel) -> bool:
    """Return whether a parameter without a gradient stops training on several ranks."""
    return options.strategy != "fsdp" and not (
        options.find_unused_parameters or options.static_graph
    )


def _rehearse_training(job: Job, *, must_use_all: bool) -> None:
    """Compute the loss and metrics of this rank's first microbatch; no communication.

    A sharded model is left to the evaluation: its forward would expect a backward.
    """
    batch = job.data.first()[0]
    if parallel.is_sharded(job.phases[0].wrapped):
        return
    evaluation.to_training(job)
    for phase in job.phases:
        with _explaining_shapes(job, "training", batch), phase.own_gradients(job.model):
            loss, outputs = evaluation.forward(job, phase, batch)
            with torch.no_grad():
                metrics = job.options.train_metrics(outputs, batch, *phase.task_arguments)
            _check_loss(loss)
            if must_use_all:
                unused_parameters.check(job.model, loss)
        _check_train_metrics(metrics)


def _rehearse_evaluation(job: Job) -> Mapping[str, Any]:
    """Update new metrics with this rank's first evaluation batch; return them."""
    if job.evaluation is None:
        return {}
    metrics = evaluation.create_metrics(job)
    batch = job.evaluation.first()
    if batch is None and not parallel.is_sharded(job.phases[0].wrapped):
        return metrics
    inputs = job.evaluation.one() if batch is None else batch
    job.model.eval()
    with torch.no_grad(), _explaining_shapes(job, "evaluation", inputs):
        results = [evaluation.forward(job, phase, inputs) for phase in job.phases]
        if batch is not None:
            evaluation.update_metrics(job, metrics, results, batch, samples=1)
    return metrics


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {list(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ConfigError(
            f"task: loss() returns a {type(loss).__name__}{shape}, not a tensor with one number; "
            "return the mean over the batch"
        )


def _check_train_metrics(metrics: Mapping[str, object]) -> None:
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.ndim:
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise ConfigError(
                f"task: train_metrics() returns {name!r} as a {type(value).__name__}{shape}, not a "
                "tensor with one number; return its mean over the batch"
            )


# --- errors about shapes ------------------------------------------------------------------------


@contextmanager
def _explaining_shapes(job: Job, kind: str, batch: Batch) -> Iterator[None]:
    """Turn PyTorch's errors about shapes into errors of the configuration; others pass.

    Raises:
        ConfigError: the batch does not fit the model or the task.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if is_memory or isinstance(error, PerdureError) or not _is_about_shapes(error):
            raise
        text = " ".join(str(error).split())
        where = _location(job.model, error.__traceback__)
        raise ConfigError(
            f"the {kind} data does not fit the model or the task: {text}\n"
            f"  raised in {where}\n  batch: {_describe(batch)}\n"
            "Set sample.shape, sample.classes and the model's arguments to fit the data"
        ) from None


def _is_about_shapes(error: BaseException) -> bool:
    """Return whether a library raised `error`, about sizes, types or indices of tensors."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    is_raised_by_user = "site-packages" not in innermost.filename and (
        innermost.line or ""
    ).lstrip().startswith("raise")
    return not is_raised_by_user and _SHAPE_ERRORS.search(str(error)) is not None


def _location(model: nn.Module, trace: TracebackType | None) -> str:
    """Return the innermost module of the model, and the innermost line outside of torch."""
    names = {module: name for name, module in model.named_modules()}
    module, line = "", ""
    while trace is not None:
        code, owner = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(owner):
            module = f"{names[owner]}, {str(owner).splitlines()[0].rstrip('(')}, "
        if "/torch/" not in code.co_filename:
            line = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{module}{line}"


def _describe(batch: Batch) -> str:
    """Return shapes and types of a batch's tensors."""
    parts = []
    for path, value in nested.leaves(batch):
        if isinstance(value, Tensor):
            name = f"{nested.dotted(path)} " if path else ""
            parts.append(f"{name}{list(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    return ", ".join(parts) or type(batch).__name__
