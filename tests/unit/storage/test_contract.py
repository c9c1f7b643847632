"""The contract, kept by a directory and by object stores in memory, of fsspec and obstore."""

from pathlib import Path

import pytest
from obstore.store import MemoryStore
from support.store_contract import *

from trainer.config.schema import ObjectStore
from trainer.storage import Store, open_store
from trainer.storage.clients import Clients
from trainer.storage.objects import ObstoreStore


class InMemory(ObstoreStore):
    """Google's and Azure's code paths with obstore's store in memory instead of a server."""

    def _connect(self) -> None:
        memory = MemoryStore()
        self._clients = Clients(memory, memory, uploads=None, has_checksums=False)


@pytest.fixture(params=["local", "memory", "obstore"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store."""
    if request.param == "obstore":
        return InMemory("gs://bucket/runs/x", ObjectStore())
    scheme = {"local": "", "memory": "memory:/"}[request.param]
    return open_store(f"{scheme}{tmp_path}/runs/x")
