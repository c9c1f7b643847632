"""Pictures in folders, one folder for each class, as torchvision's ImageFolder lays them out."""

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
"""Folders with pictures to evaluate on, beside `train`; the first that is there counts."""


class Pictures:
    """The pictures of one part: tensors (C, H, W) float32 with labels, decoded when asked for."""

    def __init__(
        self, root: Path, found: Sequence[tuple[str, int]], transform: Transform, *, training: bool
    ) -> None:
        self._root, self._transform, self._training = root, transform, training
        # Arrays: a worker that counts references to a million strings would copy them all.
        self._names = np.array([os.fsencode(name) for name, _ in found])
        self.labels = torch.tensor([label for _, label in found])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a picture and its label (0-dim, int64)."""
        picture = images.decode(Path(self.describe(index)))
        return self._transform(picture, training=self._training), self.labels[index]

    def describe(self, index: int) -> str:
        """Return the path of a picture."""
        return str(self._root / os.fsdecode(self._names[index]))


@dataclass(frozen=True)
class _Parts:
    """What lies where: classes by name, and (name under the root, label) of each picture."""

    classes: list[str]
    train: list[tuple[str, int]]
    eval: list[tuple[str, int]]


class ImageFolder:
    """Pictures (C, H, W) float32 with labels (0-dim, int64): the number of their class by name.

    `dir` has `train` and one of `eval`, `val`, `valid`, `validation`, `test`, each with a folder
    for each class; or it has the folders of the classes itself. Where there is nothing to
    evaluate on, a share of the pictures is set aside, by a hash of their names.

    Args:
        dir: a local folder.
        shape: C, H, W of the tensors.
        classes: number of classes of the model; None: it is not checked.
        eval_share: share of the pictures to set aside, about; 0: evaluate on none.
        mean, std, crop_share, augment, flip: see `images.Transform`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: there is no such folder, or nothing can decode pictures.
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
        self.mean, self.std, self.crop_share = mean, std, crop_share  # an export tells them
        images.need_pillow("data=image_folder")
        if not self._dir.is_dir():
            near = self._dir.parent
            there = _names(near) if near.is_dir() else []
            found = f"{near} holds {_some(there)}" if there else f"nor is there anything in {near}"
            raise DataError(
                f"data.dir={dir}: there is no such directory ({found}). It should have a folder "
                "for each class, or train/ and eval/ with these"
            )

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in it."""
        return self._parts.classes

    @cached_property
    def train(self) -> Pictures:
        """The pictures to train on.

        Raises:
            DataError: a class has no pictures, or the parts have not the same classes.
            ConfigError: there are not as many classes as the model has.
        """
        return Pictures(self._dir, self._parts.train, self._transform, training=True)

    @cached_property
    def eval(self) -> Pictures | None:
        """The pictures to evaluate on, if there are to be any; as `train`."""
        found = self._parts.eval
        return Pictures(self._dir, found, self._transform, training=False) if found else None

    @cached_property
    def _parts(self) -> _Parts:
        is_divided = any(_folders(self._dir / "train"))
        root = "train" if is_divided else ""
        classes = list(_folders(self._dir / root))
        if not classes:
            raise DataError(
                f"data.dir={self._dir} has no folder for any class ({_held(self._dir)}); put the "
                "pictures of each class into a folder of its name"
            )
        where = next((name for name in _EVAL_NAMES if is_divided and self._has(name)), None)
        if where is not None:
            self._compare(classes, where)
        train = self._list(root, classes)
        if where is not None:
            evaluated = self._list(where, classes)
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
        there = list(_folders(self._dir / part))
        lacking = [name for name in classes if name not in there]
        besides = [name for name in there if name not in classes]
        if lacking or besides:
            raise DataError(
                f"{self._dir / 'train'} and {self._dir / part} have not the same classes: the "
                f"second lacks {_some(lacking)}, and has {_some(besides)} besides"
            )

    def _list(self, part: str, classes: list[str]) -> list[tuple[str, int]]:
        """Return the pictures of a part, class by class, in the order of their names."""
        found = []
        for label, name in enumerate(classes):
            folder = self._dir / part / name
            pictures = sorted(_pictures(folder))
            if not pictures:
                raise DataError(
                    f"{folder} has no pictures ({_held(folder)}); a picture's name ends in "
                    f"{', '.join(_SUFFIXES)}. Fill the folder, or remove it"
                )
            prefix = Path(part) / name
            found += [((prefix / picture).as_posix(), label) for picture in pictures]
        return found

    def _divide(
        self, found: list[tuple[str, int]], classes: list[str]
    ) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        if not self._eval_share:
            return found, []
        is_eval = [_place(name) < self._eval_share for name, _ in found]
        train = [each for each, chosen in zip(found, is_eval, strict=True) if not chosen]
        evaluated = [each for each, chosen in zip(found, is_eval, strict=True) if chosen]
        bare = sorted(set(range(len(classes))) - {label for _, label in train})
        if bare or not evaluated:
            what = (
                f"to train on of {_some([classes[n] for n in bare])}" if bare else "to evaluate on"
            )
            raise DataError(
                f"data.eval_share={self._eval_share} leaves no picture {what}: {self._dir} has "
                f"{len(found):,} pictures; {'lower' if bare else 'raise'} it, give more pictures, "
                f"or divide them into {self._dir}/train and {self._dir}/eval yourself"
            )
        return train, evaluated


def _folders(parent: Path) -> Iterator[str]:
    """Yield the names of the folders in a folder, sorted."""
    if parent.is_dir():
        yield from sorted(n for n in _names(parent) if (parent / n).is_dir())


def _pictures(folder: Path) -> Iterator[str]:
    """Yield the names of the pictures under a folder, at any depth."""
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _leads_back(folder, os.path.join(parent, name))
        ]
        for name in names:
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _leads_back(top: Path, path: str) -> bool:
    """Whether it is a link to a folder that was gone through on the way to it, from `top` on."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    way = [parent for parent in Path(path).parents if parent == top or top in parent.parents]
    return any(os.path.commonpath([target, os.path.realpath(each)]) == target for each in way)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _held(folder: Path) -> str:
    there = _names(folder)
    return f"it holds {_some(there)}" if there else "it is empty"


def _some(names: list[str]) -> str:
    return listing(names, 8)


def _place(name: str) -> float:
    """Return where in 0 … 1 a name lies: a hash of it."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / (1 << 64)
