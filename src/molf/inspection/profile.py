"""What a file's columns hold, counted over all of its rows in chunks: memory does not grow with their number."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CHUNK = 20_000  # rows that are looked at together
SAMPLE = 2_000  # rows drawn for what is looked at row by row
FEW = 200  # so many different values are counted each by itself
VALUE = 200  # characters; a longer text is no label
MOST_DISTINCT = 5_000_000  # different values of a column that are told apart
MOST_COLUMNS = 500  # columns and fields of objects together
DEPTH = 4  # objects within objects that are looked into

TEXT, WHOLE, NUMBER, TRUTH, LIST, OBJECT = "text", "whole number", "number", "true or false", "list", "object"
KINDS = {str: TEXT, int: WHOLE, float: NUMBER, bool: TRUTH, list: LIST, dict: OBJECT}

TAG = r"(?i)</?(p|br|div|span|a|b|i|u|ul|ol|li|table|td|tr|h[1-6]|img|code|pre|em|strong|sub|sup)(\s[^<>]*)?/?>"
HTML = TAG + r"|&(amp|lt|gt|quot|nbsp|#\d+);"
# UTF-8 that somebody read as Latin-1 or Windows-1252 and saved again.
MOJIBAKE = "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00ef\u00bb\u00bf|\u00f0\u0178"


@dataclass
class Values:
    """How many different values a column has, and how often they repeat."""

    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    over: bool = False  # too many to be told apart

    def add(self, hashes: np.ndarray) -> None:
        if self.over:
            return
        fresh, times = np.unique(hashes, return_counts=True)
        self.hashes, place = np.unique(np.concatenate([self.hashes, fresh]), return_inverse=True)
        both = np.concatenate([self.counts, times])
        self.counts = np.bincount(place, weights=both, minlength=len(self.hashes)).astype(np.int64)
        if len(self.hashes) > MOST_DISTINCT:
            self.over, self.hashes, self.counts = True, self.hashes[:0], self.counts[:0]

    def __len__(self) -> int:
        return MOST_DISTINCT if self.over else len(self.hashes)

    @property
    def repeated(self) -> float:
        """Share of the values that stand in another row too."""
        total = self.counts.sum()
        return float(self.counts[self.counts > 1].sum() / total) if total else 0.0


@dataclass
class Column:
    """A column, or a field of an object in one, which is named by its path, such as `choices.text`.

    Attributes:
        rows, missing: Rows that were looked at; those in which it is null or lacks.
        kinds: How many cells are of each kind.
        distinct: Different values of cells that are no list and no object.
        few: How often each value stands; None where there are over FEW, or long ones.
        example: The first value.
        least, most: Of numbers, and of whole numbers written as text.
        numeric: Texts that are whole numbers.
        phrases: Texts of several words, or in a script of its own.
        spaced, html, mojibake: Texts with white space at an end, with HTML, with wrongly decoded characters.
        characters, longest, longest_at: Of all texts together; of the longest one, and its row.
        items: How many items of lists are of each kind; of texts in lists.
        lengths: How many lists have so many items.
        keys: How many objects in lists have a key.
    """

    name: str
    rows: int = 0
    missing: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    distinct: Values = field(default_factory=Values)
    few: Counter[str] | None = field(default_factory=Counter)
    example: Any = None
    least: float | None = None
    most: float | None = None
    numeric: int = 0
    phrases: int = 0
    spaced: int = 0
    html: int = 0
    mojibake: int = 0
    characters: int = 0
    longest: int = 0
    longest_at: int = 0
    items: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)

    @property
    def given(self) -> int:
        return self.rows - self.missing

    def mostly(self, *kinds: str) -> bool:
        """Whether nine in ten of its cells are of these kinds."""
        return self.given > 0 and sum(self.kinds[kind] for kind in kinds) >= 0.9 * self.given

    @property
    def is_whole(self) -> bool:
        """Whether nine in ten of its cells are whole numbers, as such or as text."""
        return self.given > 0 and self.kinds[WHOLE] + self.numeric >= 0.9 * self.given

    @property
    def is_words(self) -> bool:
        """Whether it holds what a template takes: text or numbers."""
        return self.mostly(TEXT, WHOLE, NUMBER)

    @property
    def is_free_text(self) -> bool:
        """Whether it holds text that is no label, no number and no key: words, and mostly others in each row."""
        words = self.mostly(TEXT) and not self.is_whole and self.phrases >= 0.5 * self.given
        return words and (self.few is None or len(self.few) > self.given / 5) and self.mean > 8

    @property
    def mean(self) -> float:
        """Characters of a text, on average."""
        return self.characters / max(1, self.kinds[TEXT])

    def _add(self, numbers: Sequence[int], cells: Sequence[Any]) -> None:
        """Cells of some rows.

        Args:
            numbers: Of the rows in their file.
            cells: None where it is missing.
        """
        self.rows += len(cells)
        cells = [None if isinstance(cell, float) and cell != cell else cell for cell in cells]  # NaN is missing
        types = Counter(map(type, cells))
        self.missing += types.pop(type(None), 0)
        for kind, count in types.items():
            self.kinds[KINDS[kind]] += count
        if not types:
            return
        if self.example is None:
            self.example = next(cell for cell in cells if cell is not None)
        plain = [cell for cell in cells if cell is not None and not isinstance(cell, list | dict)]
        if plain:
            self._add_plain([cell if isinstance(cell, str) else json.dumps(cell) for cell in plain])
        numbered = [cell for cell in plain if isinstance(cell, int | float) and not isinstance(cell, bool)]
        numbered = [cell for cell in numbered if abs(cell) != math.inf]
        if str in types:
            texts = {n: cell for n, cell in zip(numbers, cells, strict=True) if isinstance(cell, str)}
            numbered += self._add_texts(list(texts), list(texts.values()))
        if numbered:
            self.least = min([*numbered, *([] if self.least is None else [self.least])])
            self.most = max([*numbered, *([] if self.most is None else [self.most])])
        for cell in cells if list in types else ():
            if isinstance(cell, list):
                self.lengths[len(cell)] += 1
                for item in cell:
                    self.items[KINDS[type(item)] if item is not None else "null"] += 1
                    if isinstance(item, dict):
                        self.keys.update(list(item)[:50])

    def _add_plain(self, values: list[str]) -> None:
        known = [_encodable(value) for value in values if value]  # what is empty has nothing in common
        self.distinct.add(pd.util.hash_array(np.array(known, dtype=object), categorize=False))
        if self.few is not None:
            self.few.update(values)
            if len(self.few) > FEW or any(len(value) > VALUE for value in self.few):
                self.few = None

    def _add_texts(self, numbers: Sequence[int], texts: list[str]) -> list[float]:
        """Adds texts; returns those whole numbers that are written as text."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = pa.array(list(map(_encodable, texts)), pa.large_string())
        lengths = pc.utf8_length(column).to_numpy()
        self.characters += int(lengths.sum())
        if lengths.max() > self.longest:
            self.longest, self.longest_at = int(lengths.max()), int(numbers[int(lengths.argmax())])

        def count(mask: Any) -> int:
            return pc.sum(mask).as_py() or 0

        trimmed = pc.utf8_trim_whitespace(column)
        self.phrases += count(pc.match_substring_regex(trimmed, r"\s|[^\x00-\x7f]"))
        self.spaced += count(pc.not_equal(trimmed, column))
        self.html += count(pc.match_substring_regex(column, HTML))
        self.mojibake += count(pc.match_substring_regex(column, MOJIBAKE))
        whole = trimmed.filter(pc.match_substring_regex(trimmed, r"^[+-]?\d{1,15}$"))
        self.numeric += len(whole)
        if not len(whole):
            return []
        ends = pc.min_max(pc.cast(pc.replace_substring_regex(whole, r"^\+", ""), pa.int64()))
        return [ends["min"].as_py(), ends["max"].as_py()]


@dataclass
class Profile:
    """What the rows of one split hold.

    Attributes:
        rows: All.
        unread: {check: how many rows could not be read because of it}.
        columns: By name, in the order in which they came; below an object's those of its fields.
        sample: Rows drawn evenly, as objects.
        first: The first rows: (number in the file, object).
    """

    rows: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    columns: dict[str, Column] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)
    first: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    crowded: bool = False  # over MOST_COLUMNS, of which the rest is not looked at

    @property
    def top(self) -> dict[str, Column]:
        """Columns of the file itself, without fields of objects."""
        return {name: column for name, column in self.columns.items() if name in self._names}

    _names: dict[str, None] = field(default_factory=dict)

    def _add(self, numbers: Sequence[int], records: Sequence[dict[str, Any]], shown: int) -> None:
        self._names.update(dict.fromkeys(name for record in records for name in record))
        for number, record in zip(numbers, records, strict=True):
            if len(self.first) >= shown:
                break
            self.first.append((number, record))
        self._add_fields("", numbers, records, 0)

    def _add_fields(self, prefix: str, numbers: Sequence[int], records: Sequence[Any], depth: int) -> None:
        """Cells below each name of some objects; what is no object has none of them."""
        names = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
        # What no row of this chunk has is missing in all of them.
        if depth == 0:
            names = dict.fromkeys([*self._names, *names])
        for name in names:
            path = f"{prefix}{name}"
            if path not in self.columns and len(self.columns) >= MOST_COLUMNS:
                self.crowded = True
                continue
            cells = [record.get(name) if isinstance(record, dict) else None for record in records]
            column = self.columns.setdefault(path, Column(path, self.rows, self.rows))
            column._add(numbers, cells)
            if depth + 1 < DEPTH and any(isinstance(cell, dict) for cell in cells):
                self._add_fields(f"{path}.", numbers, cells, depth + 1)


def measured(path: Path, shown: int) -> Profile:
    """Looks at raw rows as `fetch` keeps them.

    Args:
        path: SPLIT.parquet of data/raw/TASK.
        shown: First rows that are kept to be shown.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    found, total = Profile(), file.metadata.num_rows
    drawn = set(np.random.default_rng(0).choice(total, min(SAMPLE, total), replace=False).tolist())
    at = 0
    for batch in _progress(file.iter_batches(batch_size=CHUNK, columns=["source_row", "record", "problem"]), total):
        rows = batch.to_pydict()
        found.unread.update(problem for problem in rows["problem"] if problem is not None)
        read = [i for i, problem in enumerate(rows["problem"]) if problem is None]
        records = [json.loads(rows["record"][i]) for i in read]
        found._add([rows["source_row"][i] for i in read], records, shown)
        found.sample += [record for i, record in zip(read, records, strict=True) if at + i in drawn]
        at += len(batch)
        found.rows += len(read)
    for column in found.columns.values():  # of fields that only some chunks have
        column.missing += found.rows - column.rows
        column.rows = found.rows
    found.rows = total
    return found


def _encodable(text: str) -> str:
    """The text, with halves of surrogate pairs replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _progress(batches: Iterator[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc="looking", unit=" rows", disable=None, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
