"""Where batches come from: datasets fetched whole, placed on the device, with a cursor."""

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from trainer import processes, rng
from trainer.data import order
from trainer.distributed import World
from trainer.errors import DataError
from trainer.protocols import Batch
from trainer.state import Cursor

T = TypeVar("T")
_AHEAD = 2
"""Items that are taken from the workers before they are asked for."""


@dataclass(frozen=True)
class Datasets:
    """A pair of datasets: `data={_target_: trainer.data.source.Datasets, train: …, eval: …}`."""

    train: Any
    eval: Any | None = None


def fetch(dataset: Any, indices: Tensor, *seed: int | str) -> Batch:
    """Return the samples of `indices` as one batch on the CPU.

    Asks `get_seeded(indices, seeds)` once, where there is such a method; else indexes the tensors
    of a TensorDataset; else asks `__getitems__` once; else collates samples. Random choices are a
    function of `seed` and of the sample alone (for `__getitems__`: of the samples of its batch):
    the same whichever process makes them, also after a resume.
    """
    wanted = indices.tolist()
    if hasattr(dataset, "get_seeded"):
        return dataset.get_seeded(wanted, [rng.derive(*seed, index) for index in wanted])
    tensors = getattr(dataset, "tensors", None)
    if tensors is not None:
        return tuple(tensor[indices] for tensor in tensors)
    with rng.forked(rng.derive(*seed, *wanted)):
        if hasattr(dataset, "__getitems__"):
            batch = dataset.__getitems__(wanted)
            return default_collate(batch) if isinstance(batch, list) else batch
        samples = []
        for index in wanted:
            rng.seed_all(rng.derive(*seed, index))
            samples.append(dataset[index])
        return default_collate(samples)


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


class Feed(Generic[T]):
    """Items in order, and whether the next ones are there yet.

    With `workers`, so many processes make the items ahead, and a thread takes them from there.
    They ignore signals that mean to stop; the kernel ends them with the thread that began them.

    Args:
        make: makes a batch, or several, of a key; it is copied into the workers.
        keys: of the items, in order.
        device: where the item's tensors are put when it is asked for.
        workers: processes; 0: the item is made where and when it is asked for.
    """

    def __init__(
        self, make: Callable[[Any], T], keys: Iterator[Any], *, device: torch.device, workers: int
    ) -> None:
        self._device = device
        self._items: Iterator[T] = map(make, keys)
        self._queue: queue.SimpleQueue[T | BaseException] | None = None
        self._is_over = False
        if not workers:
            return
        loader = DataLoader(
            _Made(make),
            sampler=keys,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # not the global one, of which checkpoints know
        )
        self._items = iter(loader)
        self._queue = queue.SimpleQueue()
        self._wanted = threading.Semaphore(_AHEAD)
        threading.Thread(target=self._take, name="data", daemon=True).start()

    def _take(self) -> None:
        assert self._queue is not None  # noqa: S101 (for the type checker)
        try:
            while self._wanted.acquire():
                self._queue.put(next(self._items))
        except BaseException as error:  # the end among them; raised where the item is asked for
            self._queue.put(error)
            self._is_over = True

    def has(self, count: int) -> bool:
        """Return whether the next `count` items are there, or the end."""
        return self._queue is None or self._queue.qsize() >= count or self._is_over

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._queue is None:
            return _placed(next(self._items), self._device)
        item = self._queue.get()
        self._wanted.release()
        if isinstance(item, BaseException):
            raise item
        return _placed(item, self._device)


def _placed(item: T, device: torch.device) -> T:
    placed: T = to_device(item, device)
    return placed


class _Made(torch.utils.data.Dataset[Any]):
    """A dataset of what is made of keys."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, key: Any) -> Any:
        return self._make(key)


def _as_it_is(item: T) -> T:
    return item


def _begin_worker(number: int) -> None:
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    processes.die_with_parent()


@dataclass(frozen=True)
class TrainStream:
    """Endless training batches of one rank, in an order that does not depend on the ranks."""

    dataset: Any
    world: World
    seed: int
    global_batch_size: int
    accumulate: int = 1
    workers: int = 0

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

    def batches(self, cursor: Cursor) -> "Feed[tuple[list[Batch], Cursor]]":
        """Return (this rank's microbatches of a global batch, cursor after it) from `cursor` on."""
        everything = order.global_batches(
            cursor,
            seed=self.seed,
            size=len(self.dataset),
            global_batch_size=self.global_batch_size,
        )
        share = partial(
            order.share,
            rank=self.world.rank,
            world_size=self.world.size,
            accumulate=self.accumulate,
        )
        return Feed(
            partial(_microbatches, self.dataset, self.seed),
            ((share(indices), after) for indices, after in everything),
            device=self.world.device,
            workers=self.workers,
        )


def _microbatches(
    dataset: Any, seed: int, key: tuple[list[Tensor], Cursor]
) -> tuple[list[Batch], Cursor]:
    pieces, after = key
    epoch = after["epoch"] - (after["batch"] == 0)
    return [fetch(dataset, piece, "train", seed, epoch) for piece in pieces], after


@dataclass(frozen=True)
class EvalStream:
    """Every evaluation sample exactly once, over any number of ranks."""

    dataset: Any
    world: World
    batch_size: int
    """Samples per rank and batch."""

    workers: int = 0

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.dataset) // (self.world.size * self.batch_size))

    def one(self) -> Batch:
        """Return a batch of one sample, for a rank that has none of its own left."""
        return to_device(fetch(self.dataset, torch.tensor([0]), "eval"), self.world.device)

    def batches(self) -> "Feed[Batch | None]":
        """Return this rank's batches; None where other ranks still have one and this has not.

        Every rank gets equally many, so ranks can agree on something after each batch.
        """
        size, world = len(self.dataset), self.world
        mine = torch.arange(size)[world.rank :: world.size]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return Feed(
            partial(_eval_batch, self.dataset),
            (mine[start : start + self.batch_size] for start in starts),
            device=world.device,
            workers=self.workers,
        )


def _eval_batch(dataset: Any, indices: Tensor) -> Batch | None:
    return fetch(dataset, indices, "eval") if len(indices) else None
