"""What stages and their records say of a cell, read with care: files may be old, damaged or edited by hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from molf.errors import RunError
from molf.paths import read_json

# What a record must hold, by its file; dots lead into blocks.
_PARTS = ("cell", "fingerprint", "code")
_METRICS = (*_PARTS, "train_fingerprint", "data_hash", "task_kind", "evaluation", "primary", "primary_name", "n")
NEEDED = {
    "metrics.json": (*_METRICS, "left_out", "metrics"),
    "run.json": (*_PARTS, "config", "data.hash", "data.source", "model.hash", "model.name", "git_commit", "versions"),
    "summary.json": (),
    "comparison.json": ("groups", "cells"),
    "trial.json": ("trial", "config", "primary_name", "score", "loss", "diverged"),
}
ABSENT = object()


def read(path: Path) -> Any:
    """What a record holds; None where there is none.

    Raises:
        RunError: It is damaged, or lacks what every record of its kind holds.
    """
    found = read_any(path)
    wrong = "" if found is None else flaw(path.name, found)
    if wrong:
        raise RunError(
            f"{path} {wrong}: an earlier molf wrote it, or it was edited; `dvc checkout {path}` brings it back, "
            "`dvc repro` makes it anew"
        )
    return found


def flaw(name: str, found: Any, more: Iterable[str] = ()) -> str:
    """What a record lacks, in words; empty where it lacks nothing.

    Args:
        name: Of its file, which says what it must hold.
        found: What it holds.
        more: What it must hold as well.
    """
    if not isinstance(found, dict):
        return "is no record"
    lacking = [key for key in (*NEEDED[name], *more) if _at(found, key) is ABSENT]
    if not isinstance(found.get("lineage", {}), dict):
        lacking.append("lineage")
    return f"has no {', '.join(lacking)}" if lacking else ""


def _at(found: Any, key: str) -> Any:
    """What lies in a record at dotted keys, or ABSENT."""
    for name in key.split("."):
        found = found.get(name, ABSENT) if isinstance(found, dict) else ABSENT
    return found


def read_any(path: Path) -> Any:
    """What a JSON file holds; None where there is none.

    Raises:
        RunError: It is damaged.
    """
    try:
        return read_json(path) if path.is_file() else None
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); `dvc checkout {path}` brings it back") from None
