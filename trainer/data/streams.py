"""Training data that can only be read from its beginning: every rank reads all of it.

Each rank takes its own rows of each global batch, so the order does not depend on the number of
ranks. The last, incomplete batch of an epoch is dropped: one batch is read ahead to know of it.
"""

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.cluster.world import World
from trainer.core import rng
from trainer.core.state import Cursor, State
from trainer.data import damage, position
from trainer.data.source import Feed, Made, begin_worker, collate, with_workers
from trainer.errors import DataError
from trainer.protocols import Batch


def is_stream(dataset: Any) -> bool:
    """Return whether samples can only be had one after the other, again and again."""
    if isinstance(dataset, (IterableDataset, DataLoader)):
        return True
    is_spent = isinstance(dataset, Iterator)  # after one epoch
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__") and not is_spent


@dataclass(frozen=True)
class Streamed:
    """Endless training batches of one rank from a stream, as `source.TrainStream` of a dataset.

    The stream is any iterable: an epoch is what it yields from `iter()` to its end, after
    `set_epoch(epoch)` where there is such a method, with generators that are seeded for each
    global batch. Of a torch DataLoader, which makes batches itself, each is a global batch.

    Where it has `state_dict` and `load_state_dict`, the cursor carries its state after the batch,
    if that is made of tensors and plain values; otherwise, going on reads again what was read.
    """

    dataset: Any
    world: World
    seed: int
    global_batch_size: int
    accumulate: int = 1
    workers: int = 0
    """If not 0, one process reads ahead. A DataLoader has workers of its own instead."""
    skip_damaged: bool = False
    """Go on after a sample that cannot be read; otherwise, stop."""

    @property
    def samples(self) -> None:
        """Nobody knows."""
        return

    @property
    def steps_per_epoch(self) -> None:
        """Nobody knows."""
        return

    def batches(self, cursor: Cursor) -> "Feed[tuple[list[Batch], Cursor]]":
        """Return (this rank's microbatches of a global batch, cursor after it) from `cursor` on."""
        is_loader = isinstance(self.dataset, DataLoader)
        return Feed(
            _Reading(self, cursor),
            repeat(None),
            device=self.world.device,
            workers=0 if is_loader else min(self.workers, 1),
            begin=_begin_reader,
        )

    def first(self) -> list[Batch]:
        """Return this rank's microbatches of the first global batch, fetched here and now."""
        drawn_from = [
            generator
            for owner in (self.dataset, getattr(self.dataset, "sampler", None))
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
        ]
        states = [generator.get_state() for generator in drawn_from]
        found = next(replace(self, workers=0).batches(State().cursor))[0]
        for generator, state in zip(drawn_from, states, strict=True):
            generator.set_state(state)  # the training begins as if nobody had looked
        return found

    def rereads(self, cursor: Cursor) -> str:
        """Return what to say of going on from `cursor`, where it takes its time or is not exact."""
        has_workers = isinstance(self.dataset, DataLoader) and self.dataset.num_workers > 0
        if "source" in cursor and has_workers:
            return (
                "random choices in the DataLoader's own workers are other ones than they were: no "
                "state of theirs is kept"
            )
        if not cursor["batch"] or "source" in cursor:
            return ""
        samples = cursor["batch"] * self.global_batch_size
        return (
            f"the stream gave no state to go on from: {samples:,} samples of epoch "
            f"{cursor['epoch']:,} are read again first"
        )


def _begin_reader(number: int) -> None:
    begin_worker(number)
    # It reads alone. A stream that divides itself by torch's worker info has nothing to divide.
    torch.utils.data._utils.worker._worker_info = None


class _Reading:
    """One reading of a stream: called again and again, it returns the items of a feed."""

    def __init__(self, stream: Streamed, cursor: Cursor) -> None:
        self._stream, self._cursor = stream, cursor
        self._source = stream.dataset
        self._is_batched = (
            isinstance(self._source, DataLoader) and self._source.batch_sampler is not None
        )
        self._made: Iterator[Made] | None = None  # in the process that reads
        self._last_damaged: list[str] = []  # of the epoch's last, incomplete batch

    def __call__(self, _: None) -> Made:
        if self._made is None:
            self._made = self._read()
        return next(self._made)

    def _read(self) -> Iterator[Made]:
        epoch, batch = self._cursor["epoch"], self._cursor["batch"]
        self._open(epoch, batch, self._cursor.get("source"))
        while True:
            current = self._next(epoch, batch)
            if current is None:
                raise self._too_short(epoch, batch)
            while current is not None:
                state = position.of(self._source)
                following = self._next(epoch, batch + 1)
                after: Cursor = {"epoch": epoch, "batch": batch + 1}
                damaged = current.damaged
                if following is None:
                    damaged += self._of_rank_0(self._last_damaged)
                    after = {"epoch": epoch + 1, "batch": 0}
                    # A loader's own generator goes on from epoch to epoch.
                    state = (
                        position.of(self._source) if isinstance(self._source, DataLoader) else None
                    )
                if state is not None:
                    after["source"] = state
                yield Made((current.item, after), damaged)
                current, batch = following, batch + 1
            epoch, batch = epoch + 1, 0
            self._open(epoch, 0, None)

    def _open(self, epoch: int, batch: int, state: Any | None) -> None:
        """Begin an epoch, and go to its batch number `batch`."""
        for part in (self._source, *map(partial(_part, self._source), ("dataset", "sampler"))):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if isinstance(self._source, DataLoader) and self._source.num_workers:
            _shield(self._source)
        has_state = state is not None and hasattr(self._source, "load_state_dict")
        if has_state:
            position.restore(self._source, state)
        with rng.forked(rng.derive("stream", self._stream.seed, epoch)):
            self._rows = with_workers(lambda: iter(self._source))
        # Asked now: an iterator that has ended forgets what it was reading.
        self._may_die = isinstance(self._source, DataLoader) or _has_generator(self._rows)
        self._samples = 0
        if has_state:
            self._samples = batch * self._stream.global_batch_size
            return
        for number in range(batch):
            if self._next(epoch, number, keep=False) is None:
                raise self._too_short(epoch, number)

    def _next(self, epoch: int, batch: int, *, keep: bool = True) -> Made | None:
        """Read a global batch; return this rank's microbatches of it, None at the epoch's end."""
        with rng.forked(rng.derive("stream", self._stream.seed, epoch, batch)):
            return self._take_batch(epoch) if self._is_batched else self._take(epoch, keep)

    def _take(self, epoch: int, keep: bool) -> Made | None:
        stream, damaged = self._stream, list[str]()
        size = stream.global_batch_size // stream.world.size
        own = range(stream.world.rank * size, (stream.world.rank + 1) * size)
        mine = []
        for row in range(stream.global_batch_size):
            try:
                sample = self._sample(epoch, damaged)
            except StopIteration:
                self._last_damaged = damaged
                return None
            self._samples += 1
            if keep and row in own:
                mine.append(sample)
        share = size // stream.accumulate
        pieces = [collate(mine[n : n + share]) for n in range(0, len(mine), share)]
        return Made(pieces, self._of_rank_0(damaged))

    def _of_rank_0(self, damaged: list[str]) -> tuple[str, ...]:
        """Return what rank 0 tells: every rank meets the same."""
        return tuple(damaged) if self._stream.world.rank == 0 else ()

    def _sample(self, epoch: int, damaged: list[str]) -> Any:
        """Return the next sample that can be read. Raises StopIteration at the end."""
        broken: Exception | None = None
        what = f"sample {self._samples:,} of epoch {epoch:,} of the stream"
        for attempt in range(damage.TRIES):
            try:
                return next(self._rows)
            except StopIteration:
                if broken is None or not self._may_die:
                    raise
                raise DataError(
                    f"{what} cannot be read: {damage.reason(broken)}; the stream ended with it, as "
                    "a generator does: catch the error in there, and go on with the next sample"
                ) from broken
            except Exception as error:
                if not damage.is_damage(error):
                    raise
                if not self._stream.skip_damaged:
                    raise damage.refuse(what, error) from error
                if attempt == damage.TRIES - 1:
                    raise damage.too_many(what, error) from error
                damaged.append(f"a sample after {what}: {damage.reason(error)}")
                broken = error
        raise AssertionError  # the last attempt returned or raised

    def _take_batch(self, epoch: int) -> Made | None:
        stream = self._stream
        wanted = stream.global_batch_size
        try:
            batch = next(self._rows)
        except StopIteration:
            return None
        except Exception as error:
            if not damage.is_damage(error):
                raise
            what = f"a sample among those after {self._samples:,} of epoch {epoch:,}"
            raise DataError(
                f"{what} cannot be read: {damage.reason(error)}; the DataLoader makes its batches "
                "itself, so such samples have to be left out there"
            ) from error
        count = _length(batch)
        if count < wanted and self._samples >= wanted and next(self._rows, None) is None:
            return None  # the last one
        if count != wanted:
            raise DataError(
                f"the DataLoader gives batches of {count:,} samples, a global batch has "
                f"{wanted:,}; set trainer.global_batch_size or its batch_size, and drop_last=true "
                "where its workers end at different times"
            )
        self._samples += count
        share = wanted // stream.world.size // stream.accumulate
        first = stream.world.rank * stream.accumulate
        numbers = range(first, first + stream.accumulate)
        return Made([_rows(batch, slice(n * share, (n + 1) * share)) for n in numbers])

    def _too_short(self, epoch: int, batch: int) -> DataError:
        if batch:
            return DataError(
                f"epoch {epoch:,} of the stream ends after {self._samples:,} samples, and this run "
                f"was at batch {self._cursor['batch']:,} of it already; the data has changed"
            )
        return DataError(
            f"epoch {epoch:,} of the stream has {self._samples:,} samples, fewer than one global "
            f"batch of {self._stream.global_batch_size:,}; is its data there, and can it be read "
            "from the beginning again?"
        )


def _has_generator(rows: Any, depth: int = 5) -> bool:
    """Whether an iterator is a generator or reads one: of it, nothing comes after an error."""
    if isinstance(rows, GeneratorType) or depth == 0:
        return isinstance(rows, GeneratorType)
    inner = [*gc.get_referents(rows), *getattr(rows, "__dict__", {}).values()]
    kinds = (Iterator, tuple)  # map holds what it reads in a tuple
    return any(_has_generator(each, depth - 1) for each in inner if isinstance(each, kinds))


def _part(source: Any, name: str) -> Any:
    return getattr(source, name, None) if isinstance(source, DataLoader) else None


def _shield(loader: "DataLoader[Any]") -> None:
    """Have a loader's own workers end with this process, not by signals that mean to stop."""
    if not isinstance(loader.worker_init_fn, _Begin):
        loader.worker_init_fn = _Begin(loader.worker_init_fn)


class _Begin:
    def __init__(self, then: Any | None) -> None:
        self._then = then

    def __call__(self, number: int) -> None:
        begin_worker(number)
        if self._then is not None:
            self._then(number)


def _length(batch: Batch) -> int:
    if isinstance(batch, Mapping):
        return _length(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], (str, bytes)):
        return _length(batch[0])
    return len(batch)


def _rows(batch: Batch, rows: slice) -> Batch:
    """Return some samples of a collated batch."""
    if isinstance(batch, Mapping):
        return {key: _rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], (str, bytes)):
        parts = [_rows(value, rows) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch[rows]
