"""Stores for the files of a run: `open_store(url)` opens a directory or an object store."""

from pathlib import Path

from trainer.config.schema import ObjectStore
from trainer.core.locations import is_remote, normalized
from trainer.errors import ConfigError
from trainer.storage.local import LocalStore
from trainer.storage.store import AlreadyExists, Store

__all__ = ["AlreadyExists", "LocalStore", "Store", "local_path", "open_store"]


def local_path(url: str) -> Path | None:
    """Return the path of a local URL (a plain path, or `file://…`); None for a remote one.

    Raises:
        ConfigError: neither a path nor a URL; see `normalized`.
    """
    location = _normalized(url)
    return None if is_remote(location) else Path(location)


def open_store(url: str, settings: ObjectStore = ObjectStore()) -> Store:  # noqa: B008 (frozen)
    """Open the store of a directory, or of `s3://bucket/prefix` and other fsspec URLs.

    Creates nothing; a missing directory is an empty store.

    Raises:
        ConfigError: neither a path nor a URL, or the URL's protocol is unknown or its library is
            not installed.
    """
    location = _normalized(url)
    if not is_remote(location):
        return LocalStore(location)
    from trainer.storage.remote import FsspecStore  # imports fsspec, only when needed
    from trainer.storage.s3 import S3Store

    kind = S3Store if location.startswith(("s3://", "s3a://")) else FsspecStore
    return kind(location, settings)


def _normalized(url: str) -> str:
    try:
        return normalized(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
