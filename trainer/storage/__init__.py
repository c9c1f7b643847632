"""Stores for the files of a run: `open_store(url)` opens a directory or an object store."""

from pathlib import Path

from trainer.config.schema import ObjectStore
from trainer.storage.local import LocalStore
from trainer.storage.store import AlreadyExists, NewFile, Store

__all__ = ["AlreadyExists", "LocalStore", "NewFile", "Store", "local_path", "open_store"]


def local_path(url: str) -> Path | None:
    """Return the path of a local URL (a plain path, or `file://…`); None for a remote one."""
    if "://" in url and not url.startswith("file://"):
        return None
    return Path(url.removeprefix("file://"))


def open_store(url: str, settings: ObjectStore = ObjectStore()) -> Store:  # noqa: B008 (frozen)
    """Open the store of a directory, or of `s3://bucket/prefix` and other fsspec URLs.

    Creates nothing; a missing directory is an empty store.

    Raises:
        ConfigError: the URL's protocol is unknown or its library is not installed.
    """
    if (path := local_path(url)) is not None:
        return LocalStore(path)
    from trainer.storage.remote import FsspecStore  # imports fsspec, only when needed
    from trainer.storage.s3 import S3Store

    kind = S3Store if url.startswith(("s3://", "s3a://")) else FsspecStore
    return kind(url, settings)
