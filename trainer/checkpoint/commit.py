"""The commit of a checkpoint: its manifest is created last, and only if the folder has none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from trainer.checkpoint import lineage, manifest
from trainer.checkpoint.lineage import Attempt
from trainer.checkpoint.manifest import Manifest
from trainer.errors import PerdureError, StoreError, StoreRefusedError
from trainer.storage.store import AlreadyExists, Store


class UnconfirmedError(StoreError):
    """The store failed while a manifest was created, so the checkpoint may be committed."""


class UnconfirmedRefusalError(UnconfirmedError, StoreRefusedError):
    """As above; the store would reject the manifest again."""


def commit(store: Store, folder: str, data: bytes, attempt: Attempt | None = None) -> None:
    """Create a checkpoint's manifest. The checkpoint exists and is durable on return. One process.

    Succeeds if the same bytes are stored already.

    Args:
        store: holds all files that the manifest names, durably.
        folder: key of the checkpoint's folder.
        data: the manifest.
        attempt: the attempt that must still own the run, if any.

    Raises:
        SupersededError: a newer attempt owns the run.
        AlreadyExists: the folder has another manifest.
        UnconfirmedError: the store failed; the checkpoint may be committed.
    """
    if attempt is not None:
        lineage.check_not_superseded(store, attempt)
    try:
        store.create(f"{folder}/{lineage.MANIFEST}", data)
    except AlreadyExists:
        raise
    except StoreRefusedError as error:
        raise UnconfirmedRefusalError(str(error)) from error
    except StoreError as error:
        raise UnconfirmedError(str(error)) from error


def readable_bytes(manifest_: Manifest, where: str) -> bytes:
    """Return the bytes of a manifest, after reading them back.

    For manifests built from values that another program supplied.

    Raises:
        CheckpointError: it could not be read again.
    """
    data = manifest.to_bytes(manifest_)
    manifest.from_bytes(data, where)
    return data


@contextmanager
def deleted_unless_committed(store: Store, keys: Sequence[str]) -> Iterator[None]:
    """Delete `keys` if the block fails, unless they may belong to a committed checkpoint.

    After other errors than Perdure's, such as a lost connection to rank 0, they are left alone.
    """
    try:
        yield
    except UnconfirmedError:
        raise
    except PerdureError:
        with suppress(StoreError):  # the first error matters more
            store.delete(keys)
        raise
