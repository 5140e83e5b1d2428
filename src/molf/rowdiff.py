"""What happened to the rows of a table between two versions of it."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 8_192  # rows that are in memory at once: long ones must fit
EXAMPLES = 3  # rows that are kept of each kind of change
SAMPLE = 100  # rows whose columns are looked at
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
# Columns that tell where a row stood, not what it says; a row put in above it changes them.
PLACES = ("file", "source_row", "example_id")
ID = re.compile(r"_?(id|uid|uuid|guid)|.+[_.-](id|uid|uuid|guid)|.+[a-z](Id|ID|Uuid|UUID)", flags=re.ASCII)


class Rows:
    """A split's table, read in batches: what is kept of a row is a number that stands for its content.

    A raw row's columns are those of its record; a prepared row's, the table's own.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = pq.ParquetFile(file)
        self.raw = "record" in self._file.schema_arrow.names
        names = self._file.schema_arrow.names
        self.columns = ["record"] if self.raw else [name for name in names if name not in PLACES]

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def contents(self, columns: list[str]) -> np.ndarray:
        """A hash of each row's content, uint64 (rows,)."""
        parts = [np.zeros(0, np.uint64)]
        for batch in self._file.iter_batches(BATCH, columns=columns):
            total = np.zeros(batch.num_rows, np.uint64)
            for column in batch.columns:
                total = total * MIX + pd.util.hash_array(_texts(column), categorize=False)
            parts.append(total)
        return np.concatenate(parts)

    def meanings(self, rows: np.ndarray) -> np.ndarray:
        """A hash of what these rows' records mean, whatever the order of their keys: uint64 (len(rows),)."""
        texts = (json.dumps(row, sort_keys=True) for _, row in self.read(rows))
        parts = [np.zeros(0, np.uint64)]
        while part := list(itertools.islice(texts, BATCH)):
            parts.append(pd.util.hash_array(np.array(part, object), categorize=False))
        return np.concatenate(parts)

    def keys(self, name: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """A hash of each row's value in a column, uint64 (rows,); whether it has one, (rows,); whether all have."""
        hashes, present = np.zeros(len(self), np.uint64), np.zeros(len(self), bool)
        complete, start = True, 0
        for batch in self._file.iter_batches(BATCH, columns=["record"] if self.raw else [name]):
            values = np.empty(batch.num_rows, object)
            if self.raw:
                for i, text in enumerate(batch.column(0).to_pylist()):
                    row = json.loads(text)
                    if isinstance(row, dict):  # else a row that could not be parsed
                        value = row.get(name)
                        complete = complete and value is not None
                        values[i] = value if value is None or isinstance(value, str) else json.dumps(value)
            else:
                values[:] = _texts(batch.column(0))
                values[batch.column(0).is_null().to_numpy(zero_copy_only=False)] = None
                complete = complete and not batch.column(0).null_count
            there = np.array([value is not None for value in values], bool)
            values[~there] = ""
            part = slice(start, start + batch.num_rows)
            hashes[part], present[part] = pd.util.hash_array(values, categorize=False), there
            start = part.stop
        return hashes, present, complete

    def read(self, rows: np.ndarray, places: bool = False) -> Iterator[tuple[int, Any]]:
        """(position, content) of the rows at these ascending positions: a mapping, or the text of a broken raw row.

        Args:
            rows: Positions from 0.
            places: Whether the content is of the columns that tell the row's place instead.
        """
        names = self._file.schema_arrow.names
        columns = [name for name in names if name in PLACES] if places else self.columns
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        ends = np.cumsum([0, *groups])
        needed = [i for i in range(len(groups)) if np.searchsorted(rows, ends[i]) < np.searchsorted(rows, ends[i + 1])]
        for group in needed:
            start = int(ends[group])
            for batch in self._file.iter_batches(BATCH, row_groups=[group], columns=columns):
                first, last = np.searchsorted(rows, [start, start + batch.num_rows])
                chosen = batch.take(pa.array(rows[first:last] - start)).to_pylist()
                for position, row in zip(rows[first:last].tolist(), chosen, strict=True):
                    yield position, json.loads(row["record"]) if self.raw and not places else row
                start += batch.num_rows


def compare_tables(before: dict[str, Rows], now: dict[str, Rows], key: str | None = None) -> dict[str, dict[str, Any]]:
    """What happened to the rows of the splits of a data set.

    Rows of equal content are the same, wherever they stand; in another split, they moved. Of the others in a split, a
    row before and a row now are one row that changed if they share the value of the key; without one, if they stand at
    the same place between rows that stayed.

    Args:
        before: {split: its earlier table}, of those there were.
        now: {split: its later table}.
        key: Column by which rows are told apart; None takes one named like an id that all rows have, each its own.

    Returns:
        {split: numbers of rows before and now, same, added, removed, changed, moved_in and moved_out (from and to other
        splits). by: how changed rows were found: the column, `place`, or `content` where none had to be found.
        reordered: whether rows that stayed have another order. columns: {added, removed}, prepared ones that came or
        went, and were not compared. examples: {changed, added, removed: [{place, fields}]}, a changed row's fields
        those that differ, {before, now}}.
    """
    names = [set(table.columns) for table in (*before.values(), *now.values())]
    shared = [name for name in next(iter([*before.values(), *now.values()])).columns if all(name in n for n in names)]
    splits = {split: _Split(before.get(split), now.get(split), shared) for split in dict.fromkeys([*before, *now])}
    if any(split.gone.size for split in splits.values()) and any(split.come.size for split in splits.values()):
        for split in splits.values():
            split.look_closer()
        old, new = ([getattr(split, side) for split in splits.values()] for side in ("gone_hashes", "come_hashes"))
        gone, come = _pairs(np.concatenate(old), np.concatenate(new))
        for split, left, right in zip(splits.values(), _parts(gone, old), _parts(come, new), strict=True):
            split.move(left, right)
    return {name: split.told(key) for name, split in splits.items()}


def _parts(positions: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Positions in joined arrays as those in each of them."""
    ends = np.cumsum([0, *map(len, parts)])
    ordered = np.sort(positions)
    cuts = np.searchsorted(ordered, ends)
    return [ordered[cuts[i] : cuts[i + 1]] - ends[i] for i in range(len(parts))]


class _Split:
    """One split's rows at both times, and which of them are still open: neither the same nor moved.

    Attributes:
        partner: Of each row before, the equal row now, or -1: (rows before,).
        gone: Open rows before, ascending positions; gone_hashes, their contents.
        come: Open rows now; come_hashes.
    """

    def __init__(self, before: Rows | None, now: Rows | None, columns: list[str]) -> None:
        self.before, self.now, self.columns = before, now, columns
        old, new = (np.zeros(0, np.uint64) if table is None else table.contents(columns) for table in (before, now))
        self.partner = np.full(len(old), -1)
        self.later = len(new)
        self.moved_out = self.moved_in = 0
        self._match(*_pairs(old, new))
        self.gone_hashes, self.come_hashes = old[self.gone], new[self.come]

    def _match(self, left: np.ndarray, right: np.ndarray) -> None:
        self.partner[left] = right
        free = np.ones(self.later, bool)
        free[self.partner[self.partner >= 0]] = False
        self.gone, self.come = np.flatnonzero(self.partner < 0), np.flatnonzero(free)

    def look_closer(self) -> None:
        """Takes open raw rows for what their records mean."""
        if self.before is not None and self.before.raw:
            self.gone_hashes = self.before.meanings(self.gone)
        if self.now is not None and self.now.raw:
            self.come_hashes = self.now.meanings(self.come)
        i, j = _pairs(self.gone_hashes, self.come_hashes)
        self.gone_hashes, self.come_hashes = np.delete(self.gone_hashes, i), np.delete(self.come_hashes, j)
        self._match(self.gone[i], self.come[j])

    def move(self, left: np.ndarray, right: np.ndarray) -> None:
        """Closes open rows, by their number among these, that stand in another split."""
        self.moved_out, self.moved_in = len(left), len(right)
        self.gone, self.come = np.delete(self.gone, left), np.delete(self.come, right)

    def told(self, key: str | None) -> dict[str, Any]:
        by, i, j = self._changed(key)
        changed = np.stack([self.gone[i], self.come[j]], axis=1)
        removed, added = np.delete(self.gone, i), np.delete(self.come, j)
        stayed = self.partner[self.partner >= 0]
        old, new = (self.columns if table is None else table.columns for table in (self.before, self.now))
        return {
            **{"before": len(self.partner), "now": self.later, "same": len(stayed)},
            **{"added": len(added), "removed": len(removed), "changed": len(changed), "by": by},
            **{"moved_in": self.moved_in, "moved_out": self.moved_out},
            "reordered": bool((np.diff(stayed) < 0).any()),
            "columns": {
                "added": [name for name in new if name not in self.columns],
                "removed": [name for name in old if name not in self.columns],
            },
            "examples": {
                "changed": _changed_examples(self.before, self.now, changed[:EXAMPLES]),
                "added": _examples(self.now, added[:EXAMPLES]),
                "removed": _examples(self.before, removed[:EXAMPLES]),
            },
        }

    def _changed(self, key: str | None) -> tuple[str, np.ndarray, np.ndarray]:
        """How changed rows were found, and their numbers among the open rows before and now."""
        before, now, gone, come = self.before, self.now, self.gone, self.come
        if before is None or now is None or not (len(gone) and len(come)):
            none = np.zeros(0, int)
            return "content", none, none
        for name in [key] if key is not None else _ids(before, now, gone, come):
            if not before.raw and name not in self.columns:
                continue
            (old, old_has, old_all), (new, new_has, new_all) = before.keys(name), now.keys(name)
            own = old_all and new_all and all(pd.Index(k[has]).is_unique for k, has in ((old, old_has), (new, new_has)))
            if own or key is not None and old_has.any() and new_has.any():
                left, right = np.flatnonzero(old_has[gone]), np.flatnonzero(new_has[come])
                i, j = _pairs(old[gone[left]], new[come[right]])
                return name, left[i], right[j]
        # The nearest row above that stayed tells the place, so that rows put in further up move nothing.
        above = np.maximum.accumulate(np.where(self.partner >= 0, np.arange(len(self.partner)), -1))
        anchors = np.where(above >= 0, self.partner[above], -1)[gone]
        stayed = np.zeros(self.later, bool)
        stayed[self.partner[self.partner >= 0]] = True
        later = np.maximum.accumulate(np.where(stayed, np.arange(self.later), -1))[come]
        return "place", *_pairs(anchors.astype(np.uint64), later.astype(np.uint64))


def unread_rows(before: int, now: int) -> dict[str, Any]:
    """The same of a split that is equal at both times, or of a data set that is new or gone: by numbers of rows."""
    return {
        **{"before": before, "now": now, "same": min(before, now)},
        **{"added": max(0, now - before), "removed": max(0, before - now), "changed": 0, "by": "content"},
        **{"moved_in": 0, "moved_out": 0, "reordered": False, "columns": {"added": [], "removed": []}, "examples": {}},
    }


def _pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal hashes in both, the n-th of one value with the n-th; the first ascend."""

    def numbered(hashes: np.ndarray) -> np.ndarray:
        occurrence = pd.Series(hashes).groupby(hashes).cumcount().to_numpy().astype(np.uint64)
        return hashes + occurrence * MIX

    found = pd.Index(numbered(right)).get_indexer(pd.Index(numbered(left)))
    (there,) = np.nonzero(found >= 0)
    return there, found[there]


def _ids(before: Rows, now: Rows, gone: np.ndarray, come: np.ndarray) -> list[str]:
    """Columns named like ids that the first open rows of both have, plain `id` first."""

    def names(table: Rows, rows: np.ndarray) -> dict[str, None]:
        found = [row for _, row in table.read(rows[:SAMPLE]) if isinstance(row, dict)]
        return dict.fromkeys(name for row in found for name in row)

    there = names(now, come)
    shared = [name for name in names(before, gone) if name in there and ID.fullmatch(name)]
    return sorted(shared, key=lambda name: name != "id")


def _texts(column: pa.Array) -> np.ndarray:
    """A column's values as text, object (rows,); null is a text that no file can hold."""
    if pa.types.is_nested(column.type):
        return np.array([json.dumps(value, sort_keys=True, default=str) for value in column.to_pylist()], object)
    texts = column if pa.types.is_large_string(column.type) else column.cast(pa.large_string())
    return pc.fill_null(texts, "\0").to_numpy(zero_copy_only=False)


def _examples(table: Rows | None, rows: np.ndarray) -> list[dict[str, Any]]:
    if table is None:
        return []
    places = dict(table.read(rows, places=True))
    return [{"place": places[position], "fields": row} for position, row in table.read(rows)]


def _written(row: dict[str, Any], name: str) -> str:
    """A field as JSON, by which 1 is neither true nor 1.0; nothing where the row lacks it."""
    return json.dumps(row[name], sort_keys=True, default=str) if name in row else ""


def _changed_examples(before: Rows | None, now: Rows | None, pairs: np.ndarray) -> list[dict[str, Any]]:
    """Of each pair of positions, the fields that differ."""
    if before is None or now is None:
        return []
    old, new = dict(before.read(np.sort(pairs[:, 0]))), dict(now.read(np.sort(pairs[:, 1])))
    places = dict(now.read(np.sort(pairs[:, 1]), places=True))
    found = []
    for first, second in pairs.tolist():
        sides = {"before": old[first], "now": new[second]}
        rows = {side: row if isinstance(row, dict) else {"(row)": row} for side, row in sides.items()}
        fields = {
            name: {side: row[name] for side, row in rows.items() if name in row}
            for name in dict.fromkeys([*rows["before"], *rows["now"]])
            if len({_written(row, name) for row in rows.values()}) > 1
        }
        found.append({"place": places[second], "fields": fields})
    return found
