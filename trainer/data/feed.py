"""Items made in order, in this process or ahead of time by worker processes."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

from trainer.data.batches import to_device
from trainer.data.workers import begin_worker, receive, register_shutdown, start_workers
from trainer.errors import PerdureError, WorkerLostError

T = TypeVar("T")
_PREFETCH = 2
"""Items requested from the workers before they are needed."""
_CLOSE_S = 2.0
"""Time allowed for the workers' current item when the process exits, in seconds."""


class Item(NamedTuple):
    """An item and the damage met while making it."""

    value: Any
    damaged: tuple[str, ...] = ()
    """Texts, one per sample that could not be read."""
    samples: int = 0
    """Samples in the value, if it is an evaluation batch."""


class Feed(Generic[T]):
    """Iterator over items in order; reports whether the next ones are ready.

    With `workers`, that many processes make items ahead of time and a thread collects them. They
    ignore stop signals; the kernel kills them when the thread that started them exits.

    Args:
        make: makes the item of a key; copied into the workers.
        keys: keys of the items, in order; no tensors, which would need a process to share them.
        device: destination of the item's tensors, which move when the item is requested.
        workers: number of processes; 0: each item is made here when it is requested.
        begin: initialises a worker process; default: `begin_worker`.
    """

    def __init__(
        self,
        make: Callable[[Any], Item],
        keys: Iterator[Any],
        *,
        device: torch.device,
        workers: int,
        begin: Callable[[int], None] = begin_worker,
    ) -> None:
        self._device = device
        self.damaged: list[str] = []
        """Texts, one per unreadable sample in the items returned so far."""
        self.samples = 0
        """Samples in the newest item, if it is an evaluation batch."""
        self.starved_s = 0.0
        """Total time in which a requested item was not ready, in seconds."""
        self._starved_since_s: float | None = None
        self._items: Iterator[Item] = map(make, keys)
        self._prefetcher: _Prefetcher | None = None
        if not workers:
            return
        loader = DataLoader(
            _KeyedDataset(make),
            sampler=keys,
            batch_size=None,
            collate_fn=_identity,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin,
            generator=torch.Generator(),  # the global one is part of checkpoints
        )
        self._prefetcher = _Prefetcher(loader)
        weakref.finalize(self, self._prefetcher.stop)

    def has(self, count: int) -> bool:
        """Return whether the next `count` items, or the end, are ready."""
        prefetcher = self._prefetcher
        is_ready = (
            prefetcher is None or prefetcher.queue.qsize() >= count or prefetcher.is_exhausted
        )
        if count == 1 and (not is_ready or self._starved_since_s is not None):
            self._record_starvation(is_ready)
        return is_ready

    def _record_starvation(self, is_ready: bool) -> None:
        now_s = time.monotonic()
        if self._starved_since_s is not None:
            self.starved_s += now_s - self._starved_since_s
        self._starved_since_s = None if is_ready else now_s

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = next(self._items) if self._prefetcher is None else self._prefetcher.get()
        self.damaged += item.damaged
        self.samples = item.samples
        value: T = to_device(item.value, self._device)
        return value

    def take_damaged(self) -> list[str]:
        """Return the damage texts since the last call, and clear them."""
        texts, self.damaged = self.damaged, []
        return texts


class _Prefetcher:
    """Thread that collects items from worker processes before they are requested.

    It holds no reference to the feed, so that it stops when the feed is garbage-collected.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._items = start_workers(lambda: iter(loader))
        self._requests = threading.Semaphore(_PREFETCH)
        self._is_stopped = False
        self.queue: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self.is_exhausted = False
        _prefetchers.add(self)
        register_shutdown(_close_all)
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._requests.acquire() and not self._is_stopped:
                item = self._next()
                if isinstance(item, PerdureError):
                    raise item
                self.queue.put(item)
        except BaseException as error:  # StopIteration too; `get` raises it
            self.queue.put(error)
            self.is_exhausted = True
        del self._items  # shuts the workers down

    def _next(self) -> Any:
        try:
            return receive(self._items)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # The worker exited before its shared memory was mapped here.
            raise WorkerLostError(
                f"a worker of trainer.data_workers was lost: {type(error).__name__}: {error}"
            ) from None

    def get(self) -> Item:
        """Return the next item, or raise the error that ended the items."""
        item = self.queue.get()
        self._requests.release()
        if isinstance(item, BaseException):
            try:
                raise item
            finally:
                del item  # no reference cycle with the workers, see `_StreamReader`
        return item

    def stop(self) -> None:
        """Ask the thread and the workers to exit after their current item."""
        self._is_stopped = True
        self._requests.release()

    def close(self) -> None:
        """Stop, and wait up to `_CLOSE_S` for the thread."""
        self.stop()
        self._thread.join(_CLOSE_S)


_prefetchers: "weakref.WeakSet[_Prefetcher]" = weakref.WeakSet()


def _close_all() -> None:
    for prefetcher in list(_prefetchers):
        prefetcher.close()


class _KeyedDataset(torch.utils.data.Dataset[Any]):
    """Dataset of the items of keys; returns Perdure's errors as items, without torch's wrapping."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._make(key)
        except PerdureError as error:
            return error


def _identity(value: T) -> T:
    return value
