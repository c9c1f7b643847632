"""The objects of a training run, and the updates that make up a step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.cluster.world import World
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.source import EvalStream, TrainStream
from trainer.data.streams import Streamed
from trainer.monitoring.profiling import Profiler
from trainer.monitoring.timing import Pace
from trainer.protocols import Batch, Task, Tracker
from trainer.training import parallel
from trainer.training.ema import Ema


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One update of a step: what is called for it, and what trains which parameters.

    An ordinary step has one, without a name. Where the task has phases, each has its own, in their
    order, and no parameter is in two of them.
    """

    name: str = ""
    wrapped: nn.Module
    """What training calls: the model, or a wrapper of it; of a named phase, the `Inside` of it
    that `parallel.wrap_phases` gives."""
    optimizer: Optimizer
    scheduler: LRScheduler | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What the task's methods are told besides: the name, if there is one."""
        return (self.name,) if self.name else ()

    def key(self, figure: str) -> str:
        """Return the name of one of its figures."""
        return f"{self.name}_{figure}" if self.name else figure

    def loss(self, task: Task, batch: Batch) -> tuple[Tensor, Any]:
        """Return the task's loss and outputs in training: one forward of what is wrapped."""
        if self.name:
            found: tuple[Tensor, Any] = self.wrapped(task.loss, batch, self.name)
            return found
        return task.loss(self.wrapped, batch)

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which a backward reaches a named phase's own parameters only."""
        if not self.name:
            return parallel.NOTHING
        return parallel.training_only(model, self.parameters(model))

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return what is clipped together: all of the model, or what a named phase trains."""
        if not self.name:
            return list(model.parameters())
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class TaskOptions:
    """The optional members of a task, with a default for each absent one."""

    train_metrics: Callable[..., Mapping[str, Tensor]]
    """Metrics of a training batch besides the loss; arguments: outputs, batch[, phase name]."""
    weight: Callable[[Batch], float | Tensor] | None
    """Number of items in a batch; None: all samples count alike."""
    items: str
    """Plural noun for what `weight` counts."""
    phases: Mapping[str, Any]
    """Parameter patterns by phase name; empty: one update per step."""
    warnings: tuple[str, ...] = ()
    """One line for each outdated member."""

    @classmethod
    def of(cls, task: Any) -> "TaskOptions":
        """Read the optional members of `task`."""
        # A subclass of a shipped task may override the former name, so the first class decides.
        names = ("train_metrics", "figures")
        bases = [vars(base) for base in type(task).__mro__]
        name = next((name for base in bases for name in names if name in base), names[0])
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
    """The objects of a training run. `build.py` makes one from a configuration; so can you."""

    world: World
    model: nn.Module
    """The plain module: what is saved, evaluated and exported."""
    task: Task
    phases: Sequence[Phase]
    """The updates of a step: one, or those that the task has, in their order."""
    scheduler_interval: str = "step"
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    precision: str = "fp32"
    data: TrainStream | Streamed
    evaluation: EvalStream | None = None
    tracker: Tracker
    max_steps: int
    max_epochs: int | None = None
    """Also the end, where it is not known how many steps an epoch has."""
    eval_every: Every
    log_every_steps: int = 10
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    """Leave out updates whose gradient is not finite, and count them; otherwise, stop."""
    ema: Ema | None = None
    patience_evals: int | None = None
    notes: Sequence[str] = ()
    """Lines to say at the start, of how the job was made."""
    metric: str | None = None
    metric_mode: str = "max"
    seed: int = 0
    metrics: dict[str, Any] | None = None
    """torchmetrics of the evaluation, made when it is first needed."""
    pace: Pace | None = None
    """What times the steps; `train` makes one, if need be."""
    profiler: Profiler | None = None
    """What traces some steps."""
    options: TaskOptions = field(init=False)
    """The task's optional members."""

    def __post_init__(self) -> None:
        self.options = TaskOptions.of(self.task)
        self.notes = [*self.notes, *self.options.warnings]

    @property
    def may_skip(self) -> bool:
        """Whether a step may be taken without an update."""
        return self.skip_nonfinite or self.scaler.is_enabled()

    def is_over(self, state: State) -> bool:
        """Return whether the run is at its end: of its steps, or of the patience with it."""
        is_stale = self.patience_evals is not None and state.stale_evals >= self.patience_evals
        is_through = self.max_epochs is not None and state.epoch >= self.max_epochs
        return state.step >= self.max_steps or is_stale or is_through
