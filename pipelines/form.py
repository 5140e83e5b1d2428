"""Types of the flows' parameters, of which Prefect's page makes a form.

The choices are those of the moment when the deployments are made: the blocks of the checkout's params.yaml, and those
that a preset brings. The form alone is bound to them: what a flow run is given is judged by `molf check`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from molf import presets
from molf.config import PARAMS, read_yaml
from molf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("MOLF_CHECKOUT", ROOT))


def choices(section: str, root: Path = HOME) -> list[str]:
    """Names of a section's blocks, those of params.yaml before those of presets; empty if it does not parse.

    Args:
        section: models, tasks or methods.
        root: Folder of params.yaml.
    """
    try:
        found = [read_yaml(root / PARAMS)]
    except UserError:
        found = []  # the run's `molf check` says what is wrong with it
    found += [presets.differences(name) for name in presets.names()]
    blocks = [block[section] for block in found if isinstance(block, dict) and isinstance(block.get(section), dict)]
    return list(dict.fromkeys(str(name) for names in blocks for name in names))


def several(values: Sequence[str]) -> dict[str, Any]:
    """JSON schema of a list of such names."""
    return {"type": "array", "items": {"type": "string", "enum": list(values)}, "uniqueItems": True}


# Empty, as a field is that nobody touched; null beside a list would make Prefect's page ask which of the two it is.
NONE: list[Any] = []
NOTHING: dict[str, Any] = {}
Preset = Annotated[str, Field(json_schema_extra={"enum": [*presets.names()]})]
Models = Annotated[list[str] | None, WithJsonSchema(several(choices("models")))]
Tasks = Annotated[list[str] | None, WithJsonSchema(several(choices("tasks")))]
Methods = Annotated[list[str] | None, WithJsonSchema(several(choices("methods")))]
Seeds = Annotated[
    list[int] | None, WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True})
]
Others = Annotated[dict[str, Any] | None, WithJsonSchema({"type": "object"})]
