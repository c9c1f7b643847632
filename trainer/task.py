"""The shipped Tasks: what a step computes. See protocols.Task."""

import math
from collections.abc import Mapping
from inspect import signature
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.source import fetch, to_device
from trainer.errors import ConfigError


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
        try:
            loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        except IndexError:  # on a GPU, CUDA asserts
            least, most = int(labels.min()), int(labels.max())
            what = f"set sample.classes={most + 1} or more" if least >= 0 else "change the data"
            raise ConfigError(
                f"there are labels from {least} to {most}, the model knows the classes 0 … "
                f"{logits.shape[1] - 1}; {what}"
            ) from None
        return loss, logits

    def train_metrics(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the accuracy on this batch."""
        return {"accuracy": (outputs.argmax(1) == batch[1]).float().mean()}

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

    def metrics(self) -> Mapping[str, Any]:
        """Return the accuracy: the share of samples whose largest logit is their label's."""
        from torchmetrics import MeanMetric  # slow to import; at the first evaluation

        return {"accuracy": MeanMetric()}

    def update(
        self, metrics: Mapping[str, Any], outputs: Tensor, batch: tuple[Tensor, Tensor]
    ) -> None:
        """Add one batch to the accuracy."""
        metrics["accuracy"].update((outputs.argmax(1) == batch[1]).double())

    def samples(self, model: nn.Module, dataset: Any) -> Mapping[str, Any]:
        """Return predictions of the first samples, and what is mistaken for what among more."""
        count = min(len(dataset), _CONFUSED) if hasattr(dataset, "__len__") else 0
        if not count:
            return {}
        device = next(model.parameters()).device
        shown, logits, labels = None, [], []
        for part in torch.arange(count).split(_AT_ONCE):
            batch = to_device(fetch(dataset, part, "samples"), device)
            logits.append(self.loss(model, batch)[1].float().cpu())
            labels.append(batch[1].cpu())
            shown = batch[0][:_SHOWN].cpu() if shown is None else shown
        chances, predicted = torch.cat(logits).softmax(1).max(1)
        label = torch.cat(labels)
        size = max(logits[0].shape[1], int(label.max()) + 1)
        confusion = torch.zeros(size, size, dtype=torch.int64)
        confusion.index_put_((label, predicted), torch.ones_like(label), accumulate=True)
        rows = zip(label.tolist(), predicted.tolist(), chances.tolist(), strict=True)
        predictions = {
            "samples": [
                {"index": i, "label": row[0], "prediction": row[1], "probability": row[2]}
                for i, row in enumerate(islice(rows, _SHOWN))
            ],
            "confusion": confusion.tolist() if size <= _CLASSES else [],
            "confusion_samples": count,
            "classes": list(getattr(dataset, "classes", range(size))),
        }
        return {"predictions": predictions, **_as_images(shown)}


class LanguageModel:
    """Cross entropy of the next token, over (inputs, targets) batches of tokens.

    The model maps tokens (N, T) int64 to logits (N, T, vocabulary), or to an object that has them
    as `.logits`. A target of -100 is not counted.

    Args:
        bytes_per_token: of the text that is evaluated on, for its bits per byte; 1 for bytes.
    """

    items = "tokens"
    """What `weight` counts."""

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

    def train_metrics(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing besides the loss."""
        return {}

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

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

    def samples(self, model: Any, dataset: Any) -> Mapping[str, Any]:
        """Return a text: the first tokens of `dataset`, and how the model goes on from them.

        Where the model can `generate`, as models.gpt and transformers' can, and the dataset can
        `decode`, as trainer.data.text can.
        """
        if not (hasattr(model, "generate") and hasattr(dataset, "decode")):
            return {}
        window = fetch(dataset, torch.arange(1), "samples")[0]  # (1, T)
        prompt = window[:, :_PROMPT].to(next(model.parameters()).device)
        if "count" in signature(model.generate).parameters:
            tokens = model.generate(prompt, _GENERATED, temperature=_TEMPERATURE)
        else:  # transformers' models end where their positions do
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

    def train_metrics(
        self, outputs: tuple[Tensor, ...], batch: Any, phase: str
    ) -> Mapping[str, Tensor]:
        """Return how sure the discriminator is, on average, that either kind is real."""
        if phase == "generator":
            return {}
        return dict(zip(_KINDS, (logits.sigmoid().mean() for logits in outputs), strict=True))

    figures = train_metrics
    """Former name of `train_metrics`; deprecated."""

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

    def samples(self, model: Any, dataset: Any) -> Mapping[str, Any]:
        """Return a grid of what is made of the same noise in every run, where that is images."""
        size = self._latent or model.generator.latent
        noise = torch.randn(64, size, generator=torch.Generator().manual_seed(0))
        parameter = next(model.parameters())
        made = model.generator(noise.to(parameter.device, parameter.dtype))
        return _as_images(made, between=(-1.0, 1.0))


_KINDS = ("real", "fake")


def _judged(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


_SHOWN, _CONFUSED, _AT_ONCE, _CLASSES = 24, 2000, 100, 100
"""Samples whose prediction is shown, that are in the confusion, in a batch; classes at most."""
_PROMPT, _GENERATED, _TEMPERATURE = 32, 400, 0.8
"""Tokens that a text begins with, tokens that the model adds, and how boldly."""


def _as_images(samples: Any, between: tuple[float, float] | None = None) -> dict[str, Tensor]:
    """Return images for a person, scaled from their own range unless told; else nothing."""
    if not (isinstance(samples, Tensor) and samples.ndim == 4 and samples.shape[1] in (1, 3)):
        return {}
    samples = samples.float()
    low, high = between or (samples.min().item(), samples.max().item())
    scaled = (samples - low) / max(high - low, 1e-6) * 255
    return {"images": scaled.round().clamp(0, 255).to(torch.uint8)}


_NOT_COUNTED = -100


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=_NOT_COUNTED, reduction="sum"
    )
    return total / torch.clamp((targets != _NOT_COUNTED).sum(), min=1)
