"""Built-in tasks: loss and metrics of a model. See protocols.Task."""

import math
from collections.abc import Mapping
from inspect import signature
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.batches import fetch, to_device
from trainer.errors import ConfigError


class Classification:
    """Cross entropy of (inputs, labels) batches, and accuracy.

    The model maps inputs (N, …) to logits (N, classes), or to an object with the attribute
    `.logits`; labels are (N,) int64.

    Args:
        label_smoothing: fraction of the target spread evenly over all classes, 0 … 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be >= 0 and <= 1")
        self._label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy (0-dim) and the logits (N, classes)."""
        inputs, labels = batch
        outputs = model(inputs)
        logits = getattr(outputs, "logits", outputs)
        try:
            loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        except IndexError:  # on a GPU, CUDA asserts
            low, high = int(labels.min()), int(labels.max())
            advice = f"set sample.classes={high + 1}" if low >= 0 else "change the data"
            raise ConfigError(
                f"the labels range from {low} to {high}, but the model has the classes 0 … "
                f"{logits.shape[1] - 1}; {advice}"
            ) from None
        return loss, logits

    def train_metrics(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the accuracy on this batch."""
        return {"accuracy": (outputs.argmax(1) == batch[1]).float().mean()}

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

    def metrics(self) -> Mapping[str, Any]:
        """Return the accuracy: the fraction of samples whose largest logit is the label's."""
        from torchmetrics import MeanMetric  # slow to import, so only for an evaluation

        return {"accuracy": MeanMetric()}

    def update(
        self, metrics: Mapping[str, Any], outputs: Tensor, batch: tuple[Tensor, Tensor]
    ) -> None:
        """Add one batch to the accuracy."""
        metrics["accuracy"].update((outputs.argmax(1) == batch[1]).double())

    def samples(self, model: nn.Module, dataset: Any) -> Mapping[str, Any]:
        """Return predictions for the first samples, and a confusion matrix."""
        count = min(len(dataset), _CONFUSION_SAMPLES) if hasattr(dataset, "__len__") else 0
        if not count:
            return {}
        device = next(model.parameters()).device
        images, logits, labels = None, [], []
        for indices in torch.arange(count).split(_BATCH):
            batch = to_device(fetch(dataset, indices, "samples"), device)
            logits.append(self.loss(model, batch)[1].float().cpu())
            labels.append(batch[1].cpu())
            images = batch[0][:_PREDICTIONS].cpu() if images is None else images
        probabilities, predicted = torch.cat(logits).softmax(1).max(1)
        label = torch.cat(labels)
        size = max(logits[0].shape[1], int(label.max()) + 1)
        confusion = torch.zeros(size, size, dtype=torch.int64)
        confusion.index_put_((label, predicted), torch.ones_like(label), accumulate=True)
        rows = zip(label.tolist(), predicted.tolist(), probabilities.tolist(), strict=True)
        predictions = {
            "samples": [
                {"index": i, "label": row[0], "prediction": row[1], "probability": row[2]}
                for i, row in enumerate(islice(rows, _PREDICTIONS))
            ],
            "confusion": confusion.tolist() if size <= _MAX_CLASSES else [],
            "confusion_samples": count,
            "classes": list(getattr(dataset, "classes", range(size))),
        }
        return {"predictions": predictions, **_as_images(images)}


class LanguageModel:
    """Next-token cross entropy of (inputs, targets) batches of tokens.

    The model maps tokens (N, T) int64 to logits (N, T, vocabulary), or to an object with the
    attribute `.logits`. Targets of -100 are ignored.

    Args:
        bytes_per_token: bytes per token in the evaluation text, for its bits per byte; 1 for bytes.
    """

    items = "tokens"
    """Plural noun for what `weight` counts."""

    def __init__(self, bytes_per_token: float = 1.0) -> None:
        if not bytes_per_token > 0:
            raise ValueError(f"bytes_per_token={bytes_per_token} must be > 0")
        self._bits = 1 / math.log(2) / bytes_per_token

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy over targets (0-dim, nats), and the logits."""
        outputs = model(batch[0])
        logits = getattr(outputs, "logits", outputs)
        return _cross_entropy(logits, batch[1]), logits

    def weight(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the number of targets that are not ignored."""
        return (batch[1] != _IGNORE_INDEX).sum()

    def train_metrics(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return no metrics."""
        return {}

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

    def metrics(self) -> Mapping[str, Any]:
        """Return the bits per byte, the cross entropy in bits per byte of text."""
        from torchmetrics import MeanMetric  # slow to import, so only for an evaluation

        return {"bits_per_byte": MeanMetric()}

    def update(
        self, metrics: Mapping[str, Any], outputs: Tensor, batch: tuple[Tensor, Tensor]
    ) -> None:
        """Add one batch to the bits per byte."""
        bits = _cross_entropy(outputs, batch[1]) * self._bits
        metrics["bits_per_byte"].update(bits, weight=self.weight(batch))

    def samples(self, model: Any, dataset: Any) -> Mapping[str, Any]:
        """Return a text generated from the first tokens of `dataset`.

        Needs a model with `generate` (models.gpt, transformers) and a dataset with `decode`
        (trainer.data.text); otherwise returns nothing.
        """
        if not (hasattr(model, "generate") and hasattr(dataset, "decode")):
            return {}
        window = fetch(dataset, torch.arange(1), "samples")[0]  # (1, T)
        prompt = window[:, :_PROMPT].to(next(model.parameters()).device)
        if "count" in signature(model.generate).parameters:
            tokens = model.generate(prompt, _GENERATED, temperature=_TEMPERATURE)
        else:  # transformers' models have a maximum length
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(_GENERATED, max(window.shape[1] - prompt.shape[1], 1)),
                do_sample=True,
                temperature=_TEMPERATURE,
                pad_token_id=0,
            )
        return {"text": dataset.decode(tokens[0].tolist())}


class Adversarial:
    """GAN training: Goodfellow et al., Generative Adversarial Nets, 2014.

    The model has `.generator`, from noise (N, latent) to samples, and `.discriminator`, from
    samples to logits (N,) of being real. A batch is a tensor of real samples, or a tuple that
    starts with one. Each step trains the discriminator, then the generator with the non-saturating
    loss (section 3 of the paper). Noise is normal, from torch's default generator.

    Args:
        label_smoothing: 1 minus the target of real samples, 0 … 1 (one-sided label smoothing: T.
            Salimans et al., Improved Techniques for Training GANs, NeurIPS 2016, section 3.4).
        latent: size of the noise; default: the generator's `.latent`.
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
        """Return the mean loss of the phase (0-dim), and its logits (N,)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        size = self._latent or model.generator.latent
        noise = torch.randn(len(images), size, dtype=images.dtype, device=images.device)
        if phase == "generator":
            fake = model.discriminator(model.generator(noise))
            return _real_loss(fake, 1.0), (fake,)
        with torch.no_grad():
            samples = model.generator(noise)
        real, fake = model.discriminator(images), model.discriminator(samples)
        return _real_loss(real, self._real) + _real_loss(fake, 0.0), (real, fake)

    def train_metrics(
        self, outputs: tuple[Tensor, ...], batch: Any, phase: str
    ) -> Mapping[str, Tensor]:
        """Return the discriminator's mean probability of being real, for real and fake samples."""
        if phase == "generator":
            return {}
        return dict(zip(_KINDS, (logits.sigmoid().mean() for logits in outputs), strict=True))

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

    def metrics(self) -> Mapping[str, Any]:
        """Return the same means for evaluation samples; 0.5 if it cannot separate them."""
        from torchmetrics import MeanMetric  # slow to import, so only for an evaluation

        return {f"discriminator_{kind}": MeanMetric() for kind in _KINDS}

    def update(
        self, metrics: Mapping[str, Any], outputs: tuple[Tensor, ...], batch: Any, phase: str
    ) -> None:
        """Add one batch."""
        for kind, logits in zip(_KINDS if phase == "discriminator" else (), outputs, strict=False):
            metrics[f"discriminator_{kind}"].update(logits.sigmoid())

    def samples(self, model: Any, dataset: Any) -> Mapping[str, Any]:
        """Return a grid of images generated from the same noise in every run."""
        size = self._latent or model.generator.latent
        noise = torch.randn(64, size, generator=torch.Generator().manual_seed(0))
        parameter = next(model.parameters())
        images = model.generator(noise.to(parameter.device, parameter.dtype))
        return _as_images(images, between=(-1.0, 1.0))


_KINDS = ("real", "fake")


def _real_loss(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


_PREDICTIONS = 24
"""Samples in the table of predictions."""
_CONFUSION_SAMPLES = 2000
"""Maximum number of samples in the confusion matrix."""
_BATCH = 100
"""Samples per forward pass."""
_MAX_CLASSES = 100
"""Maximum number of classes in the confusion matrix."""
_PROMPT = 32
"""Prompt length, tokens."""
_GENERATED = 400
"""Length of the generated text, tokens."""
_TEMPERATURE = 0.8
"""Sampling temperature of the generated text."""


def _as_images(samples: Any, between: tuple[float, float] | None = None) -> dict[str, Tensor]:
    """Return `samples` as 8-bit images, scaled from `between` or their range; or nothing."""
    if not (isinstance(samples, Tensor) and samples.ndim == 4 and samples.shape[1] in (1, 3)):
        return {}
    samples = samples.float()
    low, high = between or (samples.min().item(), samples.max().item())
    scaled = (samples - low) / max(high - low, 1e-6) * 255
    return {"images": scaled.round().clamp(0, 255).to(torch.uint8)}


_IGNORE_INDEX = -100


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten(),
        ignore_index=_IGNORE_INDEX,
        reduction="sum",
    )
    return total / torch.clamp((targets != _IGNORE_INDEX).sum(), min=1)
