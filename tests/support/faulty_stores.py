"""A real directory whose calls can fail, hang or be cut short on request."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import StoreError
from trainer.storage import LocalStore, Store
from trainer.storage.store import in_pieces


def put(store: Store, key: str, data: bytes) -> None:
    """Write a new key as a shard is written: part by part."""
    store.write(key, len(data), in_pieces(data, store.part_bytes))


class FaultyStore(LocalStore):
    """A directory that fails at the n-th call, those of files being written included.

    Args:
        root: the directory.
        fail_at: number of the call that fails, from 1; 0 never.
        how: `before` the call does anything, `after` it has done all, or `torn`: half of a part
            is written.
        forever: whether all later calls fail too.
        error: what is raised.
    """

    broken: tuple[str, ...] = ()
    """Names of calls that fail whenever they come."""
    hanging: tuple[str, ...] = ()
    """Names of calls that wait until `released`."""

    def __init__(
        self,
        root: str | Path,
        fail_at: int = 0,
        how: str = "before",
        *,
        forever: bool = False,
        error: type[BaseException] = StoreError,
    ) -> None:
        super().__init__(root)
        self.calls: list[str] = []
        self.hangs, self.released = threading.Event(), threading.Event()
        self.fail_at, self.how, self._forever, self._error = fail_at, how, forever, error
        self._lock = threading.Lock()

    def call(self, name: str, do: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        with self._lock:
            self.calls.append(name)
            number = len(self.calls)
        if name in self.hanging:
            self.hangs.set()
            assert self.released.wait(120)
        due = number == self.fail_at or (self._forever and number > self.fail_at > 0)
        due = due or name in self.broken
        error = self._error(f"the disk failed in {name}, call {number}")
        if due and self.how == "before":
            raise error
        result = torn() if due and self.how == "torn" and torn else do()
        if due:
            raise error
        return result

    def _new_file(self, key: str, total_bytes: int) -> Any:
        files: list[Any] = []
        try:
            self.call(
                "open_new", lambda: files.append(LocalStore._new_file(self, key, total_bytes))
            )
        except BaseException:
            for file in files:
                file.abort()
            raise
        return _FaultyFile(self, files[0])

    def create(self, key: str, data: bytes) -> None:
        self.call("create", lambda: LocalStore.create(self, key, data))

    def replace(self, key: str, data: bytes) -> None:
        self.call("replace", lambda: LocalStore.replace(self, key, data))

    def read(self, key: str) -> bytes:
        return self.call("read", lambda: LocalStore.read(self, key))

    def read_into(self, key: str, start: int, buffer: memoryview, **how: Any) -> int:
        return self.call("read_into", lambda: LocalStore.read_into(self, key, start, buffer, **how))

    def size(self, key: str) -> int:
        return self.call("size", lambda: LocalStore.size(self, key))

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        return self.call("list", lambda: LocalStore.list(self, prefix))

    def delete(self, keys: Any) -> None:
        self.call("delete", lambda: LocalStore.delete(self, keys))


class _FaultyFile:
    def __init__(self, store: FaultyStore, file: Any) -> None:
        self._store, self._file = store, file

    def put(self, part: tuple[int, memoryview]) -> None:
        start, data = part
        half = data[: len(data) // 2]
        self._store.call(
            "put", lambda: self._file.put((start, data)), lambda: self._file.put((start, half))
        )

    def finish(self) -> None:
        self._store.call("finish", self._file.finish)

    def abort(self) -> None:
        self._file.abort()
