"""The shipped Tasks: what a step computes. See protocols.Task."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classification:
    """Cross entropy of (inputs, labels) batches, and accuracy.

    The model maps inputs (N, …) to logits (N, classes), or to an object that has them as
    `.logits`; labels are (N,) int64.

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
        outputs = model(inputs)
        logits = getattr(outputs, "logits", outputs)
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


class LanguageModel:
    """Cross entropy of the next token, over (inputs, targets) batches of tokens.

    The model maps tokens (N, T) int64 to logits (N, T, vocabulary), or to an object that has them
    as `.logits`. A target of -100 is not counted.

    Args:
        bytes_per_token: of the text that is evaluated on, for its bits per byte; 1 for bytes.
    """

    def __init__(self, bytes_per_token: float = 1.0) -> None:
        if not bytes_per_token > 0:
            raise ValueError(f"bytes_per_token={bytes_per_token} must be larger than 0")
        self._bits = 1 / math.log(2) / bytes_per_token

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy per counted target (0-dim, nats), and the logits."""
        outputs = model(batch[0])
        logits = getattr(outputs, "logits", outputs)
        return _cross_entropy(logits, batch[1]), logits

    def weight(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the number of counted targets."""
        return (batch[1] != _NOT_COUNTED).sum()

    def figures(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing besides the loss."""
        return {}

    def metrics(self) -> Mapping[str, Any]:
        """Return the bits per byte: what the model would need to store the text."""
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        return {"bits_per_byte": MeanMetric()}

    def update(
        self, metrics: Mapping[str, Any], outputs: Tensor, batch: tuple[Tensor, Tensor]
    ) -> None:
        """Add one batch to the bits per byte."""
        bits = _cross_entropy(outputs, batch[1]) * self._bits
        metrics["bits_per_byte"].update(bits, weight=self.weight(batch))


_NOT_COUNTED = -100


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_NOT_COUNTED, reduction="sum"
    )
    return total / torch.clamp((targets != _NOT_COUNTED).sum(), min=1)
