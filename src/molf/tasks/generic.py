"""What the tasks over a user's own columns share: templates, numbers as text, values that are not what they must be."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.errors import UserError
from molf.tasks.columns import (
    CONTROL,
    IS_TEXT,
    LOST,
    NOT_EMPTY,
    as_texts,
    given,
    missing,
    of_rows,
    text_checks,
    vector,
)

if TYPE_CHECKING:
    import pandera.pandas as pa

IS_WORDED = "is text or a finite number"
PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A column's text; or a text over columns, taken to the letter: nothing is stripped from it or added to it.

    Attributes:
        columns: That it names, each once.
        pieces: (text, None) or (None, column), in order.
        whole: Whether it is one column alone, whose text is stripped.
    """

    columns: tuple[str, ...]
    pieces: tuple[tuple[str | None, str | None], ...]
    whole: bool

    @classmethod
    def parse(cls, written: str) -> "Template":
        """Reads a column's name, or a text with names in braces; doubled braces there are braces of the text.

        Raises:
            UserError: A brace has no partner, or the text has characters that no prepared text may have.
        """
        if not any(match.group(1) is not None for match in PART.finditer(written)):
            return cls((written,), ((None, written),), True)
        pieces: list[tuple[str | None, str | None]] = []
        end = 0
        for match in PART.finditer(written):
            pieces.append((written[end : match.start()], None))
            end = match.end()
            if match.group(1) is not None:
                pieces.append((None, match.group(1)))
            elif len(match.group()) == 2:
                pieces.append((match.group()[0], None))
            else:
                raise UserError(
                    f"template {written!r}: the brace at character {match.start() + 1} has no partner; {{name}} is a "
                    "column, and a brace of the text is written twice"
                )
        pieces.append((written[end:], None))
        text = "".join(text for text, _ in pieces if text)
        if re.search(CONTROL, text) or re.search(f"[{LOST}\ud800-\udfff]", text):
            raise UserError(
                f"template {written!r} has control characters, or such as stand for lost ones; a line break is "
                r'"\n" and a tab "\t", in double quotes'
            )
        columns = dict.fromkeys(column for _, column in pieces if column is not None)
        return cls(tuple(columns), tuple(piece for piece in pieces if piece != ("", None)), False)

    def fill(self, frame: pd.DataFrame) -> list[str]:
        """The text of each row, whose columns hold text.

        Args:
            frame: As `worded` leaves it.
        """
        if self.whole:
            return [value.strip() for value in frame[self.columns[0]]]
        # Of several columns one may be missing, as it may be empty: CSV cannot tell the two apart.
        texts = [
            [text] * len(frame) if column is None else frame[column].where(~missing(frame[column]), "")
            for text, column in self.pieces
        ]
        return ["".join(parts) for parts in zip(*texts, strict=True)]


def schema(templates: dict[str, Template]) -> tuple[dict[str, "pa.Column"], list["pa.Check"]]:
    """Columns and checks of rows that templates ask for.

    Of a template over several columns some may be empty or missing, but not all.

    Args:
        templates: By what they make, such as `prompt`.
    """
    alone = {template.columns[0] for template in templates.values() if len(template.columns) == 1}
    every = dict.fromkeys(column for template in templates.values() for column in template.columns)
    checks = [
        of_rows(partial(_some_text, columns=template.columns), f"{made} {NOT_EMPTY}")
        for made, template in templates.items()
        if len(template.columns) > 1
    ]
    return {column: words(optional=column not in alone, empty=column not in alone) for column in every}, checks


def _some_text(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Whether a row has text in one of the columns at least; true where one holds no text, as other checks say."""
    import pyarrow.compute as pc

    found = np.zeros(len(frame), dtype=bool)
    for column in columns:
        filled = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(as_texts(frame[column]))), 0)
        found |= filled.fill_null(True).to_numpy(zero_copy_only=False) & ~missing(frame[column])
    return found


def words(optional: bool = False, required: bool = True, empty: bool = False) -> "pa.Column":
    """A column of text that `worded` may have made of numbers.

    Args:
        optional: Whether values may be missing.
        required: Whether the column itself must be there.
        empty: Whether a text may be empty.
    """
    import pandera.pandas as pa

    checks = [check for check in text_checks() if not (empty and check.name == NOT_EMPTY)]
    for check in checks:
        if check.name == IS_TEXT:
            check.name = check.error = IS_WORDED
    return pa.Column(nullable=True, required=required, checks=[*([] if optional else [given()]), *checks])


def worded(values: pd.Series) -> pd.Series:
    """A column with its finite numbers as text, as JSON writes them; all else as it is."""
    if not isinstance(values.dtype, np.dtype) or pd.api.types.infer_dtype(values, skipna=True) == "string":
        return values
    return pd.Series([as_worded(value) for value in values], index=values.index, dtype=object)


def as_worded(value: Any) -> Any:
    """A finite number as text; anything else as it is. True and false are no numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return json.dumps(value)


def at(record: Any, path: str) -> Any:
    """What lies in a value at a path: keys of objects, numbers of items from 0, `*` for all items; None if nothing.

    Args:
        record: An object, a list, or anything else, in which nothing lies.
        path: Its parts joined by dots, such as `answers.text.0`.
    """
    key, _, rest = path.partition(".")
    if key == "*" and isinstance(record, list):
        return [at(item, rest) if rest else item for item in record]
    if isinstance(record, Mapping):
        found = record.get(key)
    else:
        inside = isinstance(record, list) and key.isdecimal() and int(key) < len(record)
        found = record[int(key)] if inside else None
    return at(found, rest) if rest else found


def root(name: str) -> str:
    """The column in which a path begins."""
    return name.partition(".")[0]


def ways(names: Iterable[str]) -> list[list[str]]:
    """The columns that must be there for names that each are a column, or a path into one: one of these lists."""
    own = list(dict.fromkeys(names))
    return [own] if all(name == root(name) for name in own) else [own, list(dict.fromkeys(map(root, own)))]


def with_paths(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """The frame with a column for each name that is no column of it, but a path into one."""
    paths = [name for name in names if name not in frame and root(name) in frame and name != root(name)]
    made = {name: [at(value, name.partition(".")[2]) for value in frame[root(name)]] for name in dict.fromkeys(paths)}
    return replaced(frame, {name: pd.Series(cells, index=frame.index, dtype=object) for name, cells in made.items()})


def replaced(frame: pd.DataFrame, columns: Mapping[str, pd.Series]) -> pd.DataFrame:
    """The frame with other or further columns, whatever their names: pandas' `assign` knows none called `self`."""
    made = frame.copy(deep=False)
    for name, values in columns.items():
        made[name] = values
    return made


@dataclass(frozen=True)
class Wrong:
    """Stands in a normalised column where a value is not what it must be, with the check that it failed."""

    check: str
    shown: Any  # of the value, what is wrong
    kept: Any = ()  # what it holds that is right, where it lacks no more than an answer

    def __str__(self) -> str:
        return str(self.shown)


def no_wrong(*checks: str) -> list["pa.Check"]:
    """For each of these names the check that no value stands there as `Wrong` by it."""

    def passes(values: pd.Series, name: str) -> np.ndarray:
        wrong = (isinstance(value, Wrong) and value.check == name for value in values)
        return ~np.fromiter(wrong, dtype=bool, count=len(values))

    return [vector(partial(passes, name=name), name) for name in checks]


def flaws(items: Sequence[Any], column: "pa.Column") -> np.ndarray:
    """For each item the first of a column's checks that it fails, None where it fails none: (items,) of object."""
    values = pd.Series(items, dtype=object)
    found = np.full(len(values), None, dtype=object)
    for check in reversed(column.checks if len(values) else []):
        found[~check(values).check_output.to_numpy()] = check.name
    return found
