"""Every file system of fsspec as a store: `hf://`, `sftp://`, `memory://` and others."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from trainer.errors import ConfigError
from trainer.storage.requests import CutShortError, RemoteStore

_EXTRAS = {
    "gs": "gcs", "gcs": "gcs", "az": "azure", "azure": "azure", "abfs": "azure", "abfss": "azure",
}  # fmt: skip
"""The extra of this package for a protocol."""


class FsspecStore(RemoteStore):
    """Keys as objects below a URL of any fsspec file system.

    Uses only what every fsspec file system has: a new key is held in memory until it is finished,
    and `create` is as atomic as `pipe_file(mode="create")` is there.
    """

    def _connect(self) -> None:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            advice = f"; pip install 'perdure[{extra}]'" if extra else ""
            raise ConfigError(f"{self.url}: {error}{advice}") from None
        except ValueError:
            raise ConfigError(f"{self.url}: {protocol!r} is not a protocol of fsspec") from None
        self._fs = kind(**self._options())
        self._root = kind._strip_protocol(self.url).rstrip("/")

    def _options(self) -> dict[str, Any]:
        return {"use_listings_cache": False, **self._settings.options}

    # --- the contract ----------------------------------------------------------------------------

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Collect all parts in memory, then put them in one request."""
        self._check_absent(key)
        self.replace(key, bytes(self._collected(parts, total_bytes)))

    def create(self, key: str, data: bytes) -> None:
        """Put it on the condition that the key does not exist."""
        path = self._path(key)
        try:
            with _CREATING:
                self._try("create", key, lambda: self._fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            self._accept_own(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Put it unconditionally."""
        path = self._path(key)
        self._try("replace", key, lambda: self._fs.pipe_file(path, data))

    def read(self, key: str) -> bytes:
        """Get the object."""
        path = self._path(key)
        data: bytes = self._try("read", key, lambda: self._fs.cat_file(path), may_be_missing=True)
        return data

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range; retry a truncated response."""
        if not len(buffer):
            return 0
        view = buffer.cast("B")

        def get() -> int:
            data = self._range(key, start, start + len(view))
            if len(data) < len(view) and start + len(data) < self.size(key):
                raise CutShortError(f"{len(data):,} of {len(view):,} bytes")
            view[: len(data)] = data
            return len(data)

        return self._try("read", key, get, may_be_missing=True)

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        path = self._path(key)
        return int(self._try("look at", key, lambda: self._fs.size(path), may_be_missing=True))

    def entries(self, folder: str) -> list[str]:
        """List one level, with no cache."""
        path = self._path(folder)
        ask = partial(self._fs.ls, path, detail=True)
        try:
            items: list[Any] = self._try("list", folder, ask, may_be_missing=True)
        except FileNotFoundError:
            return []
        top = path.strip("/")
        return sorted(
            item["name"].rstrip("/").rpartition("/")[2] + "/" * (item["type"] == "directory")
            for item in items
            if item["name"].strip("/") != top
        )

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix, with no cache."""
        path = self._path(prefix)
        paths = self._try("list", prefix, lambda: list(self._fs.find(path)))
        return sorted(name.removeprefix(self._root).lstrip("/") for name in paths)

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        ask = partial(self._fs.modified, self._path(key))
        modified: datetime = self._try("look at", key, ask, may_be_missing=True)
        return modified.timestamp()

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another."""
        for key in keys:
            remove = partial(self._fs.rm_file, self._path(key))
            with suppress(FileNotFoundError):
                self._try("delete", key, remove, may_be_missing=True)

    def probe(self) -> str:
        """Write a key as a save does and create another, and delete both."""
        key = self._probe_key()
        try:
            self.write(f"{key}-part", 5, [memoryview(b"probe")])
            self.create(key, b"probe")
        finally:
            self.delete([key, f"{key}-part"])
        return self._unsafe()

    def _range(self, key: str, start: int, stop: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key), start=start, end=stop)
        return data


_CREATING = threading.Lock()
"""Lock for file systems without conditional create, which check first and then write."""
