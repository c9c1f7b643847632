"""The contract of a store: keys are relative paths with `/`, values are bytes."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from trainer.errors import StoreError

T = TypeVar("T")


class AlreadyExists(StoreError):
    """The key exists with other content; nothing was changed."""


class NewFile(Protocol):
    """A key that is being written part by part; end it with `finish` or `abort`."""

    part_bytes: int
    """Size of every part but the last."""

    def put(self, start: int, data: memoryview) -> None:
        """Write the part that begins at byte `start`, a multiple of `part_bytes`.

        Parts may come in any order, each once, from any thread. Fastest if `data` starts on a
        page boundary.
        """

    def finish(self) -> None:
        """Make the key durable, with its name and all parts."""

    def abort(self) -> None:
        """Discard the parts. Never raises."""


class Readable(Protocol):
    """Read access to keys.

    Every method may be called from any rank and thread. Failures of the disk or server raise
    StoreError, or StoreRefusedError if they would come again; a missing key raises
    FileNotFoundError.
    """

    url: str
    read_bytes: int
    """Efficient read size."""

    def read(self, key: str) -> bytes:
        """Return all bytes of `key`."""

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Fill `buffer` from byte `start` of `key`; return the number of bytes read.

        Fastest in pieces of some MiB from several threads, with `start`, the buffer's address and
        its length on page boundaries. With `is_shared`, other processes of this machine read
        the same bytes at about this time, so the page cache is used.
        """

    def size(self, key: str) -> int:
        """Return the bytes of `key`."""


class Store(Readable, Protocol):
    """Read and write access to the keys of one run."""

    def open_new(self, key: str, total_bytes: int) -> NewFile:
        """Start a new key of exactly `total_bytes`; do not read it before `finish`.

        Raises:
            AlreadyExists: the key exists.
            StoreError: not enough space, detected before anything is written.
        """

    def create(self, key: str, data: bytes) -> None:
        """Create `key` with exactly `data`, atomically and durably, only if it does not exist.

        Raises:
            AlreadyExists: the key has other bytes. The same bytes are a success.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Set `key` to exactly `data`, atomically and durably."""

    def entries(self, folder: str) -> list[str]:
        """Return the sorted names directly in `folder`; names of folders end with `/`.

        Not recursive, so that a large tree costs nothing; empty for a missing folder.
        """

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """Return the sorted keys below the folder `prefix`; empty for a missing folder.

        `unfinished` includes keys that are being written or were abandoned, in stores that do not
        list them otherwise.
        """

    def modified_s(self, key: str) -> float:
        """Return when `key` was last written, in seconds since 1970."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete keys, durably, in this order; a missing one is not an error."""

    def probe(self) -> str:
        """Write as a save does, and delete it, to detect a store that rejects writes early.

        Returns a warning about guarantees that this store does not give, or an empty text.
        """


def has_size(store: Readable, key: str, size_bytes: int) -> bool:
    """Return whether `key` exists with this size."""
    with suppress(FileNotFoundError):
        return store.size(key) == size_bytes
    return False


class Fallback:
    """Reads each key from the first of several stores that has it.

    Args:
        stores: in reading order; at least one.
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
        """Fill `buffer` from byte `start` of `key`; return the number of bytes read."""
        return self._ask(lambda store: store.read_into(key, start, buffer, is_shared=is_shared))

    def size(self, key: str) -> int:
        """Return the bytes of `key`."""
        return self._ask(lambda store: store.size(key))

    def _ask(self, ask: Callable[[Store], T]) -> T:
        for store in self._stores[:-1]:
            with suppress(FileNotFoundError):
                return ask(store)
        return ask(self._stores[-1])
