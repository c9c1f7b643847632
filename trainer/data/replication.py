"""Comparison of the data over ranks: all must read the same, since Perdure divides it."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.cluster.world import World
from trainer.core import nested
from trainer.data.feed import Feed, Item
from trainer.data.source import EvalStream, TrainStream
from trainer.data.streams import Streamed, begin_reader
from trainer.errors import ConfigError
from trainer.protocols import Batch

_MAX_SAMPLES = 16
"""Compared samples; a DataLoader that builds batches gives a complete global batch."""

Digests = dict[nested.Path, str]
"""A digest per part of a batch, such as its inputs and its labels."""


def check_replicated(name: str, data: TrainStream | Streamed | EvalStream) -> None:
    """Compare the first samples, and the length of a dataset, over the ranks. Collective.

    Every rank reads the same positions. Parts of the samples that a rank itself reads differently
    a second time, such as images with unseeded noise, are not compared. A stream must have one
    that is.

    Args:
        name: the data, for the message.
        data: training batches, or those of an evaluation. Its position does not change.

    Raises:
        ConfigError: ranks read other samples, as sources do that divide themselves by rank.
        DataError: the data cannot be read.
    """
    world = data.world
    if world.size == 1:
        return
    kind = "evaluation" if isinstance(data, EvalStream) else "training"
    is_stream = isinstance(data, Streamed)
    if not is_stream:
        counts = world.gather(len(data.dataset))
        if rank := _first_difference(counts):
            raise _divided(
                f"data: {name} has {counts[0]:,} {kind} samples on rank 0 and {counts[rank]:,} on "
                f"rank {rank}",
                is_stream=False,
            )
    readings = _readings(data)
    first = world.gather_results(lambda: next(readings))
    if not _first_difference(first):
        return
    second = world.gather_results(lambda: next(readings))
    pairs = list(zip(first, second, strict=True))
    stable = [path for path in first[0] if all(a.get(path) == b.get(path) for a, b in pairs)]
    rank = _first_difference([[digests.get(path) for path in stable] for digests in first])
    if rank or (is_stream and not stable):
        text = f"data: {name} gives rank {rank or 1} other {kind} samples than rank 0"
        raise _divided(text, is_stream=is_stream)


def _first_difference(values: list[Any]) -> int:
    """Return the first rank whose value differs from rank 0's, or 0."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), 0)


def _divided(difference: str, *, is_stream: bool) -> ConfigError:
    ways = (
        "the same data must exist on every rank. Remove the division by rank (Subset, shard, "
        "split_dataset_by_node), or, if files differ between nodes, use the same files on each"
    )
    if is_stream:
        ways = (
            "every rank must read the complete stream. Remove the division by rank "
            "(DistributedSampler, split_dataset_by_node, i % world_size); or return a dataset with "
            "__len__ and __getitem__ in its place, of which each rank reads its own samples only. "
            "If it shuffles with a separate generator, seed that equally on every rank"
        )
    return ConfigError(
        f"{difference}, but Perdure divides each global batch over the ranks, so samples would be "
        f"left out: {ways}"
    )


def _readings(data: TrainStream | Streamed | EvalStream) -> "Feed[Digests]":
    """Return two readings of the same samples, made in one process, as training makes them."""
    world = World()  # one rank, which reads the samples of all
    is_loader = isinstance(data.dataset, DataLoader)
    workers = 0 if is_loader else min(data.workers, 1)
    source: TrainStream | Streamed | EvalStream
    if isinstance(data, EvalStream):
        source = replace(data, world=world, batch_size=_MAX_SAMPLES, workers=0)
    else:
        size = data.global_batch_size if is_loader else min(data.global_batch_size, _MAX_SAMPLES)
        source = replace(data, world=world, global_batch_size=size, accumulate=1, workers=0)
    begin = {"begin": begin_reader} if isinstance(data, Streamed) else {}
    make = partial(_read, source)
    return Feed(make, repeat(None, 2), device=world.device, workers=workers, **begin)


def _read(data: TrainStream | Streamed | EvalStream, _: None) -> Item:
    return Item(dict(digests(data.first())))


def digests(batch: Batch) -> Iterator[tuple[nested.Path, str]]:
    """Yield the digest of each tensor, array, text and number; other objects have none."""
    for path, value in nested.leaves(batch):
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
            flat = value.detach().cpu().contiguous().flatten()
            kind, data = f"{value.dtype} {value.shape}", flat.view(torch.uint8).numpy().tobytes()
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            kind, data = f"{value.dtype} {value.shape}", value.tobytes()
        elif isinstance(value, (str, bytes, bool, int, float)):
            kind, data = type(value).__name__, repr(value).encode(errors="backslashreplace")
        else:
            continue
        yield path, hashlib.blake2b(kind.encode() + data, digest_size=16).hexdigest()
