"""What looks wrong with a file, a sentence each. Pure functions."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from molf.inspection.forms import Guess, at
from molf.inspection.profile import Column, Profile

FEW_ROWS = 100
FAR = 20  # so many times as long as the 95th percentile is far from the rest
LABELS = 50  # so many different answers are labels


def of_rows(summary: dict[str, Any], max_rejected: float) -> list[str]:
    """What `prepare` says of rows: rejected ones by reason, copies, warnings."""
    said = []
    raw = sum(count["raw"] for count in summary["rows"].values())
    bad = sum(count["rejected"] for count in summary["rows"].values())
    if bad:
        verdict = "prepare will stop" if bad > max_rejected * raw else "prepare leaves them out"
        said.append(
            f"{bad:,} of {raw:,} rows ({bad / raw:.2%}) fail a check; max_rejected is {max_rejected:.0%}, so {verdict}:"
        )
    for reason in summary["reasons"]:
        first = reason["first"]
        value = f" ({first['value']!r})" if first["value"] and reason["column"] != "(row)" else ""
        said.append(
            f"    {reason['split']}, {reason['column']}: {reason['check']}: {_many(reason['rows'], 'row')}, first at "
            f"row {first['source_row']}{value}"
        )
    for split, count in summary["rows"].items():
        if count["duplicates"]:
            said.append(f"{split}: {_many(count['duplicates'], 'row')} equal to one before; each is kept once")
    for leak in summary["leaks"]:
        both = f"{leak['exact']:,} with an equal prompt, {leak['near']:,} near copies"
        # Of a split that is cut here they just leave.
        given = {leak["split"], leak["of_split"]} <= set(summary["source"]["files"])
        done = "prepare will stop; set duplicates.across to drop or keep" if given else "they are left out"
        said.append(f"{leak['split']} rows also in {leak['of_split']}: {both}: {done}")
    warnings = [text for text in summary["warnings"] if "are kept there: scores flatter" not in text]
    return said + [text.replace(" (copies.parquet)", "") for text in warnings]


def of_columns(found: Profile, names: Sequence[str], answer: str | None) -> list[str]:
    """What is odd in some columns.

    Args:
        found: Of the train file.
        names: Columns that are used.
        answer: The one with the answer, or None.
    """
    said = [_unread(found, check, count) for check, count in found.unread.most_common()] if answer is None else []
    if found.rows < FEW_ROWS:
        said.append(f"{_many(found.rows, 'row')}: few; scores on a tenth of them say little")
    if found.crowded:
        said.append("there are too many columns to look at all; the first ones were")
    for name in names:
        column = found.columns.get(name)
        if column is None or not column.given:
            continue
        kinds = [(kind, count) for kind, count in column.kinds.most_common() if count]
        if len(kinds) > 1:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            said.append(f"`{name}` mixes types: {listed}")
        said += _texts(column)
        if name == answer and column.few is not None and len(column.few) <= LABELS:
            said += _alike(name, column.few)
            said += _rare(name, column.few)
    return said


def _unread(found: Profile, check: str, count: int) -> str:
    return f"{count:,} of {_many(found.rows, 'row')} cannot be read: '{check}' fails"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _texts(column: Column) -> list[str]:
    odd = [
        # Where nearly all have some, it is the form and no slip.
        (
            column.spaced * (column.spaced < 0.9 * column.given),
            "white space at an end, which a column alone loses and a template keeps",
        ),
        (column.html, "HTML tags or entities"),
        (
            column.mojibake,
            "characters such as '\u00c3\u00a9' or '\u00e2\u20ac\u2122': UTF-8 that was read in another encoding",
        ),
    ]
    said = [
        f"`{column.name}`: {_many(count, 'text')} ({count / column.given:.1%}) with {what}"
        for count, what in odd
        if count
    ]
    if column.longest > FAR * max(100, column.mean):
        said.append(
            f"`{column.name}`: the longest text, at row {column.longest_at:,}, has {column.longest:,} characters, the "
            f"average {column.mean:,.0f}"
        )
    return said


def _alike(name: str, few: Counter[str]) -> list[str]:
    """Labels that differ in case and white space only."""
    spelled: dict[str, list[str]] = {}
    for value in few:
        spelled.setdefault(re.sub(r"[\s_-]+", " ", value).strip().casefold(), []).append(value)
    return [
        f"`{name}`: {', '.join(f'{value!r} ({few[value]:,})' for value in values)} look like one label, and are "
        f"{len(values)}"
        for values in spelled.values()
        if len(values) > 1
    ]


def _rare(name: str, few: Counter[str]) -> list[str]:
    """Labels that hardly ever come."""
    rows = few.total()
    rare = [value for value, count in few.items() if count < max(2, rows / 5000)]
    if rows < FEW_ROWS or not rare or len(rare) > len(few) / 2:
        return []
    shown = ", ".join(f"{value!r} ({few[value]})" for value in rare[:5])
    return [f"`{name}`: {len(rare)} of {len(few)} labels are rare: {shown}"]


def of_groups(chosen: str | None, others: Sequence[str], found: Profile) -> list[str]:
    """Columns whose values repeat, so that rows may not be independent."""
    said = []
    if chosen is not None:
        distinct = found.columns[chosen].distinct
        said.append(
            f"`{chosen}` has {len(distinct):,} values, and {distinct.repeated:.0%} of the rows share theirs with "
            f"another: split.group: {chosen} keeps such rows in one split; null if they have nothing in common"
        )
    if others:
        said.append(
            f"values of {', '.join(f'`{name}`' for name in others[:5])} repeat too: name one in split.group if rows "
            "that share it must not be torn apart"
        )
    return said


def hidden(found: Profile, guess: Guess) -> bool:
    """Whether a split has no answers, as the published test files of many benchmarks: none, or -1 in all rows."""
    values = [at(record, guess.answer) for record in found.sample]
    return all(value in (None, "", -1, "-1") for value in values)


def of_splits(profiles: dict[str, Profile], guess: Guess | None) -> list[str]:
    """What splits do not have in common."""
    said = []
    needed = guess.columns() if guess is not None else set(profiles["train"].top)
    for split, found in profiles.items():
        lacking = sorted(
            name
            for name in needed
            if name.split(".")[0] in profiles["train"].top and name.split(".")[0] not in found.top
        )
        if lacking:
            said.append(f"{split}: the file lacks {', '.join(lacking)}, which train has")
    return said


def of_lengths(shares: dict[str, float], name: str, max_length: int, longest: int, model: str) -> list[str]:
    """Examples that training leaves out, and answers that evaluation cuts.

    Args:
        shares: `over`: of examples that are too long; `cut`: of answers that are.
        name: Of the task.
        max_length: training.max_length for it.
        longest: Tokens within which nearly all examples are.
        model: Whose tokens; empty where they are estimated.
    """
    said = []
    about = "" if model else "about "
    if shares["over"]:
        said.append(
            f"{about}{shares['over']:.1%} of the examples are over training.max_length ({max_length}) and left out of "
            f"training: set tasks.{name}.training to {{max_length: {longest}}} for 99 % of them"
        )
    if shares["cut"]:
        said.append(
            f"{about}{shares['cut']:.1%} of the answers are longer than evaluation.max_new_tokens allows "
            f"({shares['allowed']:.0f}), so no model can score there; raise it"
        )
    return said
