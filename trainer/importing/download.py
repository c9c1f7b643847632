"""A file of any store as one of this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.config.schema import ObjectStore
from trainer.errors import StoreError
from trainer.storage import is_local, open_store


@contextmanager
def local_file(url: str, settings: ObjectStore) -> Iterator[str]:
    """Give the path of a file; of a remote one a copy, which has no name afterwards.

    What has it open or mapped by then keeps it.
    """
    if is_local(url):
        yield url.removeprefix("file://")
        return
    parent, _, name = url.rpartition("/")
    store = open_store(parent, settings)
    with tempfile.NamedTemporaryFile() as file:
        total, buffer = store.size(name), bytearray(store.read_bytes)
        for start in range(0, total, len(buffer)):
            count = store.read_into(name, start, memoryview(buffer))
            try:
                file.write(memoryview(buffer)[:count])
                file.flush()
            except OSError as error:
                raise StoreError(
                    f"{url} ({total:,} bytes) cannot be copied to {file.name}: {error.strerror}; "
                    "set TMPDIR to a folder with more space"
                ) from None
        yield file.name
