"""The contract of a store: keys are relative paths with `/`, values are bytes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from trainer.errors import StoreError

T = TypeVar("T")


class AlreadyExists(StoreError):
    """The key exists with other content; nothing was changed."""


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

    part_bytes: int
    """Efficient size of a part."""

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Create a new key from `parts`, in order. Durable on return.

        A part is taken when there is room for it, from any thread but one at a time. No reference
        to it is kept once it is written, so that its memory can be used again. If this raises,
        also an error of `parts`, nothing is left under the key. Fastest if the memory of each
        part, and its position, are on a page boundary.

        Args:
            key: the new key.
            total_bytes: size of all parts together.
            parts: of any size, best `part_bytes`.

        Raises:
            AlreadyExists: the key exists; no part was taken.
            StoreError: not enough space, detected before a part is taken; or the disk or server
                failed.
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


def positioned(parts: Iterable[memoryview], total_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Yield each part with the position of its first byte; their sizes must add up."""
    position = 0
    for part in parts:
        yield position, part
        position += len(part)
        del part
    if position != total_bytes:
        raise ValueError(f"{position:,} bytes were given instead of {total_bytes:,}")


def in_pieces(data: bytes | memoryview, part_bytes: int) -> Iterator[memoryview]:
    """Yield the data in parts of `part_bytes`."""
    view = memoryview(data)
    for start in range(0, len(view), part_bytes):
        yield view[start : start + part_bytes]


def recut(parts: Iterable[memoryview], part_bytes: int) -> Iterator[memoryview]:
    """Yield the same bytes in parts of exactly `part_bytes`, but for the last.

    A part that has this size already is passed on; others are copied.
    """
    rest = bytearray()
    for part in parts:
        if not rest and len(part) == part_bytes:
            yield part
            continue
        rest += part
        del part
        while len(rest) >= part_bytes:
            yield memoryview(bytes(rest[:part_bytes]))
            del rest[:part_bytes]
    if rest:
        yield memoryview(bytes(rest))


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
