"""Store contract tests on a real S3 server."""

import uuid

import pytest
from support.store_contract import *

from scripts.s3_server import BUCKET
from trainer.storage import Store, open_store


@pytest.fixture
def store(s3) -> Store:
    """Return an empty store."""
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}/x")
