"""The shipped Tasks: what a step computes. See protocols.Task."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

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


class Adversarial:
    """A generator against a discriminator: Goodfellow et al., Generative Adversarial Nets, 2014.

    For a model with `.generator`, from noise (N, latent) to samples, and `.discriminator`, from
    samples to logits (N,) of being real. A batch is of real samples, or begins with them. Each step
    first trains the discriminator, then the generator with the loss that does not saturate
    (section 3 of the paper). Noise is normal and comes from torch's own generator.

    Args:
        label_smoothing: what real samples lack to a target of 1, 0 … 1: it keeps the
            discriminator from being too sure (T. Salimans et al., Improved Techniques for
            Training GANs, NeurIPS 2016, section 3.4).
        latent: size of the noise; default: the generator's own `.latent`.
    """

    phases: ClassVar[Mapping[str, str]] = {
        "discriminator": "discriminator.*",
        "generator": "generator.*",
    }

    def __init__(self, label_smoothing: float = 0.0, latent: int | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be >= 0 and < 1")
        self._real = 1 - label_smoothing
        self._latent = latent

    def loss(self, model: Any, batch: Any, phase: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the mean loss of the phase (0-dim), and the logits (N,) it is made of."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        size = self._latent or model.generator.latent
        noise = torch.randn(len(images), size, dtype=images.dtype, device=images.device)
        if phase == "generator":
            fake = model.discriminator(model.generator(noise))
            return _judged(fake, 1.0), (fake,)
        with torch.no_grad():
            made = model.generator(noise)
        real, fake = model.discriminator(images), model.discriminator(made)
        return _judged(real, self._real) + _judged(fake, 0.0), (real, fake)

    def figures(self, outputs: tuple[Tensor, ...], batch: Any, phase: str) -> Mapping[str, Tensor]:
        """Return how sure the discriminator is, on average, that either kind is real."""
        if phase == "generator":
            return {}
        return dict(zip(_KINDS, (logits.sigmoid().mean() for logits in outputs), strict=True))

    def metrics(self) -> Mapping[str, Any]:
        """Return the same for samples that it was not trained on: 0.5 when it cannot tell."""
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        return {f"discriminator_{kind}": MeanMetric() for kind in _KINDS}

    def update(
        self, metrics: Mapping[str, Any], outputs: tuple[Tensor, ...], batch: Any, phase: str
    ) -> None:
        """Add one batch."""
        for kind, logits in zip(_KINDS if phase == "discriminator" else (), outputs, strict=False):
            metrics[f"discriminator_{kind}"].update(logits.sigmoid())


_KINDS = ("real", "fake")


def _judged(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


_NOT_COUNTED = -100


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_NOT_COUNTED, reduction="sum"
    )
    return total / torch.clamp((targets != _NOT_COUNTED).sum(), min=1)
