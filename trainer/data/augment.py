"""Random changes of training images that are a function of (seed, epoch, sample)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class ShiftedAndFlipped:
    """Images in memory, shifted by a few pixels and randomly mirrored per batch.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        fill: value of pixels outside the image.
        shift: maximum shift along each axis, in pixels.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, fill: float, shift: int = 2) -> None:
        self.tensors = (images, labels)
        self._shift = shift
        self._padded = F.pad(images, (shift,) * 4, value=fill)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.tensors[1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an unchanged image and its label."""
        return self.tensors[0][index], self.tensors[1][index]

    def get_seeded(self, indices: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images and labels; each image's change is a function of its seed."""
        rows, random_bits = torch.tensor(indices), torch.tensor(seeds)
        offsets = 2 * self._shift + 1
        height, width = self.tensors[0].shape[-2:]
        windows = self._padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, y, x, H, W)
        down, right = random_bits % offsets, random_bits // offsets % offsets
        images = windows[rows, :, down, right]
        mirrored = (random_bits // offsets**2 % 2).bool()
        images[mirrored] = images[mirrored].flip(-1)
        return images, self.tensors[1][rows]
