"""Buckets of Amazon S3, Google Cloud Storage and Azure Blob Storage, through obstore."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from trainer.config.schema import ObjectStore
from trainer.errors import StoreError, StoreRefusedError
from trainer.storage.clients import clients
from trainer.storage.requests import RemoteStore, fault_of
from trainer.storage.store import AlreadyExists, recut

T = TypeVar("T")

_CONCURRENT_PARTS = 8
_MAX_PARTS = 10_000
_ONE_PUT_BYTES = 16 << 20
"""Size up to which an object is sent in one request, from a copy that can be sent again."""
_CHECKSUM_ADVICE = (
    "; a server without SHA256 checksums needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
)
_process: int | None = None
"""The process that has obstore's threads, which a fork does not copy."""


class ObstoreStore(RemoteStore):
    """Keys as objects below `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`."""

    def __init__(self, url: str, settings: ObjectStore) -> None:
        self._root = url.partition("://")[2].rstrip("/").partition("/")[2]
        self._is_conditional = False
        super().__init__(url, settings)

    def _connect(self) -> None:
        self._clients = clients(self.url, self._settings, self._without_secrets)
        self._advice_on_writes = _CHECKSUM_ADVICE if self._clients.has_checksums else ""

    # --- the contract ----------------------------------------------------------------------------

    def write(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        """Put a small object in one request, and others in a multipart upload."""
        path = self._path(key)
        self._check_absent(key)
        if total_bytes <= _ONE_PUT_BYTES:
            data = self._collected(parts, total_bytes)
            self._try("write", key, lambda: self._put(path, data))
        else:
            self._upload(key, total_bytes, parts)

    def _upload(self, key: str, total_bytes: int, parts: Iterable[memoryview]) -> None:
        import obstore

        path, part_bytes = self._path(key), _part_bytes(total_bytes)
        if part_bytes != self.part_bytes:
            parts = recut(parts, part_bytes)  # copies, so that the caller's memory is free at once
        source = _Source(parts, total_bytes)

        def put() -> None:
            try:
                self._call(
                    obstore.put, path, source, client=self._clients.patient, use_multipart=True,
                    chunk_size=part_bytes, max_concurrency=_CONCURRENT_PARTS,
                )  # fmt: skip
            except Exception as error:
                # No such upload: the response to its completion may have been lost.
                if not source.is_empty or not isinstance(error, FileNotFoundError):
                    raise
                if self.size(key) != total_bytes:
                    raise

        try:
            self._try("write", key, put, may_repeat=lambda: not source.is_begun)
        except BaseException as error:
            if error is not source.error:
                with suppress(StoreError):
                    self._end_uploads([key])  # obstore's own attempt may have failed
            if source.error is not None:
                raise source.error from None
            raise

    def create(self, key: str, data: bytes) -> None:
        """Put it on the condition that the key does not exist.

        For servers without conditional create, the key is looked up first. On those, another
        process may create it in between.
        """
        path = self._path(key)
        try:
            if not self._is_conditional:
                self._check_absent(key)
            self._try("create", key, partial(self._create, path, data))
        except (AlreadyExists, FileExistsError):
            self._accept_own(key, data)

    def _create(self, path: str, data: bytes) -> None:
        import obstore

        try:
            self._call(obstore.put, path, data, mode="create")
        except Exception as error:
            fault = fault_of(error)
            exists = fault.status in (0, 412) or fault.code == "BlobAlreadyExists"  # 409: again
            if exists and type(error).__name__ == "AlreadyExistsError":
                raise FileExistsError(path) from None
            if fault.code != "NotImplemented":
                raise
            self._put(path, data)

    def replace(self, key: str, data: bytes) -> None:
        """Put it unconditionally, in one request."""
        path = self._path(key)
        self._try("replace", key, lambda: self._put(path, data))

    def read(self, key: str) -> bytes:
        """Get the object in one request."""
        import obstore

        path = self._path(key)

        def get() -> bytes:
            return self._call(obstore.get, path).bytes().to_bytes()

        return self._try("read", key, get, may_be_missing=True)

    def read_into(
        self, key: str, start: int, buffer: memoryview, *, is_shared: bool = False
    ) -> int:
        """Get one range; retry a truncated response."""
        import numpy as np
        import obstore

        path, view = self._path(key), buffer.cast("B")
        if not len(view):
            return 0

        def get() -> int:
            try:
                data = self._call(obstore.get_range, path, start=start, length=len(view))
            except Exception as error:
                if fault_of(error).status == 416:
                    return 0
                raise
            # This copy releases the interpreter's lock, unlike that of a memoryview.
            np.copyto(
                np.frombuffer(view, np.uint8)[: len(data)],
                np.frombuffer(memoryview(data), np.uint8),
            )
            return len(data)

        return self._try("read", key, get, may_be_missing=True)

    def size(self, key: str) -> int:
        """Ask for the object's size."""
        return int(self._head(key)["size"])

    def modified_s(self, key: str) -> float:
        """Ask for the object's time of modification."""
        return float(self._head(key)["last_modified"].timestamp())

    def _check_absent(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._head(key, is_bucket_certain=True)  # the next request would tell
            raise AlreadyExists(f"{self.url}/{key} exists already")

    def _head(self, key: str, *, is_bucket_certain: bool = False) -> Any:
        import obstore

        path = self._path(key)

        def head() -> Any:
            try:
                return self._call(obstore.head, path)
            except Exception as error:
                missing = isinstance(error, FileNotFoundError) and not is_bucket_certain
                if missing or fault_of(error).status in (400, 403):
                    # an error of this request has a code, unlike that of a HEAD
                    next(iter(self._call(obstore.list, path, chunk_size=1)), None)
                raise

        return self._try("look at", key, head, may_be_missing=True)

    def entries(self, folder: str) -> list[str]:
        """List one level by prefix and delimiter."""
        import obstore

        path = self._path(folder)
        ask = partial(self._call, obstore.list_with_delimiter, path or None)
        level = self._try("list", folder, ask)
        names = {f"{prefix.rpartition('/')[2]}/" for prefix in level["common_prefixes"]}
        paths = {item["path"] for item in level["objects"]} - {path}  # a folder's marker
        return sorted(names | {name.rpartition("/")[2] for name in paths})

    def list(self, prefix: str, *, unfinished: bool = False) -> list[str]:
        """List by prefix; incomplete multipart uploads need a separate request."""
        import obstore

        folder = self._path(prefix)

        def ask() -> set[str]:
            pages = self._call(obstore.list, folder or None, chunk_size=1000)
            return _without_markers([item for page in pages for item in page], folder)

        paths = self._try("list", prefix, ask)
        if unfinished:
            start = f"{folder}/" if folder else ""
            paths |= {path for path, _ in self._list_uploads(start)}
        return sorted(path[len(self._root) :].lstrip("/") for path in paths)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete one after another, with their incomplete uploads."""
        deleted = list(keys)
        for key in deleted:
            self._remove(key)
        self._end_uploads(deleted)

    def _remove(self, key: str) -> None:
        import obstore

        remove = partial(self._call, obstore.delete, self._path(key))
        with suppress(FileNotFoundError):
            self._try("delete", key, remove, may_be_missing=True)

    def probe(self) -> str:
        """Upload a part and create an object, delete both; check a second creation fails."""
        key = self._probe_key()
        self._upload(f"{key}-part", 5, [memoryview(b"probe")])
        self._remove(f"{key}-part")
        self.create(key, b"probe")
        self._is_conditional = False
        try:
            self._try("create", key, partial(self._create, self._path(key), b"another"))
        except FileExistsError:
            self._is_conditional = True
        finally:
            self._remove(key)
        return "" if self._is_conditional else self._unsafe()

    def _put(self, path: str, data: bytes | bytearray) -> None:
        import obstore

        self._call(obstore.put, path, data, use_multipart=False)  # else an upload above 5 MB

    # --- requests ------------------------------------------------------------------------------

    def _call(
        self, method: Callable[..., T], *arguments: Any, client: Any = None, **more: Any
    ) -> T:
        global _process
        if _process not in (None, os.getpid()):
            raise StoreRefusedError(
                f"cannot use {self.url} in process {os.getpid()}: it was forked from one that used "
                "obstore, whose threads a fork does not copy; start data workers with "
                "multiprocessing_context='spawn', or read through fsspec"
            )
        _process = os.getpid()
        return method(self._clients.once if client is None else client, *arguments, **more)

    def _list_uploads(self, prefix: str) -> Iterable[tuple[str, str]]:
        uploads = self._clients.uploads
        if uploads is None:
            return []
        return self._try("list the uploads below", prefix, lambda: uploads.below(prefix))

    def _end_uploads(self, keys: Iterable[str]) -> None:
        """Abort the uploads of these keys, so that their parts are deleted."""
        paths = {self._path(key): key for key in keys}
        uploads = self._clients.uploads
        if not paths or uploads is None:
            return
        for path, upload in self._list_uploads(os.path.commonpath(paths)):
            if path in paths:
                end = partial(uploads.abort, path, upload)
                with suppress(FileNotFoundError):
                    self._try("end the upload of", paths[path], end, may_be_missing=True)


class _Source:
    """An iterator for obstore, which keeps the error of the iterator below it."""

    def __init__(self, parts: Iterable[memoryview], total_bytes: int) -> None:
        self._parts, self._missing_bytes = iter(parts), total_bytes
        self.is_begun = self.is_empty = False
        self.error: BaseException | None = None

    def __iter__(self) -> "_Source":
        return self

    def __next__(self) -> memoryview:
        self.is_begun = True
        try:
            part = next(self._parts)
            self._missing_bytes -= len(part)
        except StopIteration:
            self.is_empty = True
            if self._missing_bytes:
                self.error = ValueError(f"{self._missing_bytes:,} bytes of the parts are missing")
                raise self.error from None
            raise
        except BaseException as error:
            self.error = error
            raise
        return part


def _part_bytes(total_bytes: int) -> int:
    """Return the size of a part, so that there are at most 10,000."""
    step = RemoteStore.part_bytes
    return max(1, -(-total_bytes // (step * _MAX_PARTS))) * step


def _without_markers(items: Iterable[Any], folder: str) -> set[str]:
    """Return the paths of objects, without the empty ones that mark folders."""
    sizes = {item["path"]: item["size"] for item in items}
    folders = {path[: match.start()] for path in sizes for match in re.finditer("/", path)}
    return {
        path for path, size in sizes.items() if path != folder and (size or path not in folders)
    }
