"""Datasets of Hugging Face's `datasets` library, from local files, loaded or streamed."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainer.data import images
from trainer.data.images import Augment, Transform
from trainer.errors import ConfigError, DataError, closest

_LOADERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text")
"""Loaders of the library for local files."""
_EVAL_NAMES = ("eval", "validation", "valid", "val", "test")
"""Names of the evaluation split; the first existing one is used."""


class HuggingFace:
    """Samples (input, label), or dicts of columns, from a dataset on this machine.

    Images become tensors as in `data=image_folder`, numbers and lists of numbers become tensors,
    and strings stay strings. A string label becomes its class index. Evaluation data is never
    streamed.

    Args:
        path: a folder of `save_to_disk`, or a loader: arrow, csv, imagefolder, json, parquet, text.
        data_files: for a loader, a local file or pattern, a list of them, or these by split.
        train: the training split.
        eval: the evaluation split; None: the first of eval, validation, valid, val and test.
        streaming: read training rows sequentially instead of by index.
        shuffle_buffer: size of the shuffle buffer in rows, for streaming; 0: file order.
        input: column of the inputs.
        label: column of the labels.
        columns: samples are dicts of these columns instead.
        classes: number of classes of the model; None: unchecked.
        label_names: classes of string labels; None: from the data.
        transform: converts a row (a dict with decoded images) to a sample, instead of the above.
        seed: of the shuffling.
        cache_dir: the library's cache folder; None: its default.
        shape, mean, std, crop_share, augment, flip: for images, see `images.Transform`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the library is not installed.
    """

    def __init__(
        self,
        path: str,
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        train: str = "train",
        eval: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 0,
        input: str = "image",
        label: str = "label",
        columns: Sequence[str] | None = None,
        classes: int | None = None,
        label_names: Sequence[str] | None = None,
        transform: Callable[[Mapping[str, Any]], Any] | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        shape: Sequence[int] = (3, 64, 64),
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_share: float = 1.0,
        augment: Augment = "none",
        flip: bool = False,
    ) -> None:
        self._path, self._data_files, self._cache_dir = path, data_files, cache_dir
        self._names = {"train": train, "eval": eval}
        self._streaming, self._buffer, self._seed = streaming, shuffle_buffer, seed
        self._columns = list(columns or (input, label))
        self._as_dict, self._label = columns is not None, label
        self._count, self._label_names = classes, label_names
        self._transform = transform
        self._picture = (shape, mean, std, crop_share, augment, flip)
        self.mean, self.std, self.crop_share = mean, std, crop_share  # part of an export's record
        if shuffle_buffer < 0 or (shuffle_buffer and not streaming):
            raise ConfigError(
                f"data.shuffle_buffer={shuffle_buffer} needs data.streaming=true, and at least 0; "
                "without streaming, rows are shuffled anyway"
            )
        if data_files is None and not Path(path).is_dir():
            raise ConfigError(
                f"data.path={path}: no such folder; use one written by save_to_disk, or a"
                f" loader ({', '.join(_LOADERS)}) with data.data_files"
            )
        if data_files is not None and path not in _LOADERS:
            raise ConfigError(
                f"data.path={path} is not a loader of local files{closest(path, _LOADERS)}"
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"data=huggingface needs the library datasets, which cannot be imported "
                f"({error}); pip install datasets, or perdure[huggingface]"
            ) from None
        datasets.disable_progress_bars()

    @cached_property
    def train(self) -> "Rows | RowStream":
        """Training rows.

        Raises:
            DataError: the files cannot be read, or have no such split or column.
            ConfigError: the number of classes differs from the model's.
        """
        split = self._split(self._streamed if self._streaming else self._loaded, "train")
        rows, sampler = self._sampled(split, training=True)
        if not self._streaming:
            return Rows(rows, sampler)
        if self._buffer:
            rows = rows.shuffle(seed=self._seed, buffer_size=self._buffer)
        return RowStream(rows, sampler)

    @cached_property
    def eval(self) -> "Rows | None":
        """Evaluation rows, or None; raises as `train`."""
        if self._names["eval"] is None and not any(n in self._loaded for n in _EVAL_NAMES):
            return None
        return Rows(*self._sampled(self._split(self._loaded, "eval"), training=False))

    @property
    def classes(self) -> list[str] | None:
        """Class names, if the data or `label_names` has them."""
        return self.train.sampler.classes

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        return self._load(streaming=False)

    @cached_property
    def _streamed(self) -> Mapping[str, Any]:
        return self._load(streaming=True)

    def _load(self, *, streaming: bool) -> Mapping[str, Any]:
        import datasets

        try:
            if self._data_files is not None:
                loaded = datasets.load_dataset(
                    self._path,
                    data_files=self._data_files,
                    streaming=streaming,
                    cache_dir=self._cache_dir,
                )
            else:
                loaded = datasets.load_from_disk(self._path)
                if isinstance(loaded, datasets.Dataset):
                    loaded = {self._names["train"]: loaded}
                if streaming:
                    loaded = {name: split.to_iterable_dataset() for name, split in loaded.items()}
        except Exception as error:  # any type; a pattern without matches is a StopIteration
            source = self._path if self._data_files is None else f"{self._path} {self._data_files}"
            text = str(error) or "no such files"
            raise DataError(
                f"datasets cannot load {source}: {type(error).__name__}: {text[:500]}"
            ) from error
        splits: Mapping[str, Any] = loaded
        return splits

    def _split(self, loaded: Mapping[str, Any], part: str) -> Any:
        name = self._names[part] or next(n for n in _EVAL_NAMES if n in loaded)
        if name not in loaded:
            raise DataError(
                f"data.{part}={name}: the dataset has no such split{closest(name, loaded)}"
            )
        return loaded[name]

    def _sampled(self, rows: Any, *, training: bool) -> tuple[Any, "_Sampler"]:
        """Return the rows with undecoded images, and their sampler."""
        import datasets

        try:
            columns = rows.column_names or list(next(iter(rows)))
        except StopIteration:
            raise DataError(f"{self._path}: no rows") from None
        columns_used = [] if self._transform is not None else self._columns
        for column in columns_used:
            if column not in columns:
                key = "columns" if self._as_dict else "label" if column == self._label else "input"
                raise DataError(f"data.{key}={column}: no such column{closest(column, columns)}")
        features = rows.features or {}
        pictures = [n for n, feature in features.items() if isinstance(feature, datasets.Image)]
        for name in pictures:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        has_images = any(name in columns_used for name in pictures)
        to_tensor = Transform(*self._picture) if has_images else None
        if pictures:
            images.need_pillow("data=huggingface")
        return rows, _Sampler(
            columns=self._columns,
            as_dict=self._as_dict,
            label=self._label,
            classes=self._classes(rows, features) if self._label in columns_used else None,
            pictures=pictures,
            to_tensor=to_tensor,
            user_transform=self._transform,
            training=training,
        )

    def _classes(self, rows: Any, features: Mapping[str, Any]) -> list[str] | None:
        """Return the class names if labels are classes; raise if their number is wrong."""
        feature = features.get(self._label)
        names = self._label_names or getattr(feature, "names", None)
        if names is None and getattr(feature, "dtype", "") in ("string", "large_string"):
            if self._streaming:
                raise DataError(
                    f"data.label={self._label} has string labels, which a stream cannot list; "
                    "name them: data.label_names=[…]"
                )
            names = sorted(self._split(self._loaded, "train").unique(self._label))
        if names is None:
            return None
        if self._count is not None and len(names) != self._count:
            raise ConfigError(
                f"data.label={self._label} has {len(names):,} classes, data.classes is "
                f"{self._count:,}; set sample.classes={len(names)}"
            )
        return list(names)


@dataclass(frozen=True, kw_only=True)
class _Sampler:
    """Converts a row to a sample."""

    columns: Sequence[str]
    as_dict: bool
    label: str
    classes: list[str] | None
    pictures: Sequence[str]
    """Columns with images."""
    to_tensor: Transform | None
    """Conversion of an image; set if `columns` has one."""
    user_transform: Callable[[Mapping[str, Any]], Any] | None
    training: bool

    def __call__(self, row: Mapping[str, Any]) -> Any:
        if self.user_transform is not None:
            decoded = {name: _decoded(row[name]) for name in self.pictures}
            return self.user_transform({**row, **decoded})
        values = {name: self._value(name, row[name]) for name in self.columns}
        return values if self.as_dict else tuple(values.values())

    def _value(self, name: str, value: Any) -> Any:
        if name in self.pictures:
            if self.to_tensor is None:
                raise AssertionError  # set if a used column has images
            return self.to_tensor(_decoded(value), training=self.training)
        if name == self.label and self.classes is not None and isinstance(value, str):
            if value not in self.classes:
                raise ValueError(
                    f"the label {value!r} is not a class{closest(value, self.classes)}"
                )
            return torch.tensor(self.classes.index(value))
        return value if isinstance(value, (str, bytes)) else torch.as_tensor(value)

    def file_of(self, row: Mapping[str, Any]) -> str:
        """Return the file of a row's image, or an empty string."""
        files = [(row[name] or {}).get("path") for name in self.pictures]
        return ", ".join(file for file in files if file)


def _decoded(value: Mapping[str, Any]) -> Any:
    return images.decode(value["bytes"] if value["bytes"] is not None else Path(value["path"]))


class Rows:
    """Rows with random access."""

    def __init__(self, rows: Any, sampler: _Sampler) -> None:
        self._rows, self.sampler = rows, sampler

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        """Return the sample of a row."""
        return self.sampler(self._rows[index])

    def describe(self, index: int) -> str:
        """Return the row's number and the file of its image."""
        file = self.sampler.file_of(self._rows[index])
        return f"row {index:,}" + (f", {file}" if file else "")


class RowStream:
    """Streamed rows; an unusable row does not end the stream."""

    def __init__(self, rows: Any, sampler: _Sampler) -> None:
        self._rows, self.sampler = rows, sampler

    def __iter__(self) -> Iterator[Any]:
        return map(self.sampler, self._rows)

    @property
    def _ex_iterable(self) -> Any:
        return self._rows._ex_iterable  # read by position.py to detect a shuffle buffer

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self._rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position."""
        state: dict[str, Any] = self._rows.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next iteration from this position."""
        self._rows.load_state_dict(state)
