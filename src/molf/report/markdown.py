"""Markdown whose text is taken literally, whatever data or names hold."""

import re
from collections.abc import Sequence

# All that starts markup in the Markdown of GitHub and of the hub: emphasis, code, links, tables, HTML, formulas.
MARKS = re.compile(r"[\\`*_\[\]{}<>|~$#!&]")
# What makes a link or a mention without any mark.
LINKS = re.compile(r":(?=//)|@|(?<=[wW]{3})\.")
# Controls, and what turns the direction of writing: neither is text.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]+")


def clean(text: object) -> str:
    """Text on one line, without controls, that any file can hold."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return " ".join(UNSEEN.sub(" ", plain).split())


def literal(text: object) -> str:
    """Text that Markdown and the HTML in it take as it is, inside a line."""
    shown = MARKS.sub(lambda mark: _entity(mark[0]) if mark[0] in "<>&" else f"\\{mark[0]}", clean(text))
    return LINKS.sub(lambda sign: _entity(sign[0]), shown)


def _entity(character: str) -> str:
    return f"&#{ord(character)};"


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table's lines."""
    return [row(header), row(["---"] * len(header)), *map(row, rows)]


def row(cells: Sequence[object]) -> str:
    """A table's line of cells that are Markdown already."""
    return f"| {' | '.join(map(str, cells))} |"
