"""Pictures as tensors: decoded by Pillow, brought to one shape, changed at random to train on."""

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
"""What a random crop covers of a picture, and its shape: as in C. Szegedy et al., Going deeper
with convolutions, CVPR 2015, section 6."""
_PAD_SHARE = 1 / 8
"""Of a side, as in CIFAR's 4 of 32 pixels: K. He et al., Deep residual learning, CVPR 2016."""
_TRIES = 10


class Transform:
    """From a picture to a tensor (C, H, W) float32, standardised.

    Args:
        shape: C, H, W; C is 1 (grey), 3 (RGB) or 4 (RGBA).
        mean: of each channel, or of all, subtracted from values of 0 … 1.
        std: then divided by; likewise.
        crop_share: what the middle crop keeps of the shorter side (ImageNet's usual: 0.875).
        augment: how training pictures are cut: the middle; `pad_crop`, the middle, moved by up to
            an eighth of a side; `resized_crop`, a part of any size and place.
        flip: mirror every second training picture.

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
                f"sample.shape={list(shape)} is no shape of pictures; give [channels, height, "
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
        """Return the tensor of a picture; random choices are from Python's global generator.

        Raises:
            ValueError: of its pixels' numbers, nobody knows which one is white.
        """
        from PIL import Image, ImageOps

        channels, height, width = self._shape
        is_short = picture.mode.startswith("I;16")
        is_short |= picture.mode == "I" and picture.format in ("PNG", "PPM")  # they have no 32 bits
        picture = ImageOps.exif_transpose(picture)
        if is_short:  # 16 bits of grey, of which Pillow's own conversion takes 255 for white
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        elif picture.mode in ("I", "F"):
            kind = {"I": "integers", "F": "floats"}[picture.mode]
            raise ValueError(
                f"its pixels are {kind} of 32 bits, of which nobody knows what is white; give "
                "pictures of 8 or 16 bits"
            )
        picture = picture.convert(_MODES[channels])
        if training and self._augment == "resized_crop":
            box = _any_part(picture.size)
        else:
            box = _middle(picture.size, (width, height), self._crop_share)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if training and self._augment == "pad_crop":
            picture = _moved(picture)
        if training and self._flip and random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        pixels = torch.from_numpy(np.array(picture)).reshape(height, width, channels)
        scaled = pixels.permute(2, 0, 1).float().div_(255).contiguous()
        return scaled.sub_(self._mean).div_(self._std)


def decode(source: Path | bytes) -> "Image":
    """Return a picture, read completely. Raises what Pillow says about one that is damaged."""
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        picture.load()
        return picture


def need_pillow(what: str) -> None:
    """Refuse pictures where nothing can decode them."""
    try:
        import PIL.Image  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise DataError(
            f"{what} decodes pictures with Pillow, which cannot be imported ({error}); "
            "pip install pillow, or perdure[image]"
        ) from None


def _by_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    given = [float(each) for each in value] if isinstance(value, Sequence) else [float(value)]
    if len(given) not in (1, channels):
        raise ConfigError(
            f"data.{name}={value} has {len(given)} numbers, sample.shape has {channels} "
            f"channel{'s' * (channels != 1)}; give one number, or one for each"
        )
    return torch.tensor(given).reshape(-1, 1, 1)


Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture."""


def _middle(size: tuple[int, int], wanted: tuple[int, int], share: float) -> Box:
    """Return the largest part of the middle that has the wanted shape, or a share of it."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1]) * share
    width, height = wanted[0] * scale, wanted[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _any_part(size: tuple[int, int]) -> Box:
    for _ in range(_TRIES):
        area = size[0] * size[1] * random.uniform(*_AREA)
        aspect = math.exp(random.uniform(*map(math.log, _ASPECT)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= size[0] and 0 < height <= size[1]:
            left, top = random.randint(0, size[0] - width), random.randint(0, size[1] - height)
            return left, top, left + width, top + height
    side = min(size)  # of a picture that is very long
    return _middle(size, (side, side), 1.0)


def _moved(picture: "Image") -> "Image":
    from PIL import ImageOps

    across, down = (math.ceil(side * _PAD_SHARE) for side in picture.size)
    padded = ImageOps.expand(picture, border=(across, down))
    left, top = random.randint(0, 2 * across), random.randint(0, 2 * down)
    return padded.crop((left, top, left + picture.width, top + picture.height))
