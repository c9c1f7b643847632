"""Inputs of an export: images, arrays, IDX files, or the evaluation split of a data group."""

import glob
import json
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
from trainer.data.batches import fetch
from trainer.data.images import Transform
from trainer.data.mnist import read_idx
from trainer.errors import ConfigError, DataError, closest
from trainer.export.destination import record_path
from trainer.protocols import DataSource

Array = npt.NDArray[Any]
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_IDX = ("-ubyte", "-ubyte.gz", ".idx", ".idx.gz")


@dataclass(frozen=True)
class Batch:
    """A batch of inputs."""

    names: list[str]
    """File name or number of each input."""
    arrays: dict[str, Array]
    """Arrays by input name of the export; the first axis is the batch."""
    labels: list[int] = field(default_factory=list)
    """Class numbers, if known."""


@dataclass(frozen=True)
class InputSpec:
    """Names, dtypes and shapes of an export's inputs, and their preprocessing."""

    inputs: Sequence[Mapping[str, Any]]
    """Each with `name`, `dtype` and `shape`."""
    preprocessing: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path) -> "InputSpec":
        """Read the record of an export.

        Raises:
            ConfigError: the record is missing, or does not describe an export that can be run.
        """
        record = record_path(path)
        try:
            content = json.loads(record.read_bytes())
            spec = cls(content["inputs"], content["preprocessing"])
            spec.first, spec.batch_size  # noqa: B018 (raises if they are missing)
        except FileNotFoundError:
            missing = record if path.exists() else f"{path} or {record}"
            raise ConfigError(
                f"{missing} does not exist. python -m trainer.export writes an export and its "
                "record; copy both"
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{record} does not describe an export that can be run ({type(error).__name__}: "
                f"{error}); export the run again"
            ) from None
        return spec

    @property
    def batch_size(self) -> int | None:
        """The fixed batch size; None if it is dynamic."""
        first = self.inputs[0]["shape"][0] if self.inputs and self.inputs[0]["shape"] else "batch"
        return first if isinstance(first, int) else None

    @property
    def first(self) -> str:
        """Name of the first input."""
        return str(self.inputs[0]["name"])

    def __str__(self) -> str:
        return ", ".join(
            f"{spec['name']} {spec['dtype']}[{', '.join(map(str, spec['shape']))}]"
            for spec in self.inputs
        )

    @property
    def classes(self) -> list[str] | None:
        """Class names, if any."""
        names = self.preprocessing.get("classes")
        return [str(name) for name in names] if isinstance(names, list) else None

    def transform(self) -> Transform:
        """Return the run's image transform for evaluation.

        Raises:
            ConfigError: the model does not take images.
        """
        options = self.preprocessing
        return Transform(
            options.get("shape", ()),
            options.get("mean", 0.0),
            options.get("std", 1.0),
            options.get("crop_share", 1.0),
        )


def read(location: str, spec: InputSpec, batch_size: int) -> Iterator[Batch]:
    """Yield the inputs at a location in batches.

    Args:
        location: a file, a folder of images, or a glob pattern.
        spec: input specification of the export.
        batch_size: maximum inputs per batch.

    Raises:
        ConfigError: no such file, or an unknown file type.
        DataError: a file cannot be read, or does not fit the export.
    """
    path = Path(location)
    name = path.name.lower()
    if path.is_file() and name.endswith(".npy"):
        with _loaded(path) as array:
            yield from _array_batches({spec.first: array}, location, batch_size)
    elif path.is_file() and name.endswith(".npz"):
        yield from _array_batches(_npz(path, spec), location, batch_size)
    elif path.is_file() and name.endswith(_IDX):
        yield from _idx_batches(path, spec, batch_size)
    else:
        yield from _image_batches(_image_files(location), spec, batch_size)


def evaluation_batches(source: DataSource, spec: InputSpec, batch_size: int) -> Iterator[Batch]:
    """Yield the evaluation split of a data source with (input, label) batches.

    Raises:
        DataError: it has no evaluation split, or its batches have another form.
    """
    dataset = source.eval
    if dataset is None:
        raise DataError("this data has no evaluation split")
    for start in range(0, len(dataset), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(dataset)))
        batch = fetch(dataset, indices, "eval")
        if not (isinstance(batch, (tuple, list)) and isinstance(batch[0], torch.Tensor)):
            raise DataError(
                f"a batch of this data is a {type(batch).__name__}, but (input, label) is needed. "
                "Save the inputs as .npz, with the input names of the export"
            )
        yield Batch(
            [str(int(index)) for index in indices],
            {spec.first: batch[0].numpy()},
            _class_numbers(batch[1] if len(batch) > 1 else None),
        )


def _class_numbers(labels: Any) -> list[int]:
    """Return the labels if they are one class number per input, or else an empty list."""
    is_vector = isinstance(labels, torch.Tensor) and labels.ndim == 1
    return labels.tolist() if is_vector and not labels.is_floating_point() else []


# --- files ---------------------------------------------------------------------------------------


def _image_files(location: str) -> list[Path]:
    path = Path(location)
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES)
    elif path.is_file():
        paths = [path]
    else:
        paths = sorted(map(Path, glob.glob(location, recursive=True)))
    if not paths and path.is_dir():
        raise ConfigError(f"input={location}: no images in this folder")
    if not paths:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"input={location}: no such file{closest(path.name, siblings)}")
    unknown = next((p for p in paths if p.suffix.lower() not in _IMAGES), None)
    if unknown is not None:
        raise ConfigError(
            f"input={unknown}: unknown file type; pass images ({', '.join(_IMAGES[:3])}, …), "
            f".npy, .npz, or IDX files ({', '.join(_IDX[:2])})"
        )
    return paths


def _image_batches(paths: list[Path], spec: InputSpec, batch_size: int) -> Iterator[Batch]:
    images.need_pillow("input= of pictures")
    from PIL import Image

    transform = spec.transform()
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        tensors = []
        for path in batch:
            try:
                tensors.append(transform(images.decode(path), training=False))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} is not a readable image: {error}") from None
        yield Batch([str(path) for path in batch], {spec.first: torch.stack(tensors).numpy()})


def _idx_batches(path: Path, spec: InputSpec, batch_size: int) -> Iterator[Batch]:
    from PIL import Image

    transform = spec.transform()
    pixels = read_idx(path, dims=3)
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        tensors = [transform(Image.fromarray(image), training=False) for image in batch]
        names = [str(start + index) for index in range(len(batch))]
        yield Batch(names, {spec.first: torch.stack(tensors).numpy()})


@contextmanager
def _loaded(path: Path) -> Iterator[Any]:
    """Yield the content of a NumPy file, which stays open until the context ends."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))  # NumPy would leave a broken one open
            content = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path} cannot be read: {text}") from None
        yield content


def _npz(path: Path, spec: InputSpec) -> dict[str, Array]:
    names = [str(item["name"]) for item in spec.inputs]
    with _loaded(path) as stored:
        missing = [name for name in names if name not in stored]
        if missing and len(stored.files) == len(names) == 1:
            return {names[0]: stored[stored.files[0]]}
        if missing:
            present = ", ".join(stored.files) or "nothing"
            raise DataError(f"{path} has no array {missing[0]!r} (it has {present})")
        return {name: stored[name] for name in names}


def _array_batches(arrays: dict[str, Array], location: str, batch_size: int) -> Iterator[Batch]:
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or not (count := lengths.pop()):
        raise DataError(f"{location}: the first axis of every array must be the same batch axis")
    for number in range(math.ceil(count / batch_size)):
        rows = slice(number * batch_size, (number + 1) * batch_size)
        names = [str(index) for index in range(count)[rows]]
        yield Batch(names, {name: array[rows] for name, array in arrays.items()})
