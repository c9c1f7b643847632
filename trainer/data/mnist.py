"""MNIST and its variants (Fashion-MNIST, KMNIST, …): IDX files from a directory, gz or not.

Format: Y. LeCun, C. Cortes, C. Burges, The MNIST database, "File formats".
"""

import gzip
import math
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from trainer.data.augment import ShiftedAndFlipped
from trainer.errors import DataError

_UNSIGNED_BYTE = 0x08
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "eval": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_WHERE_TO_GET = (
    "MNIST's four files are at https://github.com/cvdf-datasets/mnist, Fashion-MNIST's at "
    "https://github.com/zalandoresearch/fashion-mnist or in Debian's package "
    "dataset-fashion-mnist (data.dir=/usr/share/datasets/fashion-mnist)"
)


class Mnist:
    """Images (N, 1, H, W) float32, standardised, with labels (N,) int64.

    Args:
        dir: directory with the four IDX files, each plain or with `.gz`.
        mean: subtracted from the pixels after scaling them to 0 … 1.
        std: divisor after that.
        classes: labels must be below this.
        augment: shift each training image by up to 2 pixels and mirror half of them, anew in each
            epoch. Suited to clothes, not to digits.
    """

    def __init__(
        self,
        dir: str,
        mean: float = 0.1307,
        std: float = 0.3081,
        classes: int = 10,
        augment: bool = False,
    ) -> None:
        self._dir, self.mean, self.std, self._classes = Path(dir), mean, std, classes
        self._augment = augment
        self._paths = {part: tuple(map(self._find, names)) for part, names in _FILES.items()}

    @cached_property
    def train(self) -> TensorDataset | ShiftedAndFlipped:
        """The training part."""
        plain = self._load("train")
        if not self._augment:
            return plain
        return ShiftedAndFlipped(*plain.tensors, fill=-self.mean / self.std)

    @cached_property
    def eval(self) -> TensorDataset:
        """The test part."""
        return self._load("eval")

    def _find(self, name: str) -> Path:
        for candidate in (name, name.replace("-idx", ".idx")):
            for suffix in ("", ".gz"):
                path = self._dir / (candidate + suffix)
                if path.is_file():
                    return path
        if not self._dir.is_dir():
            raise DataError(
                f"data.dir={self._dir}: no such directory; it should contain IDX files. "
                f"{_WHERE_TO_GET}"
            )
        names = sorted(path.name for path in self._dir.iterdir())[:8]
        content = f"it contains {', '.join(names)}" if names else "it is empty"
        raise DataError(
            f"data.dir={self._dir} has neither {name} nor {name}.gz ({content}). {_WHERE_TO_GET}"
        )

    def _load(self, part: str) -> TensorDataset:
        images_path, labels_path = self._paths[part]
        images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
        if len(images) != len(labels):
            raise DataError(
                f"{images_path} has {len(images):,} images, {labels_path} {len(labels):,} labels; "
                "the files do not match"
            )
        if len(labels) and int(labels.max()) >= self._classes:
            raise DataError(
                f"{labels_path} has the label {int(labels.max())}, data.classes is {self._classes}"
            )
        scaled = torch.from_numpy(images).unsqueeze(1).float().div_(255)
        return TensorDataset(scaled.sub_(self.mean).div_(self.std), torch.from_numpy(labels).long())


def read_idx(path: Path, *, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with `dims` axes; returns a uint8 array.

    Raises:
        DataError: the magic number, the axes, the length or gzip's checksum are wrong.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; copy or download it again") from None
    header_bytes = 4 + 4 * dims
    if len(data) < header_bytes or data[:4] != bytes([0, 0, _UNSIGNED_BYTE, dims]):
        raise DataError(
            f"{path} begins with {data[:4].hex(' ')}; an IDX file of unsigned bytes with {dims} "
            f"axes begins with 00 00 08 {dims:02x}"
        )
    shape = [int(n) for n in np.frombuffer(data, dtype=">u4", count=dims, offset=4)]
    if len(data) - header_bytes != math.prod(shape):
        raise DataError(
            f"{path} has {len(data) - header_bytes:,} bytes of data, but its header specifies "
            f"{' x '.join(map(str, shape))} = {math.prod(shape):,}; it was truncated or altered"
        )
    return np.frombuffer(bytearray(data), dtype=np.uint8, offset=header_bytes).reshape(shape)
