"""Synthetic data of any shape: a random pattern per class, plus noise per sample."""

from collections.abc import Sequence

import torch
from torch.utils.data import TensorDataset

from trainer.core.rng import derive


class Synthetic:
    """Inputs (N, *shape) float32 with labels (N,) int64 in 0 … classes-1.

    Args:
        shape: shape of one input.
        classes: number of labels.
        train_samples: number of training samples.
        eval_samples: number of evaluation samples.
        noise: standard deviation of the noise; that of the patterns is 1.
        seed: of patterns, labels and noise.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int = 10,
        train_samples: int = 10_000,
        eval_samples: int = 1_000,
        noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._shape, self._classes, self._noise, self._seed = tuple(shape), classes, noise, seed
        self.train = self._make("train", train_samples)
        self.eval = self._make("eval", eval_samples)

    def _make(self, part: str, samples: int) -> TensorDataset:
        patterns = torch.randn(self._classes, *self._shape, generator=self._generator("patterns"))
        generator = self._generator(part)
        labels = torch.randint(self._classes, (samples,), generator=generator)
        noise = torch.randn(samples, *self._shape, generator=generator)
        return TensorDataset(patterns[labels] + self._noise * noise, labels)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive("synthetic", self._seed, purpose))
