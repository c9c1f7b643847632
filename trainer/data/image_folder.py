"""Images in one folder per class, the layout of torchvision's ImageFolder."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.core.formatting import listing
from trainer.data import images
from trainer.data.images import Augment, Transform
from trainer.errors import ConfigError, DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_EVAL_NAMES = ("eval", "val", "valid", "validation", "test")
"""Names of the evaluation folder next to `train`; the first existing one is used."""


class Pictures:
    """Images of one split: tensors (C, H, W) float32 with labels, decoded on access."""

    def __init__(
        self,
        root: Path,
        pictures: Sequence[tuple[str, int]],
        transform: Transform,
        *,
        training: bool,
    ) -> None:
        self._root, self._transform, self._training = root, transform, training
        # Arrays: reference counts of a million strings would make a worker copy them all.
        self._names = np.array([os.fsencode(name) for name, _ in pictures])
        self.labels = torch.tensor([label for _, label in pictures])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label (0-dim, int64)."""
        picture = images.decode(Path(self.describe(index)))
        return self._transform(picture, training=self._training), self.labels[index]

    def describe(self, index: int) -> str:
        """Return the path of an image."""
        return str(self._root / os.fsdecode(self._names[index]))


@dataclass(frozen=True)
class _Parts:
    """Classes by name, and (path under the root, label) of each image."""

    classes: list[str]
    train: list[tuple[str, int]]
    eval: list[tuple[str, int]]


class ImageFolder:
    """Images (C, H, W) float32 with labels (0-dim, int64): positions among the sorted class names.

    `dir` has `train` and one of `eval`, `val`, `valid`, `validation`, `test`, each with a folder
    per class; or it has the class folders itself. Without an evaluation folder, a fraction of the
    images is used for evaluation, chosen by a hash of their names.

    Args:
        dir: a local folder.
        shape: C, H, W of the tensors.
        classes: number of classes of the model; None: unchecked.
        eval_share: approximate fraction of the images for evaluation; 0: no evaluation.
        mean, std, crop_share, augment, flip: see `images.Transform`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: `dir` does not exist, or Pillow is not installed.
    """

    def __init__(
        self,
        dir: str,
        shape: Sequence[int] = (3, 64, 64),
        classes: int | None = None,
        eval_share: float = 0.1,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_share: float = 1.0,
        augment: Augment = "none",
        flip: bool = False,
    ) -> None:
        if not 0 <= eval_share < 1:
            raise ConfigError(f"data.eval_share={eval_share} must be at least 0, and below 1")
        self._dir, self._count, self._eval_share = Path(dir), classes, eval_share
        self._transform = Transform(shape, mean, std, crop_share, augment, flip)
        self.mean, self.std, self.crop_share = mean, std, crop_share  # part of an export's record
        images.need_pillow("data=image_folder")
        if not self._dir.is_dir():
            parent_folder = self._dir.parent
            names = _names(parent_folder) if parent_folder.is_dir() else []
            content = f"contains {_some(names)}" if names else "is empty or missing"
            raise DataError(
                f"data.dir={dir}: no such directory ({parent_folder} {content}). It should have a "
                "folder per class, or train/ and eval/ with these"
            )

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in this list."""
        return self._parts.classes

    @cached_property
    def train(self) -> Pictures:
        """Training images.

        Raises:
            DataError: a class has no images, or the splits have different classes.
            ConfigError: the number of classes differs from the model's.
        """
        return Pictures(self._dir, self._parts.train, self._transform, training=True)

    @cached_property
    def eval(self) -> Pictures | None:
        """Evaluation images, or None; raises as `train`."""
        pictures = self._parts.eval
        return Pictures(self._dir, pictures, self._transform, training=False) if pictures else None

    @cached_property
    def _parts(self) -> _Parts:
        is_divided = any(_folders(self._dir / "train"))
        root = "train" if is_divided else ""
        classes = list(_folders(self._dir / root))
        if not classes:
            raise DataError(
                f"data.dir={self._dir} has no class folders ({_contents(self._dir)}); put the "
                "images of each class into a folder with its name"
            )
        eval_folder = next((name for name in _EVAL_NAMES if is_divided and self._has(name)), None)
        if eval_folder is not None:
            self._compare(classes, eval_folder)
        train = self._list(root, classes)
        if eval_folder is not None:
            evaluated = self._list(eval_folder, classes)
        else:
            train, evaluated = self._divide(train, classes)
        if self._count is not None and len(classes) != self._count:
            raise ConfigError(
                f"{self._dir / root} has {len(classes):,} classes ({_some(classes)}), data.classes "
                f"is {self._count:,}; set sample.classes={len(classes)}"
            )
        return _Parts(classes, train, evaluated)

    def _has(self, part: str) -> bool:
        return any(_folders(self._dir / part))

    def _compare(self, classes: list[str], part: str) -> None:
        names = list(_folders(self._dir / part))
        missing = [name for name in classes if name not in names]
        unexpected = [name for name in names if name not in classes]
        if missing or unexpected:
            raise DataError(
                f"{self._dir / 'train'} and {self._dir / part} have different classes: the "
                f"second is missing {_some(missing)}, and has unexpected {_some(unexpected)}"
            )

    def _list(self, part: str, classes: list[str]) -> list[tuple[str, int]]:
        """Return the images of a split, class by class, sorted by name."""
        entries = []
        for label, name in enumerate(classes):
            folder = self._dir / part / name
            pictures = sorted(_pictures(folder))
            if not pictures:
                raise DataError(
                    f"{folder} has no images ({_contents(folder)}); image names end in "
                    f"{', '.join(_SUFFIXES)}. Fill the folder, or remove it"
                )
            prefix = Path(part) / name
            entries += [((prefix / picture).as_posix(), label) for picture in pictures]
        return entries

    def _divide(
        self, pictures: list[tuple[str, int]], classes: list[str]
    ) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        if not self._eval_share:
            return pictures, []
        is_eval = [_position(name) < self._eval_share for name, _ in pictures]
        train = [item for item, is_chosen in zip(pictures, is_eval, strict=True) if not is_chosen]
        evaluated = [item for item, is_chosen in zip(pictures, is_eval, strict=True) if is_chosen]
        empty_classes = sorted(set(range(len(classes))) - {label for _, label in train})
        if empty_classes or not evaluated:
            class_names = _some([classes[n] for n in empty_classes])
            lost = f"to train on of {class_names}" if empty_classes else "to evaluate on"
            raise DataError(
                f"data.eval_share={self._eval_share} leaves no images {lost}: {self._dir} has "
                f"{len(pictures):,} images; {'lower' if empty_classes else 'raise'} it, add "
                f"images, or divide them into {self._dir}/train and {self._dir}/eval yourself"
            )
        return train, evaluated


def _folders(parent: Path) -> Iterator[str]:
    """Yield the names of the folders in a folder, sorted."""
    if parent.is_dir():
        yield from sorted(n for n in _names(parent) if (parent / n).is_dir())


def _pictures(folder: Path) -> Iterator[str]:
    """Yield the names of the images under a folder, at any depth."""
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_link_loop(folder, os.path.join(parent, name))
        ]
        for name in names:
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _is_link_loop(top: Path, path: str) -> bool:
    """Return whether a link leads to one of its parent folders below `top`."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    parents = [parent for parent in Path(path).parents if parent == top or top in parent.parents]
    return any(os.path.commonpath([target, os.path.realpath(item)]) == target for item in parents)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _contents(folder: Path) -> str:
    names = _names(folder)
    return f"it contains {_some(names)}" if names else "it is empty"


def _some(names: list[str]) -> str:
    return listing(names, 8)


def _position(name: str) -> float:
    """Return the hash of a name as a number in 0 … 1."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / (1 << 64)
