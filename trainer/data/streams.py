"""Streams: training data that is read sequentially, completely by every rank.

Each rank takes its rows of each global batch, so the order does not depend on the number of ranks.
The last, incomplete batch of an epoch is dropped; one batch is read ahead to detect it.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.core import rng
from trainer.core.state import Cursor, State
from trainer.data import damage, position
from trainer.data.batches import collate
from trainer.data.feed import Feed, Item
from trainer.data.source import TrainBatches
from trainer.data.workers import begin_worker, receive, start_workers
from trainer.errors import DataError
from trainer.protocols import Batch


def is_stream(dataset: Any) -> bool:
    """Return whether a dataset is a restartable stream: iterable, but without random access."""
    if isinstance(dataset, (IterableDataset, DataLoader)):
        return True
    if hasattr(dataset, "__getitem__") or not hasattr(dataset, "__iter__"):
        return False
    return iter(dataset) is not iter(dataset)  # the same iterator again ends after one epoch


@dataclass(frozen=True)
class Streamed(TrainBatches):
    """Endless training batches of one rank from a stream.

    The stream is any iterable. An epoch is one pass from `iter()` to the end, after
    `set_epoch(epoch)` if that method exists, with generators seeded per global batch. A torch
    DataLoader builds batches itself; each of them is a global batch.

    With `state_dict` and `load_state_dict`, the cursor has the stream's state after the batch, if
    it consists of tensors and plain values. Otherwise a resume reads the epoch again.

    `workers`: with any positive number, one process reads ahead. A DataLoader uses its own workers.
    """

    @property
    def samples(self) -> None:
        """Unknown for a stream."""
        return

    @property
    def steps_per_epoch(self) -> None:
        """Unknown for a stream."""
        return

    def batches(
        self, cursor: Cursor, limit: int | None = None
    ) -> "Feed[tuple[list[Batch], Cursor]]":
        """Return (this rank's microbatches of a global batch, cursor after it), from `cursor`."""
        is_loader = isinstance(self.dataset, DataLoader)
        return Feed(
            _StreamReader(self, cursor),
            islice(repeat(None), limit),
            device=self.world.device,
            workers=0 if is_loader else min(self.workers, 1),
            begin=begin_reader,
        )

    def first(self) -> list[Batch]:
        """Return this rank's microbatches of the first global batch, read as training reads it."""
        generators = [
            generator
            for owner in (self.dataset, getattr(self.dataset, "sampler", None))
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
        ]
        states = [generator.get_state() for generator in generators]
        microbatches = next(self.batches(State().cursor, 1))[0]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)  # training starts from the same state
        return microbatches

    def rereads(self, cursor: Cursor) -> str:
        """Return a message if resuming from `cursor` is slow or inexact, else an empty string."""
        has_workers = isinstance(self.dataset, DataLoader) and self.dataset.num_workers > 0
        if "source" in cursor and has_workers:
            return (
                "random choices in the DataLoader's own workers are not restored: their state is "
                "not stored"
            )
        if not cursor["batch"] or "source" in cursor:
            return ""
        samples = cursor["batch"] * self.global_batch_size
        return (
            f"the stream has no stored state to resume from: {samples:,} samples of epoch "
            f"{cursor['epoch']:,} are read again first"
        )


def begin_reader(number: int) -> None:
    """Set up the worker that reads a stream."""
    begin_worker(number)
    # A single reader: streams that divide themselves by torch's worker info must not.
    torch.utils.data._utils.worker._worker_info = None


class _StreamReader:
    """Reads a stream from a cursor; each call returns the next item of a feed."""

    def __init__(self, stream: Streamed, cursor: Cursor) -> None:
        self._stream, self._cursor = stream, cursor
        self._source = stream.dataset
        self._is_batched = (
            isinstance(self._source, DataLoader) and self._source.batch_sampler is not None
        )
        self._items: Iterator[Item] | None = None  # in the reading process
        self._last_damaged: list[str] = []  # in the epoch's last, incomplete batch

    def __call__(self, _: None) -> Item:
        if self._items is None:
            # Without a cycle: torch leaves a loader's workers running if its iterator is collected
            # as part of one.
            proxy: Any = weakref.proxy(self)
            self._items = _StreamReader._read(proxy)
        return next(self._items)

    def _read(self) -> Iterator[Item]:
        epoch, batch = self._cursor["epoch"], self._cursor["batch"]
        self._open(epoch, batch, self._cursor.get("source"))
        while True:
            current = self._next(epoch, batch)
            if current is None:
                raise self._too_short(epoch, batch)
            while current is not None:
                state = position.capture(self._source)
                following = self._next(epoch, batch + 1)
                after: Cursor = {"epoch": epoch, "batch": batch + 1}
                damaged = current.damaged
                if following is None:
                    damaged += self._reported(self._last_damaged)
                    after = {"epoch": epoch + 1, "batch": 0}
                    # A loader's generator continues from epoch to epoch.
                    is_loader = isinstance(self._source, DataLoader)
                    state = position.capture(self._source) if is_loader else None
                if state is not None:
                    after["source"] = state
                yield Item((current.value, after), damaged)
                current, batch = following, batch + 1
            epoch, batch = epoch + 1, 0
            self._open(epoch, 0, None)

    def _open(self, epoch: int, batch: int, state: Any | None) -> None:
        """Start an epoch and skip to its batch number `batch`."""
        for part in (self._source, *map(partial(_part, self._source), ("dataset", "sampler"))):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if isinstance(self._source, DataLoader) and self._source.num_workers:
            _shield(self._source)
        has_state = state is not None and hasattr(self._source, "load_state_dict")
        if has_state:
            position.restore(self._source, state)
        with rng.forked(rng.derive("stream", self._stream.seed, epoch)):
            self._rows = start_workers(lambda: iter(self._source))
        self._samples = 0
        if has_state:
            self._samples = batch * self._stream.global_batch_size
            return
        for number in range(batch):
            if self._next(epoch, number, is_used=False) is None:
                raise self._too_short(epoch, number)

    def _next(self, epoch: int, batch: int, *, is_used: bool = True) -> Item | None:
        """Read a global batch; return this rank's microbatches, or None at the epoch's end."""
        with rng.forked(rng.derive("stream", self._stream.seed, epoch, batch)):
            if self._is_batched:
                return self._read_batch(epoch)
            return self._read_samples(epoch, is_used)

    def _read_samples(self, epoch: int, is_used: bool) -> Item | None:
        stream, damaged = self._stream, list[str]()
        size = stream.global_batch_size // stream.world.size
        rank_rows = range(stream.world.rank * size, (stream.world.rank + 1) * size)
        samples = []
        for row in range(stream.global_batch_size):
            try:
                sample = self._sample(epoch, damaged)
            except StopIteration:
                self._last_damaged = damaged
                return None
            self._samples += 1
            if is_used and row in rank_rows:
                samples.append(sample)
        size //= stream.accumulate
        microbatches = [collate(samples[n : n + size]) for n in range(0, len(samples), size)]
        return Item(microbatches, self._reported(damaged))

    def _reported(self, damaged: list[str]) -> tuple[str, ...]:
        """Return the damage to report: all of it on rank 0, since every rank reads it."""
        return tuple(damaged) if self._stream.world.rank == 0 else ()

    def _sample(self, epoch: int, damaged: list[str]) -> Any:
        """Return the next readable sample. Raises StopIteration at the end."""
        broken: Exception | None = None
        name = f"sample {self._samples:,} of epoch {epoch:,} of the stream"
        for attempt in range(damage.TRIES):
            try:
                return receive(self._rows)
            except StopIteration:
                if broken is None:
                    raise
                raise DataError(
                    f"{name} cannot be read: {damage.reason(broken)}; the stream ended with "
                    "this error, as generators do: catch it inside and yield the next sample"
                ) from broken
            except Exception as error:
                if not damage.is_damage(error):
                    raise
                if not self._stream.skip_damaged:
                    raise damage.unreadable(name, error) from error
                if attempt == damage.TRIES - 1:
                    raise damage.too_many(name, error) from error
                damaged.append(f"a sample after {name}: {damage.reason(error)}")
                broken = error
        raise AssertionError  # the last attempt returned or raised

    def _read_batch(self, epoch: int) -> Item | None:
        stream = self._stream
        size = stream.global_batch_size
        try:
            batch = receive(self._rows)
        except StopIteration:
            return None
        except Exception as error:
            if not damage.is_damage(error):
                raise
            raise DataError(
                f"a sample after number {self._samples:,} of epoch {epoch:,} cannot be read: "
                f"{damage.reason(error)}; the DataLoader builds batches itself, so leave "
                "unreadable samples out in its dataset"
            ) from error
        count = _length(batch)
        if count < size and self._samples >= size and next(self._rows, None) is None:
            return None  # the last, incomplete batch
        if count != size:
            raise DataError(
                f"the DataLoader returned a batch of {count:,} samples, but a global batch has "
                f"{size:,}, which every rank reads completely; set trainer.global_batch_size or "
                "its batch_size, remove a DistributedSampler, and use drop_last=true if its "
                "workers end at different times"
            )
        self._samples += count
        size = size // stream.world.size // stream.accumulate
        first = stream.world.rank * stream.accumulate
        numbers = range(first, first + stream.accumulate)
        return Item([_rows(batch, slice(n * size, (n + 1) * size)) for n in numbers])

    def _too_short(self, epoch: int, batch: int) -> DataError:
        if batch:
            return DataError(
                f"epoch {epoch:,} of the stream ends after {self._samples:,} samples, before batch "
                f"{self._cursor['batch']:,} from which this run resumes: the data has changed. "
                "Restore it, or start a new run with name=…"
            )
        return DataError(
            f"epoch {epoch:,} of the stream has {self._samples:,} samples, fewer than one global "
            f"batch of {self._stream.global_batch_size:,}; check that its files exist and that "
            "iter() starts over"
        )


def _part(source: Any, name: str) -> Any:
    return getattr(source, name, None) if isinstance(source, DataLoader) else None


def _shield(loader: "DataLoader[Any]") -> None:
    """Make a loader's workers ignore stop signals and exit with this process."""
    if not isinstance(loader.worker_init_fn, _WorkerInit):
        loader.worker_init_fn = _WorkerInit(loader.worker_init_fn)


class _WorkerInit:
    def __init__(self, user_init: Any | None) -> None:
        self._user_init = user_init

    def __call__(self, number: int) -> None:
        begin_worker(number)
        if self._user_init is not None:
            self._user_init(number)


def _length(batch: Batch) -> int:
    if isinstance(batch, Mapping):
        return _length(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], (str, bytes)):
        return _length(batch[0])
    return len(batch)


def _rows(batch: Batch, rows: slice) -> Batch:
    """Return rows of a collated batch."""
    if isinstance(batch, Mapping):
        return {key: _rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], (str, bytes)):
        parts = [_rows(value, rows) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch[rows]
