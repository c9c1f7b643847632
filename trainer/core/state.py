"""Training state apart from the tensors of model and optimizer."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.errors import CheckpointError

Cursor = dict[str, Any]
"""Position in the data: `epoch`, and `batch`, the number of global batches consumed in it.

A stream may add `source`, the state of the underlying reader, as strict JSON.
"""


@dataclass
class State:
    """Progress of a run. A checkpoint consists of this, the tensors and the generator states."""

    step: int = 0
    """Number of global batches consumed, one per iteration of the loop."""
    skipped: int = 0
    """Steps with a skipped update in any phase, because its gradient was NaN or infinite."""
    samples: int = 0
    """Samples consumed over all ranks."""
    cursor: Cursor = field(default_factory=lambda: {"epoch": 0, "batch": 0})
    """Position of the next global batch; the end of epoch e is always written as (e + 1, 0)."""
    last_eval_step: int = 0
    """Newest step with a complete evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of that evaluation."""
    best: dict[str, float] | None = None
    """`value` and `step` of the best metric so far, if one is tracked; the earliest of equals."""
    stale_evals: int = 0
    """Evaluations since the best one."""
    damaged_samples: int = 0
    """Training samples that could not be read and were skipped, over all ranks."""

    @property
    def epoch(self) -> int:
        """Complete passes over the data."""
        return int(self.cursor["epoch"])

    def advance(self, cursor: Cursor, *, samples: int, applied: bool) -> None:
        """Record that one global batch was consumed."""
        self.step += 1
        self.samples += samples
        self.skipped += not applied
        self.cursor = cursor

    def evaluated(self, metrics: dict[str, float], *, metric: str | None, mode: str) -> None:
        """Record a complete evaluation at this step."""
        self.last_eval_step = self.step
        self.metrics = metrics
        if metric is None:
            return
        self.stale_evals += 1
        if math.isnan(metrics[metric]):
            return
        value = metrics[metric]
        sign = 1 if mode == "max" else -1
        if self.best is None or sign * value > sign * self.best["value"]:
            self.best = {"value": value, "step": self.step}
            self.stale_evals = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Set the fields that `state_dict` returned.

        Raises:
            CheckpointError: a field is unknown: a newer version wrote it.
        """
        unknown = sorted(set(values) - {field.name for field in fields(self)})
        if unknown:
            raise CheckpointError(
                f"the checkpoint's state has the unknown fields {', '.join(unknown)}; it was "
                "written by a newer version: resume with that one"
            )
        for key, value in values.items():
            setattr(self, key, value)
