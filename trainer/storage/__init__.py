"""Where the bytes of a run live: `open_store(url)` gives a Store."""

from trainer.config.schema import ObjectStore
from trainer.storage.local import LocalStore
from trainer.storage.store import AlreadyExists, NewFile, Store

__all__ = ["AlreadyExists", "LocalStore", "NewFile", "Store", "is_local", "open_store"]


def is_local(url: str) -> bool:
    """Return whether a run's place is a directory of this machine's file systems."""
    return "://" not in url or url.startswith("file://")


def open_store(url: str, settings: ObjectStore = ObjectStore()) -> Store:  # noqa: B008 (frozen)
    """Open the store of a directory, or of `s3://bucket/prefix` and other URLs of fsspec.

    Creates nothing; what is missing is an empty store.

    Raises:
        ConfigError: no such kind of store is known or installed.
    """
    if is_local(url):
        return LocalStore(url.removeprefix("file://"))
    from trainer.storage.remote import FsspecStore  # with fsspec, where it is needed
    from trainer.storage.s3 import S3Store

    kind = S3Store if url.startswith(("s3://", "s3a://")) else FsspecStore
    return kind(url, settings)
