"""Handwritten digits: 1,797 real 8x8 images included in this package."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

_FILE = Path(__file__).with_name("digits.npz")


class Digits:
    """Images (N, 1, size, size) float32 with labels (N,) int64 in 0 … 9.

    Every fifth sample is for evaluation: 1,438 to train on, 359 to evaluate. The images are the
    test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0, in the order of
    scikit-learn's `load_digits`. `digits.npz` has their pixels, 0 … 16, and labels as bytes.

    Args:
        mean: subtracted from the pixels after scaling them to 0 … 1.
        std: then divided by; with 0.5 for both, values are in -1 … 1.
        size: height and width; other sizes than 8 are interpolated.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, size: int = 8) -> None:
        self.mean, self.std, self._size = mean, std, size

    @cached_property
    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(_FILE) as arrays:
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        scaled = images.unsqueeze(1).float().div_(16)
        if self._size != 8:
            scaled = F.interpolate(scaled, size=(self._size, self._size), mode="bilinear")
        scaled = scaled.sub_(self.mean).div_(self.std)
        return scaled, labels.long()

    @cached_property
    def train(self) -> TensorDataset:
        """Four fifths of the samples."""
        images, labels = self._all
        is_train = torch.arange(len(labels)) % 5 != 4
        return TensorDataset(images[is_train], labels[is_train])

    @cached_property
    def eval(self) -> TensorDataset:
        """Every fifth sample."""
        images, labels = self._all
        return TensorDataset(images[4::5], labels[4::5])
