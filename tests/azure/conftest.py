"""A real Azure Blob server on this machine, for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.azurite import AzureServer, program
from support.run_commands import command, wait_for

__all__ = ["command", "wait_for"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[AzureServer]:
    """The server of this test process, started once."""
    if program() is None:
        pytest.skip("needs Azurite: npm install -g azurite")
    azure_server = AzureServer(tmp_path_factory.mktemp("azure"))
    azure_server.start()
    yield azure_server
    azure_server.kill()


@pytest.fixture
def azure(server, monkeypatch) -> AzureServer:
    """The server, with its account in the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server
