"""The contract of a store: keys are relative paths with `/`, values are bytes."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from trainer.errors import StoreError

T = TypeVar("T")


class AlreadyExists(StoreError):
    """`write` or `create` found the key taken; nothing was changed."""


class NewFile(Protocol):
    """A key that is being written, part by part. Either `finish` or `abort` has to follow."""

    part_bytes: int
    """Size of every part but the last."""

    def put(self, start: int, data: memoryview) -> None:
        """Write the part that begins at byte `start`, a multiple of `part_bytes`.

        Parts may come in any order, each once, from any thread. Fastest where `data` lies on a
        page boundary.
        """

    def finish(self) -> None:
        """Make the key durable with everything that was put, its name included."""

    def abort(self) -> None:
        """Leave nothing behind. Never raises."""


class Readable(Protocol):
    """What keys are read from.

    Every method may be called from any rank and thread. Failures of the medium raise StoreError;
    a key that does not exist raises FileNotFoundError.
    """

    url: str
    read_bytes: int
    """Size of a piece that is read well at a time."""

    def read(self, key: str) -> bytes:
        """Return all bytes of `key`."""

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Fill `buffer` from byte `start` of `key`; return how many bytes there were.

        Fastest in pieces of some MiB from several threads, with `start`, the buffer's address and
        its length on page boundaries. `is_shared` says that other processes of this machine read
        the same bytes at about this time, so that a cache between them pays.
        """

    def size(self, key: str) -> int:
        """Return the bytes of `key`."""


class Store(Readable, Protocol):
    """Where the keys of one run live."""

    def open_new(self, key: str, total_bytes: int) -> NewFile:
        """Begin a new key of exactly `total_bytes`; nobody should read it before `finish`.

        Raises:
            AlreadyExists: the key is taken.
            StoreError: there is not enough space for it, found before anything is written.
        """

    def create(self, key: str, data: bytes) -> None:
        """Create `key` with exactly `data`, atomically and durably, only if it does not exist.

        Raises:
            AlreadyExists: somebody else's bytes are there. Finding one's own is a success.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Set `key` to exactly `data`, atomically and durably."""

    def entries(self, folder: str) -> list[str]:
        """Return the sorted names right below `folder`, those of folders with a `/` at the end.

        Looks no deeper, so that a large tree costs nothing; empty where there is no such folder.
        """

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """Return the sorted keys below the folder `prefix`; empty where there is none.

        `unfinished` asks for those too that are being written, or were given up, where a store
        would not show them by itself.
        """

    def modified_s(self, key: str) -> float:
        """Return when `key` was last written, in seconds since 1970."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys, durably, in this order; a missing one is not an error."""

    def probe(self) -> str:
        """Write and delete a small key, so that a store which refuses writing is found early.

        Returns what a person should know of this store's promises, or nothing.
        """


class Fallback:
    """Reads each key from the first of several stores that has it.

    Args:
        stores: in the order in which they are asked; at least one.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        self.url = stores[0].url
        self.read_bytes = max(store.read_bytes for store in stores)

    def read(self, key: str) -> bytes:
        """Return all bytes of `key`."""
        return self._ask(lambda store: store.read(key))

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Fill `buffer` from byte `start` of `key`; return how many bytes there were."""
        return self._ask(lambda store: store.read_into(key, start, buffer, is_shared=is_shared))

    def size(self, key: str) -> int:
        """Return the bytes of `key`."""
        return self._ask(lambda store: store.size(key))

    def _ask(self, ask: Callable[[Store], T]) -> T:
        for store in self._stores[:-1]:
            with suppress(FileNotFoundError):
                return ask(store)
        return ask(self._stores[-1])
