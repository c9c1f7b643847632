"""The nets of DCGAN: Radford, Metz and Chintala, ICLR 2016.

Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Generator(nn.Module):
    """Transposed convolutions from a vector to an image; every one but the first doubles the size.

    Input (N, latent) float, standard normal; output (N, channels, size, size) in -1 … 1. Size 64
    starts from 4x4 pixels with 8 * width channels and halves the channels as it doubles the size.

    Args:
        latent: size of the noise vector.
        channels: channels of an image.
        width: channels before the last convolution.
        size: height and width of an image: 4, 5, 6 or 7 doubled at least once.

    Raises:
        ValueError: a size is below 1, or `size` is not one of those.
    """

    def __init__(self, latent: int, channels: int, width: int, size: int) -> None:
        super().__init__()
        _check(latent=latent, channels=channels, width=width)
        start, doublings = _plan(size)
        self.latent = latent
        widths = [width * 2**power for power in reversed(range(doublings))]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, widths[0], start, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        # No batch norm on the images, after the paper: with it the two nets oscillate.
        last = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1, bias=False)
        self.layers = nn.Sequential(*layers, last, nn.Tanh())
        self.apply(_initialise)

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise (N, latent) to images (N, channels, size, size) in -1 … 1.

        Raises:
            ValueError: the noise has another shape.
        """
        if noise.ndim != 2 or noise.shape[1] != self.latent:
            raise ValueError(f"noise is {list(noise.shape)}, but must be (N, {self.latent})")
        images: Tensor = self.layers(noise[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """Convolutions from an image to one logit; every one but the last halves the size.

    Input (N, channels, size, size) float in -1 … 1; output (N,): logits of being real.

    Args:
        channels: channels of an image.
        width: channels after the first convolution; they double with every halving of the size.
        size: height and width of an image: 4, 5, 6 or 7 doubled at least once.

    Raises:
        ValueError: a size is below 1, or `size` is not one of those.
    """

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        _check(channels=channels, width=width)
        end, halvings = _plan(size)
        widths = [width * 2**power for power in range(halvings)]
        # No batch norm on the images, as in the generator.
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        ]
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, end, bias=False))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, channels, size, size) to logits (N,)."""
        logits: Tensor = self.layers(images)  # (N, 1, 1, 1)
        return torch.flatten(logits)


class DCGAN(nn.Module):
    """A generator and a discriminator, as `.generator` and `.discriminator`.

    Input (N, latent) float, standard normal; output (N, C, H, W) in -1 … 1: the generator's. With
    (3, 64, 64), latent=100 and width=128 the generator has the paper's sizes. Weights start normal
    with standard deviation 0.02, around 1 for the scales of batch norms.

    Args:
        input_shape: (C, H, W) of an image, H equal to W: 4, 5, 6 or 7 doubled at least once.
        latent: size of the noise vector.
        width: channels next to the images, in both nets.

    Raises:
        ValueError: the images are not square, or a size is not one of the above.
    """

    def __init__(
        self, input_shape: Sequence[int] = (1, 28, 28), latent: int = 64, width: int = 64
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
            raise ValueError(
                f"input_shape={list(input_shape)} must be [channels, size, size]: square images"
            )
        channels, size, _ = input_shape
        self.generator = Generator(latent, channels, width, size)
        self.discriminator = Discriminator(channels, width, size)

    def forward(self, noise: Tensor) -> Tensor:
        """Map noise (N, latent) to images (N, C, H, W) in -1 … 1."""
        images: Tensor = self.generator(noise)
        return images


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be >= 1")


def _plan(size: int) -> tuple[int, int]:
    """Return the smallest map's size, 4 … 7, and how often it is doubled to become `size`."""
    start, doublings = size, 0
    while start > 7 and start % 2 == 0:
        start, doublings = start // 2, doublings + 1
    if start > 7 or doublings < 1:
        raise ValueError(
            f"size={size}: height and width must be 4, 5, 6 or 7 doubled at least once, such as "
            "8, 28, 32 or 64; pad or resize the images"
        )
    return start, doublings


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
