"""Stores for the files of a run: `open_store(url)` opens a directory or an object store."""

from importlib.util import find_spec
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
    """Open the store of a directory, a bucket (`s3://`, `gs://`, `az://`), or any fsspec URL.

    Creates nothing; a missing directory is an empty store.

    Raises:
        ConfigError: neither a path nor a URL, or the URL's protocol is unknown or its library is
            not installed.
    """
    location = _normalized(url)
    if not is_remote(location):
        return LocalStore(location)
    from trainer.storage.clients import PROTOCOLS
    from trainer.storage.objects import ObstoreStore  # imports obstore when needed

    protocol = location.partition("://")[0]
    has_obstore = find_spec("obstore") is not None
    if protocol in PROTOCOLS and (has_obstore or protocol in ("s3", "s3a")):
        return ObstoreStore(location, settings)
    from trainer.storage.remote import FsspecStore  # imports fsspec when needed

    return FsspecStore(location, settings)


def _normalized(url: str) -> str:
    try:
        return normalized(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
