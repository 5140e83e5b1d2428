"""One Prefect server for all tests that need one."""

import socket
from collections.abc import Iterator

import pytest

from pipelines.commands import ended_together
from pipelines.server import server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(autouse=True)
def not_ending() -> None:
    """A flow that failed in this process told all threads to end, until the next one begins."""
    with ended_together():
        pass


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's address of a server that starts empty; for PREFECT_API_URL of what a test starts."""
    home = tmp_path_factory.mktemp("prefect-server")
    with (home / "server.log").open("wb") as output, server(free_port(), {"PREFECT_HOME": str(home)}, output) as api:
        yield api
