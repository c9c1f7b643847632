"""Where batches come from: datasets fetched whole, placed on the device, with a cursor."""

import atexit
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from trainer.cluster.world import World
from trainer.core import rng, threads
from trainer.core.nested import map_leaves
from trainer.core.state import Cursor, State
from trainer.data import damage, order
from trainer.errors import DataError, PerdureError, WorkerLostError
from trainer.protocols import Batch

T = TypeVar("T")
_AHEAD = 2
"""Items that are taken from the workers before they are asked for."""
_LEAVING_S = 2.0
"""What workers have for their last item when the process ends."""


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
    is_seeded = hasattr(dataset, "get_seeded")
    if not is_seeded and (tensors := getattr(dataset, "tensors", None)) is not None:
        return tuple([_rows(tensor, indices) for tensor in tensors])
    wanted = indices.tolist()
    if is_seeded:
        return dataset.get_seeded(wanted, [rng.derive(*seed, index) for index in wanted])
    with rng.forked(rng.derive(*seed, *wanted)):
        if hasattr(dataset, "__getitems__"):
            batch = dataset.__getitems__(wanted)
            return default_collate(batch) if isinstance(batch, list) else batch
        samples = []
        for index in wanted:
            rng.seed_all(rng.derive(*seed, index))
            samples.append(dataset[index])
        return default_collate(samples)


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return rows; of pictures on the CPU, `tensor[indices]` takes five times as long."""
    is_here = isinstance(tensor, Tensor) and tensor.is_cpu
    return tensor.index_select(0, indices) if is_here else tensor[indices]


def collate(samples: list[Any]) -> Batch:
    """Return samples as one batch, as torch's default_collate makes it.

    Raises:
        DataError: their shapes or types do not allow it.
    """
    try:
        return default_collate(samples)
    except Exception as error:
        if unlike := damage.unlike(len(samples), error):
            raise unlike from error
        raise


class Made(NamedTuple):
    """An item as it comes from where it was made."""

    item: Any
    damaged: tuple[str, ...] = ()
    """A text for each sample in it that could not be read."""


def fetch_whole(
    dataset: Any, indices: Tensor, *seed: int | str, skip: bool, replace: bool
) -> tuple[Batch | None, tuple[str, ...]]:
    """As `fetch`, but samples that cannot be read are refused by name, or skipped.

    Returns the batch, None if nothing is left of it, and a text for each damaged sample.

    Args:
        dataset: the samples.
        indices: which ones.
        seed: as for `fetch`.
        skip: go on without the damaged ones; otherwise the first is a DataError.
        replace: with `skip`, take the next sample instead; otherwise the batch becomes smaller.
    """
    try:
        return fetch(dataset, indices, *seed), ()
    except Exception as error:
        if not damage.is_damage(error):
            raise

    def read(index: int) -> object:
        return fetch(dataset, torch.tensor([index]), *seed)

    chosen, texts = damage.whole(dataset, indices.tolist(), read, skip=skip, replace=replace)
    if not chosen:
        return None, texts
    try:
        return fetch(dataset, torch.tensor(chosen), *seed), texts
    except Exception as error:  # each of them can be read
        if unlike := damage.unlike(len(chosen), error):
            raise unlike from error
        raise


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` with every tensor on `device`; tuples, lists and dicts keep their form."""
    if device.type == "cpu":
        return batch  # where it was made

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or device.type != "cuda":
            return value.to(device) if isinstance(value, Tensor) else value
        return value.pin_memory().to(device, non_blocking=True)

    return map_leaves(move, batch)


class Feed(Generic[T]):
    """Items in order, and whether the next ones are there yet.

    With `workers`, so many processes make the items ahead, and a thread takes them from there.
    They ignore signals that mean to stop; the kernel ends them with the thread that began them.

    Args:
        make: makes a batch, or several, of a key; it is copied into the workers.
        keys: of the items, in order; without tensors, which a process of ours would have to serve
            to the workers.
        device: where the item's tensors are put when it is asked for.
        workers: processes; 0: the item is made where and when it is asked for.
    """

    def __init__(
        self,
        make: Callable[[Any], Made],
        keys: Iterator[Any],
        *,
        device: torch.device,
        workers: int,
        begin: Callable[[int], None] | None = None,
    ) -> None:
        self._device = device
        self.damaged: list[str] = []
        """A text for each sample that could not be read, of the items that were handed out."""
        self.starved_s = 0.0
        """Seconds in which an item was asked for that was not there yet."""
        self._starved_since: float | None = None
        self._items: Iterator[Made] = map(make, keys)
        self._ahead: _Ahead | None = None
        if not workers:
            return
        loader = DataLoader(
            _OfKeys(make),
            sampler=keys,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin or begin_worker,
            generator=torch.Generator(),  # not the global one, of which checkpoints know
        )
        self._ahead = _Ahead(loader)
        weakref.finalize(self, self._ahead.leave)

    def has(self, count: int) -> bool:
        """Return whether the next `count` items are there, or the end."""
        ahead = self._ahead
        has = ahead is None or ahead.queue.qsize() >= count or ahead.is_over
        if count == 1 and (not has or self._starved_since is not None):
            self._starve(has)
        return has

    def _starve(self, has: bool) -> None:
        now = time.monotonic()
        if self._starved_since is not None:
            self.starved_s += now - self._starved_since
        self._starved_since = None if has else now

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        made = next(self._items) if self._ahead is None else self._ahead.take()
        self.damaged += made.damaged
        item: T = to_device(made.item, self._device)
        return item

    def take_damaged(self) -> list[str]:
        """Return the texts that came since the last call."""
        taken, self.damaged = self.damaged, []
        return taken


class _Ahead:
    """A thread that takes items from worker processes before they are asked for.

    It knows nothing of the feed, so that it ends with it.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._items = with_workers(lambda: iter(loader))
        self._wanted = threading.Semaphore(_AHEAD)
        self._is_left = False
        self.queue: queue.SimpleQueue[Made | BaseException] = queue.SimpleQueue()
        self.is_over = False
        _living.add(self)
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._wanted.acquire() and not self._is_left:
                made = self._next()
                if isinstance(made, PerdureError):
                    raise made
                self.queue.put(made)
        except BaseException as error:  # the end among them; raised where the item is asked for
            self.queue.put(error)
            self.is_over = True
        del self._items  # and with it go the workers

    def _next(self) -> Any:
        try:
            return next(self._items)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # of memory that a worker shared, and died before it was taken
            raise WorkerLostError(
                f"a worker of trainer.data_workers was lost: {type(error).__name__}: {error}"
            ) from None

    def take(self) -> Made:
        """Return the next item, or raise what came instead."""
        made = self.queue.get()
        self._wanted.release()
        if isinstance(made, BaseException):
            raise made
        return made

    def leave(self) -> None:
        """Let thread and workers end when they have done what they are at."""
        self._is_left = True
        self._wanted.release()

    def end(self) -> None:
        """As `leave`, and wait a while for the thread."""
        self.leave()
        self._thread.join(_LEAVING_S)


_living: "weakref.WeakSet[_Ahead]" = weakref.WeakSet()
_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def with_workers(begin: Callable[[], T]) -> T:
    """Call what begins worker processes, and have them ended when this process ends.

    They ignore SIGTERM, with which Python would try to end them, to wait for them then for ever.
    A worker that is gone is noticed by who waits for its item, within five seconds: torch's handler
    of SIGCHLD would raise between any two lines of the training, and get lost in some of them.
    """
    others, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    begun = begin()
    if signal.getsignal(signal.SIGCHLD) is not handler:  # it was set, hence on the main thread
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    atexit.unregister(_end_all)
    atexit.register(_end_all)  # the last one is called first: before that of multiprocessing
    _workers.update(child for child in active_children() if child not in others)
    return begun


def _end_all() -> None:
    for ahead in list(_living):
        ahead.end()
    for worker in list(_workers):
        with suppress(ValueError):  # it was closed
            worker.kill()


def lost_worker(error: BaseException) -> WorkerLostError | None:
    """Return who is gone, if `error` is what torch says of a worker that was killed."""
    if isinstance(error, WorkerLostError):
        return error
    if not damage.is_lost_worker(error):
        return None
    text = str(error).partition("\n")[0].strip().rstrip(".")
    return WorkerLostError(
        f"{text}. If it was killed for want of memory, lower trainer.data_workers or the number of "
        "ranks on a node"
    )


class _OfKeys(torch.utils.data.Dataset[Any]):
    """A dataset of what is made of keys; an error that a person can act on is an item, too."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._make(key)
        except PerdureError as error:  # torch would wrap it in a traceback
            return error


def _as_it_is(item: T) -> T:
    return item


def begin_worker(number: int) -> None:
    """Begin a process that fetches data: it ends with its parent, not by the parent's signals."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threads.die_with_parent()


@dataclass(frozen=True)
class TrainStream:
    """Endless training batches of one rank, in an order that does not depend on the ranks."""

    dataset: Any
    world: World
    seed: int
    global_batch_size: int
    accumulate: int = 1
    workers: int = 0
    skip_damaged: bool = False
    """Take the next sample for one that cannot be read; otherwise, stop."""

    def __post_init__(self) -> None:
        if len(self.dataset) < self.global_batch_size:
            raise DataError(
                f"the training data has {len(self.dataset):,} samples, fewer than one global batch "
                f"of {self.global_batch_size:,}; lower trainer.global_batch_size"
            )

    @property
    def samples(self) -> int:
        """How many there are; another number of them has another order."""
        return len(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the last, incomplete one is dropped."""
        return self.samples // self.global_batch_size

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
            partial(_microbatches, self.dataset, self.seed, self.skip_damaged),
            (([piece.numpy() for piece in share(indices)], after) for indices, after in everything),
            device=self.world.device,
            workers=self.workers,
        )

    def first(self) -> list[Batch]:
        """Return this rank's microbatches of the first global batch, fetched here and now."""
        return next(replace(self, workers=0).batches(State().cursor))[0]

    def rereads(self, cursor: Cursor) -> str:
        """Return what to say of going on from `cursor`: nothing, it is done at once."""
        return ""


def _microbatches(
    dataset: Any, seed: int, skip: bool, key: tuple[list["np.ndarray[Any, Any]"], Cursor]
) -> Made:
    pieces, after = key
    epoch = after["epoch"] - (after["batch"] == 0)
    batches: list[Batch | None] = []
    damaged: tuple[str, ...] = ()
    for piece in pieces:
        chosen = torch.from_numpy(piece)
        batch, texts = fetch_whole(dataset, chosen, "train", seed, epoch, skip=skip, replace=True)
        batches.append(batch)
        damaged += texts
    return Made((batches, after), damaged)


@dataclass(frozen=True)
class EvalStream:
    """Every evaluation sample exactly once, over any number of ranks."""

    dataset: Any
    world: World
    batch_size: int
    """Samples per rank and batch."""

    workers: int = 0
    skip_damaged: bool = False
    """Leave out samples that cannot be read; otherwise, stop."""

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.dataset) // (self.world.size * self.batch_size))

    def one(self) -> Batch:
        """Return a batch of one sample, for a rank that has none of its own left."""
        first = torch.tensor([0])
        skip = self.skip_damaged
        batch, _ = fetch_whole(self.dataset, first, "eval", skip=skip, replace=True)
        return to_device(batch, self.world.device)

    def batches(self) -> "Feed[Batch | None]":
        """Return this rank's batches; None where other ranks still have one and this has not.

        Every rank gets equally many, so ranks can agree on something after each batch.
        """
        size, world = len(self.dataset), self.world
        mine = np.arange(size)[world.rank :: world.size]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        return Feed(
            partial(_eval_batch, self.dataset, self.skip_damaged),
            (mine[start : start + self.batch_size] for start in starts),
            device=world.device,
            workers=self.workers,
        )


def _eval_batch(dataset: Any, skip: bool, key: "np.ndarray[Any, Any]") -> Made:
    if not len(key):
        return Made(None)
    return Made(*fetch_whole(dataset, torch.from_numpy(key), "eval", skip=skip, replace=False))
