"""results/lacking.json: cells of the grid that failed and why, without which a comparison is made all the same.

It holds an object of cells' names, `MODEL/TASK/METHOD/seed-S` (METHOD `base`, seed 0: the untrained model's scores):

    {"tiny/sql/molf/seed-0": {"kind": "out of memory", "reason": "one line of text"}}

The reason alone, a text in place of the block, is that of a cell that failed (`failed`).

A cell that it names and whose results are there and fit lacks no more; cells that are not in the grid do not count.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from molf.errors import UserError, first_line
from molf.paths import RESULTS, Cell, read_json, write_json
from molf.report.markdown import clean

PATH = RESULTS / "lacking.json"
LONGEST = 300  # characters of a reason that are kept
NAME = re.compile(r"(?:[a-z0-9][a-z0-9_-]*/){3}seed-(?:0|[1-9][0-9]{0,17})")


class Kind(StrEnum):
    """What kept a cell from its results."""

    MEMORY = "out of memory"
    LOST = "lost"  # its process was killed, or its machine is gone
    INPUT = "mistake in the input"
    FAILED = "failed"
    BEFORE = "a stage before it failed"
    STOPPED = "stopped"
    UNCOMPARED = "not compared"  # its results are there, but not what they are held against


@dataclass(frozen=True)
class Lack:
    """Why a cell lacks: the kind of failure, and a line of text."""

    kind: Kind
    reason: str


def write(lacking: Mapping[Cell, Lack], root: Path = Path()) -> None:
    """Says which cells lack; of none, the file goes.

    Args:
        lacking: A reason may be of several lines, and long: its first words are kept.
        root: Project folder.
    """
    if not lacking:
        (root / PATH).unlink(missing_ok=True)
        return
    found = {cell.name: {"kind": lack.kind, "reason": _short(lack.reason)} for cell, lack in sorted(lacking.items())}
    write_json(root / PATH, found)


def read(root: Path = Path()) -> dict[Cell, Lack]:
    """Which cells are said to lack, and why; none where there is no file.

    Raises:
        UserError: It is damaged or was edited, with everything that is wrong.
    """
    try:
        found = read_json(root / PATH)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{PATH} cannot be read ({first_line(error)}); {ADVICE}") from None
    if not isinstance(found, dict):
        raise UserError(f"{PATH} holds no object of cells' names; {ADVICE}")
    found = {name: {"kind": Kind.FAILED, "reason": of} if isinstance(of, str) else of for name, of in found.items()}
    problems = [f"{PATH}: {problem}" for name, entry in found.items() for problem in _problems(name, entry)]
    if problems:
        raise UserError([*problems, ADVICE])
    return {Cell.parse(name): Lack(Kind(of["kind"]), _short(of["reason"])) for name, of in found.items()}


ADVICE = "remove it if no cell lacks; the flow writes it anew"


def _problems(name: str, entry: Any) -> list[str]:
    shown = repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}...")
    if not NAME.fullmatch(name):
        return [f"{shown} is no cell's name (MODEL/TASK/METHOD/seed-S)"]
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("kind", "reason")):
        return [f"{shown} needs kind and reason, both text"]
    if entry["kind"] not in list(Kind):
        return [f"{shown} has kind {entry['kind'][:LONGEST]!r}; one of: {', '.join(Kind)}"]
    return []


def _short(reason: str) -> str:
    line = clean(reason) or "no reason was given"
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}\u2026"
