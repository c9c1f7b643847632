"""Images as tensors: decoded by Pillow, resized to one shape, randomly augmented for training."""

import io
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Augment = Literal["none", "pad_crop", "resized_crop"]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Range of area (fraction) and aspect ratio of a random crop: C. Szegedy et al., Going deeper with
convolutions, CVPR 2015, section 6."""
_PAD_FRACTION = 1 / 8
"""Maximum shift as a fraction of a side, as CIFAR's 4 of 32 pixels: K. He et al., Deep residual
learning, CVPR 2016."""
_TRIES = 10


class Transform:
    """Convert an image to a standardised tensor (C, H, W) float32.

    Args:
        shape: C, H, W; C is 1 (grey), 3 (RGB) or 4 (RGBA).
        mean: per channel, or one for all; subtracted from values in 0 … 1.
        std: per channel, or one for all; divisor after that.
        crop_share: fraction of the shorter side in the centre crop (ImageNet's usual: 0.875).
        augment: crop of training images: `none`, the centre; `pad_crop`, the centre, shifted by up
            to an eighth of a side; `resized_crop`, a random area.
        flip: mirror every second training image.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_share: float = 1.0,
        augment: Augment = "none",
        flip: bool = False,
    ) -> None:
        if len(shape) != 3 or shape[0] not in _MODES:
            raise ConfigError(
                f"sample.shape={list(shape)} is not an image shape; use [channels, height, "
                "width] with 1, 3 or 4 channels, for example sample.shape=[3,64,64]"
            )
        if not 0 < crop_share <= 1:
            raise ConfigError(f"data.crop_share={crop_share} must be above 0, and at most 1")
        self._shape, self._crop_share, self._augment, self._flip = shape, crop_share, augment, flip
        self._mean, self._std = (
            _by_channel(name, value, shape[0]) for name, value in (("mean", mean), ("std", std))
        )
        if not (self._std > 0).all():
            raise ConfigError(f"data.std={std} must be larger than 0")

    def __call__(self, picture: "Image", *, training: bool) -> Tensor:
        """Return the tensor of an image; random choices use Python's global generator.

        Raises:
            ValueError: the image has 32-bit pixels, whose value of white is undefined.
        """
        from PIL import Image, ImageOps

        channels, height, width = self._shape
        is_short = picture.mode.startswith("I;16")
        is_short |= picture.mode == "I" and picture.format in ("PNG", "PPM")  # never 32 bits
        picture = ImageOps.exif_transpose(picture)
        if is_short:  # Pillow's conversion of 16-bit grey treats 255 as white
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        elif picture.mode in ("I", "F"):
            type_name = {"I": "integers", "F": "floats"}[picture.mode]
            raise ValueError(
                f"its pixels are 32-bit {type_name}, whose value of white is undefined; use images "
                "with 8 or 16 bits"
            )
        picture = picture.convert(_MODES[channels])
        if training and self._augment == "resized_crop":
            box = _random_crop(picture.size)
        else:
            box = _center_crop(picture.size, (width, height), self._crop_share)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if training and self._augment == "pad_crop":
            picture = _shifted(picture)
        if training and self._flip and random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        pixels = torch.from_numpy(np.array(picture)).reshape(height, width, channels)
        scaled = pixels.permute(2, 0, 1).float().div_(255).contiguous()
        return scaled.sub_(self._mean).div_(self._std)


def decode(source: Path | bytes) -> "Image":
    """Read an image completely. Raises Pillow's error for a damaged one."""
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        picture.load()
        return picture


def need_pillow(feature: str) -> None:
    """Raise a DataError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401 (check only)
    except ImportError as error:
        raise DataError(
            f"{feature} needs Pillow, which cannot be imported ({error}); "
            "pip install pillow, or perdure[image]"
        ) from None


def _by_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    values = [float(number) for number in value] if isinstance(value, Sequence) else [float(value)]
    if len(values) not in (1, channels):
        raise ConfigError(
            f"data.{name}={value} has {len(values)} numbers, sample.shape has {channels} "
            f"channel{'s' * (channels != 1)}; use one number, or one per channel"
        )
    return torch.tensor(values).reshape(-1, 1, 1)


Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""


def _center_crop(size: tuple[int, int], shape: tuple[int, int], fraction: float) -> Box:
    """Return the largest centred box with the aspect ratio of `shape`, scaled by `fraction`."""
    scale = min(size[0] / shape[0], size[1] / shape[1]) * fraction
    width, height = shape[0] * scale, shape[1] * scale
    x, y = (size[0] - width) / 2, (size[1] - height) / 2
    return x, y, x + width, y + height


def _random_crop(size: tuple[int, int]) -> Box:
    for _ in range(_TRIES):
        area = size[0] * size[1] * random.uniform(*_AREA)
        aspect = math.exp(random.uniform(*map(math.log, _ASPECT)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= size[0] and 0 < height <= size[1]:
            x, y = random.randint(0, size[0] - width), random.randint(0, size[1] - height)
            return x, y, x + width, y + height
    side = min(size)  # of a very long image
    return _center_crop(size, (side, side), 1.0)


def _shifted(picture: "Image") -> "Image":
    from PIL import ImageOps

    across, down = (math.ceil(side * _PAD_FRACTION) for side in picture.size)
    padded = ImageOps.expand(picture, border=(across, down))
    x, y = random.randint(0, 2 * across), random.randint(0, 2 * down)
    return padded.crop((x, y, x + picture.width, y + picture.height))
