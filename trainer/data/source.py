"""Batches of datasets: endless shuffled training batches, and one pass over evaluation samples."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.cluster.world import World
from trainer.core.state import Cursor, State
from trainer.data import order
from trainer.data.batches import fetch_readable, to_device
from trainer.data.feed import Feed, Item
from trainer.errors import DataError
from trainer.protocols import Batch


@dataclass(frozen=True)
class Datasets:
    """A pair of datasets: `data={_target_: trainer.data.source.Datasets, train: …, eval: …}`."""

    train: Any
    eval: Any | None = None


@dataclass(frozen=True)
class TrainBatches(ABC):
    """Settings of endless training batches on one rank, of a dataset or of a stream."""

    dataset: Any
    world: World
    seed: int
    global_batch_size: int
    accumulate: int = 1
    """Microbatches per rank and global batch."""
    workers: int = 0
    """Data worker processes; 0: batches are made in this process."""
    skip_damaged: bool = False
    """Use the next sample instead of one that cannot be read; otherwise raise a DataError."""

    @abstractmethod
    def batches(
        self, cursor: Cursor, limit: int | None = None
    ) -> "Feed[tuple[list[Batch], Cursor]]":
        """Return (this rank's microbatches of a global batch, cursor after it), from `cursor`.

        Ends after `limit` global batches, if given.
        """

    def first(self) -> list[Batch]:
        """Return this rank's microbatches of the first global batch.

        With data workers, one of them makes it: files that this process opened would be shared
        with all workers forked later.
        """
        single = replace(self, workers=min(self.workers, 1))
        return next(single.batches(State().cursor, 1))[0]


@dataclass(frozen=True)
class TrainStream(TrainBatches):
    """Endless training batches of a dataset, in an order independent of the number of ranks.

    Raises:
        DataError: the dataset has fewer samples than one global batch.
    """

    def __post_init__(self) -> None:
        if self.samples < self.global_batch_size:
            raise DataError(
                f"the training data has {self.samples:,} samples, fewer than one global batch "
                f"of {self.global_batch_size:,}; lower trainer.global_batch_size"
            )

    @property
    def samples(self) -> int:
        """Number of samples, on which the order depends."""
        return len(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch; the last, incomplete one is dropped."""
        return self.samples // self.global_batch_size

    def batches(
        self, cursor: Cursor, limit: int | None = None
    ) -> "Feed[tuple[list[Batch], Cursor]]":
        """Return (this rank's microbatches of a global batch, cursor after it), from `cursor`."""
        batches = order.global_batches(
            cursor, seed=self.seed, size=self.samples, global_batch_size=self.global_batch_size
        )
        batches = islice(batches, limit)
        rank_indices = partial(
            order.microbatches,
            rank=self.world.rank,
            world_size=self.world.size,
            accumulate=self.accumulate,
        )
        return Feed(
            partial(_train_item, self.dataset, self.seed, self.skip_damaged),
            (
                ([indices.numpy() for indices in rank_indices(batch)], after)
                for batch, after in batches
            ),
            device=self.world.device,
            workers=self.workers,
        )

    def rereads(self, cursor: Cursor) -> str:
        """Return the message about resuming from `cursor`: empty, since datasets seek at once."""
        return ""


def _train_item(
    dataset: Any, seed: int, skip: bool, key: tuple[list[npt.NDArray[Any]], Cursor]
) -> Item:
    microbatches, after = key
    epoch = after["epoch"] - (after["batch"] == 0)
    batches: list[Batch | None] = []
    damaged: tuple[str, ...] = ()
    for numbers in microbatches:
        indices = torch.from_numpy(numbers)
        batch, texts = fetch_readable(
            dataset, indices, "train", seed, epoch, skip=skip, replace=True
        )
        batches.append(batch)
        damaged += texts
    return Item((batches, after), damaged)


@dataclass(frozen=True)
class EvalStream:
    """Batches with every evaluation sample exactly once, over any number of ranks."""

    dataset: Any
    world: World
    batch_size: int
    """Samples per rank and batch."""
    workers: int = 0
    skip_damaged: bool = False
    """Leave out samples that cannot be read; otherwise raise a DataError."""

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.dataset) // (self.world.size * self.batch_size))

    def one(self) -> Batch:
        """Return a batch of one sample, for a rank with no samples left."""
        first = torch.tensor([0])
        skip = self.skip_damaged
        batch, _ = fetch_readable(self.dataset, first, "eval", skip=skip, replace=True)
        return to_device(batch, self.world.device)

    def first(self) -> Batch | None:
        """Return this rank's first batch or None; with data workers, one of them makes it."""
        return next(replace(self, workers=min(self.workers, 1)).batches(1))

    def batches(self, limit: int | None = None) -> "Feed[Batch | None]":
        """Return this rank's batches, equally many on every rank so that ranks can communicate.

        Rank by rank they are in the order of the samples: each rank has a contiguous block. None is
        a batch of which only other ranks have samples.
        """
        world = self.world
        indices = np.array_split(np.arange(len(self.dataset)), world.size)[world.rank]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return Feed(
            partial(_eval_item, self.dataset, self.skip_damaged),
            (indices[start : start + self.batch_size] for start in starts[:limit]),
            device=world.device,
            workers=self.workers,
        )


def _eval_item(dataset: Any, skip: bool, key: npt.NDArray[Any]) -> Item:
    if not len(key):
        return Item(None)
    indices = torch.from_numpy(key)
    batch, damaged = fetch_readable(dataset, indices, "eval", skip=skip, replace=False)
    return Item(batch, damaged, samples=len(key) - len(damaged))
