"""Secrets that Prefect keeps, for the stages of a flow run: a Secret block `molf-env-NAME` is the variable NAME.

A block's name has lower-case letters, digits and dashes only: `molf-env-aws-secret-access-key` stands for
AWS_SECRET_ACCESS_KEY.
"""

import json
import os
from typing import Any

from molf.secrets import NAMED

PREFIX = "molf-env-"
PAGE = 200  # blocks asked for at once; the most that Prefect's server gives


def from_blocks() -> dict[str, str]:
    """The variables that Prefect's Secret blocks hold, to be added to the environment of a flow run's stages.

    A variable that the environment of this process has already is left out: what is set on a machine is meant for that
    machine and wins over what is kept for all. MOLF_SECRETS comes along where a name alone does not tell a secret, so
    that `molf.secrets.concealed` masks every value that came from a block.

    Returns:
        Variables by name; empty where there are no such blocks.

    Raises:
        prefect.exceptions.PrefectException: Prefect's server refuses.
        httpx.HTTPError: It cannot be reached.
    """
    from prefect.client.orchestration import get_client

    found: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        offset = 0
        while blocks := _blocks(client, offset):
            offset += len(blocks)
            for block in blocks:
                name = variable(block.get("name") or "")
                if name and name not in os.environ:
                    found[name] = _text(block["data"].get("value"))
    if found:
        found[NAMED] = ",".join(filter(None, [os.environ.get(NAMED, ""), *sorted(found)]))
    return found


def variable(block: str) -> str:
    """The variable that a block of that name stands for; empty for a block that is none of ours."""
    return block.removeprefix(PREFIX).replace("-", "_").upper() if block.startswith(PREFIX) else ""


def _blocks(client: Any, offset: int) -> list[dict[str, Any]]:
    asked = {
        "block_documents": {"is_anonymous": {"eq_": False}},
        "block_types": {"slug": {"any_": ["secret"]}},
        "include_secrets": True,
        "limit": PAGE,
        "offset": offset,
    }
    answer: list[dict[str, Any]] = client.request("POST", "/block_documents/filter", json=asked).json()
    return answer


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
