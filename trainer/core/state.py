"""Everything that moves during training, besides the tensors of model and optimizer."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.errors import CheckpointError

Cursor = dict[str, Any]
"""Position in the data: `epoch`, and `batch`, the number of global batches consumed in it.

A stream may add `source`, the state of where it reads from, as strict JSON.
"""


@dataclass
class State:
    """Where the run is. A checkpoint holds exactly this, the tensors and the generators."""

    step: int = 0
    """Passes of the loop that consumed one global batch."""
    skipped: int = 0
    """Steps with an update left out, in any of their phases: its gradient was not finite."""
    samples: int = 0
    """Samples consumed over all ranks."""
    cursor: Cursor = field(default_factory=lambda: {"epoch": 0, "batch": 0})
    """Where the next global batch comes from; (e, last) is always written as (e + 1, 0)."""
    last_eval_step: int = 0
    """The newest step whose evaluation is complete."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of that evaluation."""
    best: dict[str, float] | None = None
    """`value` and `step` of the best metric so far, where one is tracked; the earliest such."""
    stale_evals: int = 0
    """Evaluations since then."""
    damaged_samples: int = 0
    """Training samples that could not be read and were skipped, over all ranks."""

    @property
    def epoch(self) -> int:
        """Complete passes over the data."""
        return int(self.cursor["epoch"])

    def advance(self, cursor: Cursor, *, samples: int, applied: bool) -> None:
        """Take note that one global batch was consumed."""
        self.step += 1
        self.samples += samples
        self.skipped += not applied
        self.cursor = cursor

    def evaluated(self, metrics: dict[str, float], *, metric: str | None, mode: str) -> None:
        """Take note of a complete evaluation at this step."""
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
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: it has fields that this program does not know.
        """
        unknown = sorted(set(values) - {field.name for field in fields(self)})
        if unknown:
            raise CheckpointError(
                f"the checkpoint's state has the unknown fields {', '.join(unknown)}; it was "
                "written by a newer version: resume with that one"
            )
        for key, value in values.items():
            setattr(self, key, value)
