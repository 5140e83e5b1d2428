"""Which of Prefect's Secret blocks become variables, and which variables win."""

from typing import Any

import pytest

from molf.secrets import concealed
from pipelines import blocks


class Client:
    """In place of Prefect's: answers as its server does, at most two blocks at once."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def request(self, method: str, path: str, json: dict[str, Any]) -> "Client":
        assert (method, path, json["include_secrets"]) == ("POST", "/block_documents/filter", True)
        self.asked = json["offset"]
        return self

    def json(self) -> list[dict[str, Any]]:
        some = sorted(self.kept.items())[self.asked : self.asked + 2]
        return [{"name": name, "data": {"value": value}} for name, value in some]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Secret blocks by name."""
    blocks_by_name: dict[str, Any] = {}
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda sync_client: Client(blocks_by_name))
    for name in ("COLOUR", "AWS_SECRET_ACCESS_KEY", "OPTIONS", "MOLF_SECRETS"):
        monkeypatch.delenv(name, raising=False)
    return blocks_by_name


def test_blocks_become_variables_and_all_their_values_are_masked(kept: dict[str, Any]) -> None:
    kept |= {
        "molf-env-aws-secret-access-key": "from-the-block",
        "molf-env-colour": "ultramarine",
        "molf-env-options": {"token": "nested-token"},
        "another": "not-for-us",
    }
    found = blocks.from_blocks()
    assert found == {
        "AWS_SECRET_ACCESS_KEY": "from-the-block",
        "COLOUR": "ultramarine",
        "OPTIONS": '{"token": "nested-token"}',
        "MOLF_SECRETS": "AWS_SECRET_ACCESS_KEY,COLOUR,OPTIONS",
    }
    assert concealed("from-the-block ultramarine nested-token not-for-us", found) == "*** *** *** not-for-us"


def test_what_is_set_on_the_machine_wins(kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept |= {"molf-env-colour": "ultramarine", "molf-env-options": "x"}
    monkeypatch.setenv("COLOUR", "vermilion")
    monkeypatch.setenv("MOLF_SECRETS", "MINE")
    assert blocks.from_blocks() == {"OPTIONS": "x", "MOLF_SECRETS": "MINE,OPTIONS"}


def test_without_blocks_nothing_is_added(kept: dict[str, Any]) -> None:
    kept["another"] = "not-for-us"
    assert blocks.from_blocks() == {}
