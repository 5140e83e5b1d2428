"""Checks of columns that the tasks share. Each check's name is what a person reads beside a rejected row."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    import pandera.pandas as pa

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN or NA. A list is something."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def check(passes: Callable[[Any], bool], name: str) -> "pa.Check":
    """A check of each present value of a column; missing ones are `is given`'s matter.

    pandas turns whole columns into other types, so `passes` must take a value of any type.
    """
    import pandera.pandas as pa

    def column(values: pd.Series) -> pd.Series:
        return pd.Series([is_missing(value) or passes(value) for value in values], index=values.index, dtype=bool)

    return pa.Check(column, name=name, error=name, ignore_na=False)


def given() -> "pa.Check":
    """A check that no value is missing."""
    import pandera.pandas as pa

    def column(values: pd.Series) -> pd.Series:
        return pd.Series([not is_missing(value) for value in values], index=values.index, dtype=bool)

    return pa.Check(column, name="is given", error="is given", ignore_na=False)


def is_clean_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not CONTROL.search(value)


def text(optional: bool = False, required: bool = True, checks: Sequence["pa.Check"] = ()) -> "pa.Column":
    """A column of non-empty text without control characters (line breaks and tabs are none).

    Args:
        optional: Whether values may be missing.
        required: Whether the column itself must be there.
        checks: Further ones.
    """
    import pandera.pandas as pa

    own = [
        check(lambda value: isinstance(value, str), "is text"),
        check(lambda value: not isinstance(value, str) or bool(value.strip()), "is not empty"),
        check(lambda value: not isinstance(value, str) or not CONTROL.search(value), "has no control characters"),
    ]
    return pa.Column(nullable=True, required=required, checks=[*([] if optional else [given()]), *own, *checks])


def texts() -> "pa.Column":
    """A column of lists, each of at least one clean text."""
    import pandera.pandas as pa

    def passes(value: object) -> bool:
        return not isinstance(value, str) and as_list(value) != [] and all(map(is_clean_text, as_list(value)))

    return pa.Column(nullable=True, checks=[given(), check(passes, "is a list of texts")])


def as_list(value: object) -> list[Any]:
    """A cell's list, which Parquet hands back as an array; a value that is none alone in a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def prepared(**own: "pa.Column") -> "pa.DataFrameSchema":
    """The schema of prepared rows: what every task has, and its own columns."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {"example_id": text(), "prompt": text(), "completion": text(), **own}, unique=["example_id"], strict=False
    )
