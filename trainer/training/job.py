"""The objects of a training run."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.fingerprint import Fingerprint
from trainer.data.source import EvalStream, TrainStream
from trainer.data.streams import Streamed
from trainer.protocols import Batch, Task, Tracker
from trainer.training import parallel, unused_parameters
from trainer.training.ema import Ema


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Optimizer update within a step: its module, parameters, optimizer and schedule.

    An ordinary step has a single phase without a name. A task with phases has one object per phase,
    in the task's order, and each parameter belongs to at most one of them.
    """

    name: str = ""
    wrapped: nn.Module
    """Module that training calls: the model or its DDP or FSDP wrapper; for a named phase, the
    `Inside` module from `parallel.wrap_phases`."""
    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    make_scheduler: Callable[[int], LRScheduler] | None = None
    """Reset the optimizer's settings to the configured ones and build a schedule of this many
    steps; None: the schedule does not depend on the number of steps."""
    schedule_start: int = 0
    """Step of the run at which the schedule starts."""

    @property
    def task_arguments(self) -> tuple[str, ...]:
        """Extra arguments of the task's methods: the name of a named phase."""
        return (self.name,) if self.name else ()

    def metric_name(self, name: str) -> str:
        """Return the logged name of one of this phase's metrics."""
        return f"{self.name}_{name}" if self.name else name

    def loss(self, task: Task, batch: Batch) -> tuple[Tensor, Any]:
        """Return the task's loss and outputs in training: one forward of the wrapped module."""
        with unused_parameters.named(self.wrapped):
            if self.name:
                result: tuple[Tensor, Any] = self.wrapped(task.loss, batch, self.name)
                return result
            return task.loss(self.wrapped, batch)

    def own_gradients(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which only a named phase's parameters require gradients."""
        if not self.name:
            return nullcontext()
        return parallel.training_only(model, self.parameters(model))

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are clipped together: the model's, or a named phase's."""
        if not self.name:
            return list(model.parameters())
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class TaskOptions:
    """The optional members of a task, with a default for each absent one."""

    train_metrics: Callable[..., Mapping[str, Tensor]]
    """Metrics of a training batch, without the loss; arguments: outputs, batch[, phase name]."""
    weight: Callable[[Batch], float | Tensor] | None
    """Number of items in a batch; None: all samples count alike."""
    items: str
    """Plural noun for what `weight` counts."""
    phases: Mapping[str, Any]
    """Parameter patterns by phase name; empty: one update per step."""
    warnings: tuple[str, ...] = ()
    """Warnings about outdated members, one line each."""

    @classmethod
    def of(cls, task: Any) -> "TaskOptions":
        """Read the optional members of `task`."""
        # A subclass of a shipped task may override the former name, so the nearest one decides.
        names = ("train_metrics", "figures")
        scopes = [getattr(task, "__dict__", {}), *(vars(base) for base in type(task).__mro__)]
        name = next((name for scope in scopes for name in names if name in scope), names[0])
        warnings: tuple[str, ...] = ()
        if name == "figures":
            text = f"warning: {type(task).__name__}.figures is deprecated; rename it to {names[0]}"
            warnings = (text,)
        return cls(
            train_metrics=getattr(task, name, lambda *_: {}),
            weight=getattr(task, "weight", None),
            items=getattr(task, "items", "items"),
            phases=getattr(task, "phases", None) or {},
            warnings=warnings,
        )


@dataclass(kw_only=True)
class Job:
    """The objects of a training run; build.py makes one from a configuration."""

    world: World
    model: nn.Module
    """Plain module, without wrappers; it is saved, evaluated and exported."""
    task: Task
    phases: Sequence[Phase]
    """Updates of a step, in order: one, or one per phase of the task."""
    scheduler_interval: str = "step"
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    precision: str = "fp32"
    data: TrainStream | Streamed
    evaluation: EvalStream | None = None
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    """Digests of the training and evaluation data, on rank 0; see `data.fingerprint`."""
    tracker: Tracker
    max_steps: int
    """Step at which the run ends."""
    step_limit: int | None = None
    """Configured limit of steps, if there is also one of epochs."""
    max_epochs: int | None = None
    """Configured limit of epochs."""
    eval_every: Every
    log_every_steps: int = 10
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    """Skip and count updates with a non-finite gradient; False: stop with an error."""
    ema: Ema | None = None
    patience_evals: int | None = None
    declared: frozenset[str] | None = None
    """Names of the model's parameters and buffers, see `structure`; None: not checked."""
    frozen: Sequence[nn.Module] = ()
    """Modules that stay in evaluation mode during training."""
    notes: Sequence[str] = ()
    """Lines to log at the start, about how the job was built."""
    metric: str | None = None
    metric_mode: str | None = None
    """`max` or `min`; None: from the metric's name or class, once the metrics are created."""
    skipped_eval_step: int | None = None
    """Step whose evaluation is not repeated on resume: attempts were too short for it."""
    seed: int = 0
    metrics: dict[str, Any] | None = None
    """torchmetrics of the evaluation, created at the first one."""
    flops_per_step: int | None = None
    """Model FLOPs per step on this rank; None: unknown."""
    peak_flops_per_s: float | None = None
    """Peak FLOPs per second of this rank's device; None: unknown."""
    options: TaskOptions = field(init=False)
    """Optional members of the task."""

    def __post_init__(self) -> None:
        self.options = TaskOptions.of(self.task)
        self.notes = [*self.notes, *self.options.warnings]

    def last_step(self, state: State) -> int:
        """Return the step at which a run that continues from `state` ends.

        Steps before a fork may have been those of epochs with another number of steps.
        """
        per_epoch = self.data.steps_per_epoch
        if self.max_epochs is None or not per_epoch:
            return self.max_steps
        remaining = (self.max_epochs - state.epoch) * per_epoch - int(state.cursor["batch"])
        by_epochs = state.step + max(remaining, 0)
        return by_epochs if self.step_limit is None else min(by_epochs, self.step_limit)

    def follow_metric(self) -> None:
        """Let plateau schedules compare values in the direction of the metric that they follow.

        A schedule that changes its direction forgets its best value.
        """
        mode = self.metric_mode if self.metric is not None else "min"
        for scheduler in (phase.scheduler for phase in self.phases):
            if isinstance(scheduler, ReduceLROnPlateau) and mode and scheduler.mode != mode:
                worst = -math.inf if mode == "max" else math.inf
                scheduler.load_state_dict({**scheduler.state_dict(), "mode": mode, "best": worst})

    @property
    def may_skip(self) -> bool:
        """True if a step can end without an update."""
        return self.skip_nonfinite or self.scaler.is_enabled()

    def is_over(self, state: State) -> bool:
        """Return True at the last step or epoch, or when the patience has run out."""
        is_stale = self.patience_evals is not None and state.stale_evals >= self.patience_evals
        is_complete = self.max_epochs is not None and state.epoch >= self.max_epochs
        return state.step >= self.max_steps or is_stale or is_complete
