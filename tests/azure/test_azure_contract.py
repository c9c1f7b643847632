"""Store contract tests on a real Azure Blob server."""

import uuid

import pytest
from support.azurite import CONTAINER
from support.store_contract import *

from trainer.config.schema import ObjectStore
from trainer.errors import StoreRefusedError
from trainer.storage import Store, open_store


@pytest.fixture
def store(azure) -> Store:
    """Return an empty store."""
    return open_store(f"az://{CONTAINER}/{uuid.uuid4().hex}/x")


def test_server_has_conditional_create(store):
    assert store.probe() == ""


def test_missing_container_and_wrong_key_raise_with_advice(azure, monkeypatch):
    with pytest.raises(StoreRefusedError, match="create the bucket"):
        open_store("az://missing/a").read("x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmctd3Jvbmctd3Jvbmc=")
    with pytest.raises(StoreRefusedError, match="check the credentials") as caught:
        open_store(f"az://{CONTAINER}/a", ObjectStore(retries=0)).read("x")
    assert "d3Jvbmct" not in str(caught.value)
