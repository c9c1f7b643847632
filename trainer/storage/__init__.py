"""Where the bytes of a run live: `open_store(url)` gives a Store."""

from trainer.storage.local import LocalStore
from trainer.storage.store import AlreadyExists, NewFile, Store

__all__ = ["AlreadyExists", "LocalStore", "NewFile", "Store", "open_store"]


def open_store(url: str) -> Store:
    """Open the store of a directory. Creates nothing; a missing directory is an empty store."""
    return LocalStore(url.removeprefix("file://"))
