"""The contract, kept by a directory and by an object store that lives in memory."""

from pathlib import Path

import pytest
from support.store_contract import *

from trainer.storage import Store, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store."""
    scheme = {"local": "", "memory": "memory:/"}[request.param]
    return open_store(f"{scheme}{tmp_path}/runs/x")
