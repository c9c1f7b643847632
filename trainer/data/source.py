"""Where batches come from: datasets fetched whole, placed on the device, with a cursor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from trainer.data import order
from trainer.distributed import World
from trainer.errors import DataError
from trainer.protocols import Batch
from trainer.state import Cursor


@dataclass(frozen=True)
class Datasets:
    """A pair of datasets: `data={_target_: trainer.data.source.Datasets, train: …, eval: …}`."""

    train: Any
    eval: Any | None = None


def fetch(dataset: Any, indices: Tensor) -> Batch:
    """Return the samples of `indices` as one batch on the CPU.

    Indexes the tensors of a TensorDataset; else asks `__getitems__` once; else collates samples.
    """
    tensors = getattr(dataset, "tensors", None)
    if tensors is not None:
        return tuple(tensor[indices] for tensor in tensors)
    if hasattr(dataset, "__getitems__"):
        batch = dataset.__getitems__(indices.tolist())
        return default_collate(batch) if isinstance(batch, list) else batch
    return default_collate([dataset[index] for index in indices.tolist()])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` with every tensor on `device`; tuples, lists and dicts keep their form."""
    if isinstance(batch, Tensor):
        if device.type == "cpu":
            return batch
        return batch.pin_memory().to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


@dataclass(frozen=True)
class TrainStream:
    """Endless training batches of one rank, in an order that does not depend on the ranks."""

    dataset: Any
    world: World
    seed: int
    global_batch_size: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        if len(self.dataset) < self.global_batch_size:
            raise DataError(
                f"the training data has {len(self.dataset):,} samples, fewer than one global batch "
                f"of {self.global_batch_size:,}; lower trainer.global_batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the last, incomplete one is dropped."""
        return len(self.dataset) // self.global_batch_size

    def batches(self, cursor: Cursor) -> Iterator[tuple[list[Batch], Cursor]]:
        """Yield (this rank's microbatches of a global batch, cursor after it) from `cursor` on."""
        everything = order.global_batches(
            cursor,
            seed=self.seed,
            size=len(self.dataset),
            global_batch_size=self.global_batch_size,
        )
        for indices, after in everything:
            pieces = order.share(
                indices,
                rank=self.world.rank,
                world_size=self.world.size,
                accumulate=self.accumulate,
            )
            yield [to_device(fetch(self.dataset, p), self.world.device) for p in pieces], after


@dataclass(frozen=True)
class EvalStream:
    """Every evaluation sample exactly once, over any number of ranks."""

    dataset: Any
    world: World
    batch_size: int
    """Samples per rank and batch."""

    def batches(self) -> Iterator[Batch | None]:
        """Yield this rank's batches; None where other ranks still have one and this has not.

        Every rank yields equally often, so ranks can agree on something after each batch.
        """
        size, world = len(self.dataset), self.world
        mine = torch.arange(size)[world.rank :: world.size]
        longest = -(-size // world.size)
        for start in range(0, longest, self.batch_size):
            indices = mine[start : start + self.batch_size]
            yield to_device(fetch(self.dataset, indices), world.device) if len(indices) else None
