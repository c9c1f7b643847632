"""The shipped Tasks: what a step computes. See protocols.Task."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Classification:
    """Cross entropy of (inputs, labels) batches, and accuracy.

    The model maps inputs (N, …) to logits (N, classes); labels are (N,) int64.

    Args:
        label_smoothing: share of the target spread evenly over all classes, 0 … 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in 0 … 1")
        self._label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy (0-dim) and the logits (N, classes)."""
        inputs, labels = batch
        logits = model(inputs)
        return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing), logits

    def figures(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the accuracy on this batch."""
        return {"accuracy": (outputs.argmax(1) == batch[1]).float().mean()}

    def metrics(self) -> Mapping[str, Any]:
        """Return the accuracy: the share of samples whose largest logit is their label's."""
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        return {"accuracy": MeanMetric()}

    def update(
        self, metrics: Mapping[str, Any], outputs: Tensor, batch: tuple[Tensor, Tensor]
    ) -> None:
        """Add one batch to the accuracy."""
        metrics["accuracy"].update((outputs.argmax(1) == batch[1]).double())
