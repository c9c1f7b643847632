"""Digests of a few samples, by which a resume recognises reordered or relabelled data.

File lists without a sort, and class numbers from a `set`, differ from process to process, while the
number of samples stays the same.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.core import nested
from trainer.data import damage
from trainer.data.batches import fetch
from trainer.data.feed import Feed, Item
from trainer.data.replication import digests
from trainer.data.source import EvalStream, TrainStream

_MAX_SAMPLES = 16
"""Compared samples, spread over the dataset."""

Fingerprint = dict[str, str]
"""A digest per exact part of the samples."""


def fingerprint(data: TrainStream | EvalStream) -> Fingerprint:
    """Return digests of labels, tokens and texts; empty if a sample cannot be read.

    Floating-point numbers and pixels are left out, since libraries and devices round differently.
    With data workers, one of them reads, as for `TrainBatches.first`.
    """
    size = len(data.dataset)
    indices = np.unique(np.linspace(0, size - 1, min(size, _MAX_SAMPLES)).astype(int)).tolist()
    feed: Feed[Fingerprint] = Feed(
        partial(_read, data.dataset),
        iter([indices]),
        device=torch.device("cpu"),
        workers=min(data.workers, 1),
    )
    return next(feed)


def changed_parts(
    before: Mapping[str, str], now: Mapping[str, str], data: TrainStream | EvalStream
) -> list[str]:
    """Return the names of parts that differ between a stored fingerprint and the present one.

    Parts that this process itself reads differently a second time are left out.
    """
    changed = [part for part in before if part in now and now[part] != before[part]]
    again = fingerprint(data) if changed else now
    return [part for part in changed if again.get(part) == now[part]]


def _read(dataset: Any, indices: list[int]) -> Item:
    try:
        batch = fetch(dataset, torch.tensor(indices), "fingerprint")
    except Exception as error:  # training reports it when it reads that sample
        if not damage.is_damage(error):
            raise
        return Item({})
    return Item({str(path[0]): digest for path, digest in digests(dict(_exact(batch)))})


def _exact(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a batch that are integers, truth values or texts, by their names."""
    for path, value in nested.leaves(batch):
        name = f"part {nested.dotted(path)}" if path else "value"
        if isinstance(value, Tensor):
            is_exact = not (value.is_floating_point() or value.is_complex())
            if is_exact and value.dtype != torch.uint8:
                yield name, value
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "iub" and value.dtype != np.uint8:
                yield name, value
        elif isinstance(value, (str, bytes, bool, int)):
            yield name, value
