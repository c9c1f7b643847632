"""Batches from dataset samples: fetching, collation, unreadable samples, transfer to the device."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from trainer.core import nested, rng
from trainer.data import damage
from trainer.protocols import Batch

_SEEDED, _TENSORS, _BATCH, _SAMPLE = "get_seeded", "tensors", "__getitems__", "__getitem__"
"""Members of a dataset that give its samples, the fastest ones first."""


def fetch(dataset: Any, indices: Tensor, *seed: int | str) -> Batch:
    """Return the samples at `indices` (1-d int64) as one CPU batch.

    Uses the first of these that the dataset has: `get_seeded(indices, seeds)`, the `tensors` of a
    TensorDataset, `__getitems__`, `__getitem__` with collation; but one that a subclass overrides
    comes before those of its base classes. Random choices depend on `seed` and on the sample only
    (with `__getitems__`: on all samples of the batch), so they are the same in any process and
    after a resume.
    """
    access = _access(dataset)
    if access == _TENSORS:
        return tuple([_select(tensor, indices) for tensor in dataset.tensors])
    numbers = indices.tolist()
    if access == _SEEDED:
        return dataset.get_seeded(numbers, [rng.derive(*seed, number) for number in numbers])
    with rng.forked(rng.derive(*seed, *numbers)):
        if access == _BATCH:
            batch = dataset.__getitems__(numbers)
            return default_collate(batch) if isinstance(batch, list) else batch
        samples = []
        for number in numbers:
            rng.seed_all(rng.derive(*seed, number))
            samples.append(dataset[number])
        return default_collate(samples)


def row_tensors(dataset: Any) -> Any | None:
    """Return the tensors whose rows are the samples, also before random changes, or None."""
    has_rows = _access(dataset) in (_SEEDED, _TENSORS)
    return getattr(dataset, "tensors", None) if has_rows else None


def _access(dataset: object) -> str:
    return _access_of_class(type(dataset))  # type: ignore[arg-type]  # mypy: not hashable


@cache  # asked for every batch
def _access_of_class(kind: type[object]) -> str:
    """Return how batches of a dataset class are read: by one of its methods, or by rows.

    Methods are looked up in the class. A wrapper that passes look-ups of attributes to the dataset
    inside would return the methods of that dataset, whose indices differ.
    """
    depths: dict[str, int] = {}
    for depth, base in enumerate(kind.__mro__):
        names = [name for name in (_SEEDED, _BATCH, _SAMPLE) if callable(vars(base).get(name))]
        for name in [*names, *([_TENSORS] if base is TensorDataset else [])]:
            depths.setdefault(name, depth)
    if not depths:
        return _TENSORS
    order = [name for name in (_SEEDED, _TENSORS, _BATCH, _SAMPLE) if name in depths]
    return min(order, key=depths.__getitem__)


def _select(rows: Tensor, indices: Tensor) -> Tensor:
    """Return rows by index; for CPU images, `tensor[indices]` takes five times as long."""
    is_cpu = isinstance(rows, Tensor) and rows.is_cpu
    return rows.index_select(0, indices) if is_cpu else rows[indices]


def collate(samples: list[Any]) -> Batch:
    """Collate samples with torch's default_collate.

    Raises:
        DataError: their shapes or types differ.
    """
    try:
        return default_collate(samples)
    except Exception as error:
        if mismatch := damage.mismatch(len(samples), error):
            raise mismatch from error
        raise


def fetch_readable(
    dataset: Any, indices: Tensor, *seed: int | str, skip: bool, replace: bool
) -> tuple[Batch | None, tuple[str, ...]]:
    """Fetch a batch as `fetch` does; report or skip samples that cannot be read.

    Returns the batch (None if no sample is left) and one text per damaged sample.

    Args:
        dataset: the samples.
        indices: sample numbers, 1-d int64.
        seed: see `fetch`.
        skip: continue without damaged samples; otherwise the first one raises a DataError.
        replace: with `skip`, use the next readable sample instead; otherwise the batch shrinks.
    """
    try:
        return fetch(dataset, indices, *seed), ()
    except Exception as error:
        if not damage.is_damage(error):
            raise

    def read(index: int) -> object:
        return fetch(dataset, torch.tensor([index]), *seed)

    numbers, texts = damage.readable(dataset, indices.tolist(), read, skip=skip, replace=replace)
    if not numbers:
        return None, texts
    try:
        return fetch(dataset, torch.tensor(numbers), *seed), texts
    except Exception as error:  # every sample is readable alone
        if mismatch := damage.mismatch(len(numbers), error):
            raise mismatch from error
        raise


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of `batch` to `device`, keeping the nesting; CUDA copies are async."""
    if device.type == "cpu":
        return batch  # batches are created on the CPU
    return nested.map_leaves(partial(_move, device=device), batch)


def _move(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
