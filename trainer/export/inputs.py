"""What an export is run on: pictures, arrays, IDX files, or the evaluation part of a data group."""

import glob
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data import images
from trainer.data.images import Transform
from trainer.data.mnist import read_idx
from trainer.data.source import fetch
from trainer.errors import ConfigError, DataError, closest
from trainer.protocols import DataSource

Array = npt.NDArray[Any]
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_IDX = ("-ubyte", "-ubyte.gz", ".idx", ".idx.gz")


@dataclass(frozen=True)
class Batch:
    """Some inputs together."""

    names: list[str]
    """How to call each one: a file, or a number."""
    arrays: dict[str, Array]
    """By the names of the export's inputs; the first axis counts the inputs."""
    labels: list[int] = field(default_factory=list)
    """What they are, where that is known."""


@dataclass(frozen=True)
class Interface:
    """What an export takes, as its record says."""

    inputs: Sequence[Mapping[str, Any]]
    """Each with `name`, `dtype` and `shape`."""
    preprocessing: Mapping[str, Any]

    @property
    def batch_size(self) -> int | None:
        """The only size of a batch that it takes; None: any."""
        first = self.inputs[0]["shape"][0] if self.inputs and self.inputs[0]["shape"] else "batch"
        return first if isinstance(first, int) else None

    @property
    def first(self) -> str:
        """Name of the first input."""
        return str(self.inputs[0]["name"])

    def __str__(self) -> str:
        return ", ".join(
            f"{each['name']} {each['dtype']}[{', '.join(map(str, each['shape']))}]"
            for each in self.inputs
        )

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, if they have any."""
        found = self.preprocessing.get("classes")
        return [str(name) for name in found] if isinstance(found, list) else None

    def transform(self) -> Transform:
        """Return what the run made of a picture before it evaluated on it.

        Raises:
            ConfigError: the model takes no pictures.
        """
        made = self.preprocessing
        return Transform(
            made.get("shape", ()),
            made.get("mean", 0.0),
            made.get("std", 1.0),
            made.get("crop_share", 1.0),
        )


def read(place: str, interface: Interface, batch_size: int) -> Iterator[Batch]:
    """Yield the inputs that lie at a place, in batches.

    Args:
        place: a file, a folder of pictures, or a pattern of files with `*`.
        interface: what the export takes.
        batch_size: inputs of a batch.

    Raises:
        ConfigError: there is nothing there, or nothing that is known.
        DataError: a file cannot be read, or does not fit.
    """
    path = Path(place)
    name = path.name.lower()
    if path.is_file() and name.endswith(".npy"):
        with _loaded(path) as array:
            yield from _arrays({interface.first: array}, place, batch_size)
    elif path.is_file() and name.endswith(".npz"):
        yield from _arrays(_npz(path, interface), place, batch_size)
    elif path.is_file() and name.endswith(_IDX):
        yield from _idx(path, interface, batch_size)
    else:
        yield from _pictures(_found(place), interface, batch_size)


def evaluation(source: DataSource, interface: Interface, batch_size: int) -> Iterator[Batch]:
    """Yield the evaluation part of a data source, as (input, label) batches have it.

    Raises:
        DataError: there is none, or its batches are not of that form.
    """
    dataset = source.eval
    if dataset is None:
        raise DataError("this data has nothing to evaluate on")
    for start in range(0, len(dataset), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(dataset)))
        batch = fetch(dataset, indices, "eval")
        if not (isinstance(batch, (tuple, list)) and isinstance(batch[0], torch.Tensor)):
            raise DataError(
                f"a batch of this data is a {type(batch).__name__}; (input, label) is needed. Save "
                "the inputs as .npz with the names of the export's"
            )
        yield Batch(
            [str(int(index)) for index in indices],
            {interface.first: batch[0].numpy()},
            _classes(batch[1] if len(batch) > 1 else None),
        )


def _classes(labels: Any) -> list[int]:
    """Return labels that are numbers of classes, one for each input."""
    is_known = isinstance(labels, torch.Tensor) and labels.ndim == 1
    return labels.tolist() if is_known and not labels.is_floating_point() else []


# --- files ---------------------------------------------------------------------------------------


def _found(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURES)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(place, recursive=True)))
    if not found:
        kind = "no picture in it" if path.is_dir() else "no such file"
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if path.is_dir() or not near else closest(path.name, near)
        raise ConfigError(f"input={place}: there is {kind}{hint}")
    odd = next((p for p in found if p.suffix.lower() not in _PICTURES), None)
    if odd is not None:
        raise ConfigError(
            f"input={odd}: files of this kind are not known; give pictures "
            f"({', '.join(_PICTURES[:3])}, …), .npy, .npz, or IDX files ({', '.join(_IDX[:2])})"
        )
    return found


def _pictures(found: list[Path], interface: Interface, batch_size: int) -> Iterator[Batch]:
    images.need_pillow("input= of pictures")
    from PIL import Image

    transform = interface.transform()
    for start in range(0, len(found), batch_size):
        chosen = found[start : start + batch_size]
        tensors = []
        for path in chosen:
            try:
                tensors.append(transform(images.decode(path), training=False))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} is no picture that can be read: {error}") from None
        yield Batch([str(path) for path in chosen], {interface.first: torch.stack(tensors).numpy()})


def _idx(path: Path, interface: Interface, batch_size: int) -> Iterator[Batch]:
    from PIL import Image

    transform = interface.transform()
    pixels = read_idx(path, dims=3)
    for start in range(0, len(pixels), batch_size):
        chosen = pixels[start : start + batch_size]
        tensors = [transform(Image.fromarray(each), training=False) for each in chosen]
        names = [str(start + index) for index in range(len(chosen))]
        yield Batch(names, {interface.first: torch.stack(tensors).numpy()})


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """Give what is in a file of NumPy's, which may be read until the end of the context."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "rb"))  # NumPy leaves a broken one open
            found = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path} cannot be read: {text}") from None
        yield found


def _npz(path: Path, interface: Interface) -> dict[str, Array]:
    names = [str(each["name"]) for each in interface.inputs]
    with _loaded(path) as stored:
        lacking = [name for name in names if name not in stored]
        if lacking and len(stored.files) == len(names) == 1:
            return {names[0]: stored[stored.files[0]]}
        if lacking:
            held = ", ".join(stored.files) or "nothing"
            raise DataError(f"{path} has no array {lacking[0]!r} (it has {held})")
        return {name: stored[name] for name in names}


def _arrays(arrays: dict[str, Array], place: str, batch_size: int) -> Iterator[Batch]:
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or not (count := lengths.pop()):
        raise DataError(f"{place}: every array needs a first axis that counts the inputs")
    for number in range(math.ceil(count / batch_size)):
        part = slice(number * batch_size, (number + 1) * batch_size)
        names = [str(index) for index in range(count)[part]]
        yield Batch(names, {name: array[part] for name, array in arrays.items()})
