"""Prefect's server and the deployments, for real."""

import json
import urllib.request
from typing import Any

import pytest

from pipelines.server import NoServer, server, taken


def call(api: str, path: str, **body: Any) -> Any:
    """Asks Prefect's API; without a body by GET."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"{api}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.acceptance
def test_a_server_answers_and_its_port_is_not_given_twice(prefect_server: str) -> None:
    assert call(prefect_server, "flows/filter", limit=1) is not None
    port = int(prefect_server.split(":")[2].split("/")[0])
    assert taken(port)
    with pytest.raises(NoServer, match="already answers.*PREFECT_API_URL"), server(port):
        pass
