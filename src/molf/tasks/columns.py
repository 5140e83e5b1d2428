"""Checks of columns that the tasks share. Each check's name is what a person reads beside a rejected row.

Columns come in chunks, as objects: what a row of JSON held. A check looks at a whole column with Arrow's vector
operations; only a chunk with a value of another type is looked at one by one.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import pandera.pandas as pa
    import pyarrow

CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
LOST = "\ufffd"  # stands where a character was lost when somebody decoded the text
LONGEST = 1_000_000  # characters of one text
IS_TEXT = "is text"
IS_UNICODE = "is UTF-8"
NOT_EMPTY = "is not empty"
AT_MOST = f"is at most {LONGEST:,} characters"


class NotUnicode:
    """A text that no UTF-8 file can hold: it has bytes that were none, or half a surrogate pair. Shown with escapes."""

    def __init__(self, text: str) -> None:
        self.shown = text.encode("utf-8", "backslashreplace").decode()

    def __str__(self) -> str:
        return self.shown


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN or NA. A list is something."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def missing(values: pd.Series) -> np.ndarray:
    """`is_missing` of each value: (rows,) of bool."""
    return values.isna().to_numpy(dtype=bool)


def as_texts(values: "pd.Series") -> "pyarrow.StringArray":
    """A column as Arrow's text, null where a value is none."""
    import pyarrow as arrow

    if not isinstance(values.dtype, np.dtype):  # text already, as pandas reads it from Parquet
        return arrow.array(values.astype("str"), type=arrow.string(), from_pandas=True)
    cells = values.to_numpy(dtype=object)
    try:
        return arrow.array(cells, type=arrow.string(), from_pandas=True)
    except (arrow.ArrowInvalid, arrow.ArrowTypeError):
        return arrow.array([value if isinstance(value, str) else None for value in cells], type=arrow.string())


def numbers(values: pd.Series) -> np.ndarray:
    """A column as float64, NaN where a value is no number; true and false are none; infinite what is too large."""
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind in ("integer", "floating", "mixed-integer-float"):
        with suppress(OverflowError):
            return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64)
    return np.fromiter(map(_as_float, values), dtype=np.float64, count=len(values))


def _as_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return np.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return np.inf if value > 0 else -np.inf


def vector(passes: Callable[[pd.Series], np.ndarray], name: str) -> "pa.Check":
    """A check of a column's present values; missing ones are `is given`'s matter.

    Args:
        passes: Column to (rows,) of bool.
        name: Of the check.
    """
    import pandera.pandas as pa

    def column(values: pd.Series) -> pd.Series:
        return pd.Series(missing(values) | passes(values), index=values.index, dtype=bool)

    return pa.Check(column, name=name, error=name, ignore_na=False)


def of_text(passes: Callable[["pyarrow.StringArray"], Any], name: str) -> "pa.Check":
    """A check of a column's texts; what is no text is `is text`'s matter.

    Args:
        passes: Array of text to Arrow's array of bool.
        name: Of the check.
    """
    return vector(lambda values: true_or_null(passes(as_texts(values))), name)


def true_or_null(passed: Any) -> np.ndarray:
    """Arrow's array of bool as numpy's, true where it is null."""
    return passed.fill_null(True).to_numpy(zero_copy_only=False)


def of_rows(passes: Callable[[pd.DataFrame], np.ndarray], name: str) -> "pa.Check":
    """A check of whole rows.

    Args:
        passes: Frame to (rows,) of bool.
        name: Of the check.
    """
    import pandera.pandas as pa

    def rows(frame: pd.DataFrame) -> pd.Series:
        return pd.Series(passes(frame), index=frame.index, dtype=bool)

    return pa.Check(rows, name=name, error=name, ignore_na=False)


def given() -> "pa.Check":
    """A check that no value is missing."""
    import pandera.pandas as pa

    def column(values: pd.Series) -> pd.Series:
        return pd.Series(~missing(values), index=values.index, dtype=bool)

    return pa.Check(column, name="is given", error="is given", ignore_na=False)


def text_checks() -> list["pa.Check"]:
    """What every text must be: encodable, not empty, without control or lost characters, not absurdly long."""
    import pyarrow.compute as pc

    def is_text(values: pd.Series) -> np.ndarray:
        if not isinstance(values.dtype, np.dtype) or pd.api.types.infer_dtype(values, skipna=True) == "string":
            return np.ones(len(values), dtype=bool)
        return np.fromiter((isinstance(value, str | NotUnicode) for value in values), dtype=bool, count=len(values))

    def is_unicode(values: pd.Series) -> np.ndarray:
        if not as_texts(values).null_count:
            return np.ones(len(values), dtype=bool)
        return np.fromiter((not isinstance(value, NotUnicode) for value in values), dtype=bool, count=len(values))

    return [
        vector(is_text, IS_TEXT),
        vector(is_unicode, IS_UNICODE),
        of_text(lambda texts: pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), NOT_EMPTY),
        of_text(lambda texts: pc.invert(pc.match_substring_regex(texts, CONTROL)), "has no control characters"),
        of_text(lambda texts: pc.invert(pc.match_substring(texts, LOST)), "has no lost characters (U+FFFD)"),
        of_text(lambda texts: pc.less_equal(pc.utf8_length(texts), LONGEST), AT_MOST),
    ]


def differ(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Whether each row's texts in these columns differ, spaces around them aside: (rows,) of bool.

    True where one is missing or no text, which is another check's matter.
    """
    texts = [as_texts(frame[name]) for name in columns]
    whole = np.all([~column.is_null().to_numpy(zero_copy_only=False) for column in texts], axis=0)
    return distinct(texts) | ~whole


def distinct(texts: Sequence["pyarrow.StringArray"]) -> np.ndarray:
    """Whether no two texts of a row are equal, spaces around them aside; null equals nothing: (rows,) of bool."""
    import pyarrow.compute as pc

    trimmed = [pc.utf8_trim_whitespace(column) for column in texts]
    result = np.ones(len(trimmed[0]), dtype=bool)
    for i, one in enumerate(trimmed):
        for other in trimmed[:i]:
            result &= true_or_null(pc.not_equal(one, other))
    return result


def joined(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The texts of these columns, one below the other, as one."""
    import pyarrow.compute as pc

    lines = pc.binary_join_element_wise(*(as_texts(frame[name]) for name in columns), "\n", null_handling="skip")
    return pd.Series(lines.to_numpy(zero_copy_only=False), index=frame.index, dtype=object)


def text(optional: bool = False, required: bool = True, checks: Sequence["pa.Check"] = ()) -> "pa.Column":
    """A column of non-empty text without control characters (line breaks and tabs are none).

    Args:
        optional: Whether values may be missing.
        required: Whether the column itself must be there.
        checks: Further ones.
    """
    import pandera.pandas as pa

    own = [*([] if optional else [given()]), *text_checks(), *checks]
    return pa.Column(nullable=True, required=required, checks=own)


def texts() -> "pa.Column":
    """A column of lists, each of at least one clean text."""
    import pandera.pandas as pa
    import pyarrow as arrow
    import pyarrow.compute as pc

    def whole(values: pd.Series) -> np.ndarray:
        lists = arrow.array(values.to_numpy(dtype=object), type=arrow.list_(arrow.string()), from_pandas=True)
        items = lists.flatten()
        clean = pc.and_(
            pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(items)), 0),
            pc.and_(pc.invert(pc.match_substring_regex(items, CONTROL)), pc.less_equal(pc.utf8_length(items), LONGEST)),
        )
        good = clean.fill_null(False).to_numpy(zero_copy_only=False)
        bad_rows = lists.value_parent_indices().to_numpy()[~good]
        filled = pc.greater(lists.value_lengths(), 0).fill_null(True).to_numpy(zero_copy_only=False)
        filled[bad_rows] = False
        return filled

    def passes(values: pd.Series) -> np.ndarray:
        try:
            if all(isinstance(value, list | tuple | np.ndarray) or is_missing(value) for value in values):
                return whole(values)
        except (arrow.ArrowInvalid, arrow.ArrowTypeError):
            pass
        # One row of another type hides the others from Arrow, so each is asked by itself.
        return np.array([_passes_alone(value, whole) for value in values], dtype=bool)

    return pa.Column(nullable=True, checks=[given(), vector(passes, "is a list of texts")])


def _passes_alone(value: object, whole: Callable[[pd.Series], np.ndarray]) -> bool:
    import pyarrow as arrow

    if isinstance(value, str) or is_missing(value):
        return is_missing(value)
    try:
        return bool(whole(pd.Series([as_list(value)], dtype=object))[0])
    except (arrow.ArrowInvalid, arrow.ArrowTypeError):
        return False


def as_list(value: object) -> list[Any]:
    """A cell's list, which Parquet hands back as an array; a value that is none alone in a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def prepared(**own: "pa.Column") -> "pa.DataFrameSchema":
    """The schema of prepared rows: what every task has, and its own columns."""
    import pandera.pandas as pa

    # Made of several columns, each of which was short enough, these may be longer.
    made = {
        name: pa.Column(nullable=True, checks=[given(), *(one for one in text_checks() if one.name != AT_MOST)])
        for name in ("prompt", "completion")
    }
    return pa.DataFrameSchema({"example_id": text(), **made, **own}, unique=["example_id"], strict=False)
