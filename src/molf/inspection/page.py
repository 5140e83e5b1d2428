"""What `molf inspect` prints: the file, its columns and rows, lengths, and the block to paste.

Everything that comes from the file goes through `plain`: a hostile file must not drive the terminal.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molf.errors import plain
from molf.inspection.forms import Guess
from molf.inspection.profile import LIST, OBJECT, Column, Profile
from molf.inspection.trial import Lengths

BAR = 40  # characters of the longest bar
MOST_LINES = 30  # of a rendered prompt
MOST_SHOWN = 40  # columns
RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "none", "nan", "inf"}


def cut(text: str, width: int) -> str:
    """At most so many columns of a terminal, where some characters take two and some none."""
    used = 0
    for i, char in enumerate(text):
        used += 2 if unicodedata.east_asian_width(char) in "WF" else 0 if unicodedata.combining(char) else 1
        if used > width:
            return text[: max(0, i - 3)] + "..."
    return text


def _value(value: Any) -> str:
    """A cell on one line."""
    if isinstance(value, str):
        return plain(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return plain(text)


def header(split: str, files: Sequence[Mapping[str, Any]], found: Profile, several: bool) -> list[str]:
    """The file, or the files of a split."""
    lines = []
    for file in files:
        size = f", {file['bytes']:,} bytes, sha256 {file['sha256'][:16]}..." if file["bytes"] is not None else ""
        first = "" if file["bytes"] is not None else "the first "
        lines.append(f"{split + ': ' if several else ''}{plain(file['from'])}: {first}{file['rows']:,} rows{size}")
    unread = sum(found.unread.values())
    if unread:
        lines.append(f"  {unread:,} of them cannot be read")
    return lines


def columns(found: Profile, width: int) -> list[str]:
    """A line for each column."""
    rows = [("column", "holds", "missing", "distinct", "example")]
    shown = [column for name, column in found.columns.items() if name in found.top or not column.mostly(OBJECT)]
    for column in shown[:MOST_SHOWN]:
        if column.mostly(LIST, OBJECT):
            distinct = ""
        else:
            distinct = f"{'over ' if column.distinct.over else ''}{len(column.distinct):,}"
        rows.append((plain(column.name), _holds(column), _percent(column.missing, column.rows), distinct, ""))
        rows[-1] = (*rows[-1][:4], _value(column.example) if column.example is not None else "")
    wide = [min(40, max(len(row[i]) for row in rows)) for i in range(4)]
    lines = []
    for row in rows:
        start = f"  {row[0]:{wide[0]}}  {row[1]:{wide[1]}}  {row[2]:>{wide[2]}}  {row[3]:>{wide[3]}}  "
        lines.append(cut(start + row[4], width))
    if len(shown) > MOST_SHOWN:
        lines.append(f"  and {len(shown) - MOST_SHOWN} more")
    return lines


def _holds(column: Column) -> str:
    names = [kind for kind, _ in column.kinds.most_common()]
    if names == [LIST]:
        items = [kind for kind, _ in column.items.most_common()]
        return f"list of {' or '.join(items)}" if items else "empty lists"
    return " or ".join(names) or "nothing"


def _percent(part: int, whole: int) -> str:
    share = part / whole if whole else 0
    return "-" if not part else f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def rows(found: Profile, width: int) -> list[str]:
    """The first rows, a cell a line, each cut."""
    lines = []
    for number, record in found.first:
        for i, (name, value) in enumerate((n, v) for n, v in record.items() if v is not None):
            start = f"  {number if i == 0 else '':>5}  "
            lines.append(cut(f"{start}{plain(name)}: {_value(value)}", width))
    return lines


def example(first: Mapping[str, Any], width: int) -> list[str]:
    """The first row as the model sees it."""
    lines = []
    for part in ("prompt", "completion"):
        text = [plain(line) for line in str(first[part]).split("\n")]
        hidden = len(text) - MOST_LINES
        text = [*text[:MOST_LINES], *([f"... {hidden} more lines"] if hidden > 0 else [])]
        lines += [cut(f"  {part if i == 0 else '':>10} | {line}", width) for i, line in enumerate(text)]
    return lines


def histogram(lengths: Lengths, max_length: int, width: int) -> list[str]:
    """Tokens of prompt and completion together, in bins that each are twice as wide as the one before."""
    total = lengths.total
    low, middle, high = np.percentile(total, [50, 95, 100], method="nearest").tolist()
    answers = np.percentile(lengths.completions, [50, 95, 100], method="nearest").tolist()
    drawn = f"{len(total):,} of {lengths.rows:,} examples, drawn" if len(total) < lengths.rows else "all examples"
    if lengths.model is None:
        title = f"length in tokens, estimated as a quarter of the bytes ({drawn}); {lengths.why}"
    else:
        title = f"length in tokens of {lengths.model} ({drawn}), prompt and completion together"
    lines = [
        f"{title}:",
        f"  median {low:,}, 95th percentile {middle:,}, longest {high:,}; "
        f"completions alone: {answers[0]:,}, {answers[1]:,}, {answers[2]:,}",
    ]
    edges = [0, 16]
    while edges[-1] <= high:
        edges.append(edges[-1] * 2)
    counts = np.histogram(total, bins=edges)[0]
    room = min(BAR, max(10, width - 40))
    for start, end, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        bar = "#" * -(-count * room // max(1, counts.max()))
        mark = f"  <- training.max_length {max_length}" if start <= max_length < end else ""
        lines.append(f"  {start:>7,} to {end - 1:>7,}  {count / len(total):>6.1%}  {bar}{mark}")
    return lines


# --- the block -----------------------------------------------------------------------------------------------------


def block(
    guess: Guess,
    source: Mapping[str, Any],
    limits: Mapping[str, int | None],
    group: str | None,
) -> dict[str, Any]:
    """A block of `tasks` as plain data."""
    options = dict(guess.options)
    if guess.kind == "choice":
        options.setdefault("subject", None)
    return {
        "kind": guess.kind,
        "source": dict(source),
        "license": "unknown",
        "limits": dict(limits),
        "split": {"validation": 0.1, "test": 0.1, "seed": 0, "group": group},
        "duplicates": {"similarity": 0.85, "across": "fail"},
        "max_rejected": 0.01,
        "options": options,
        "training": {},
    }


COMMENTS = {
    "license": "of the data, such as apache-2.0; it goes out with the trained model's card",
    "limits": "most rows a split keeps; null: all",
    "split": "what the source has no split for is cut off train",
    "duplicates": "near copies in two splits: fail, drop, keep",
    "max_rejected": "share of bad rows above which prepare fails",
    "training": "overrides of `training` for this task, such as {max_length: 512}",
}


def yaml(name: str, content: Mapping[str, Any], said: str) -> str:
    """The block as it stands in params.yaml, below `tasks:`.

    Args:
        name: Of the task.
        content: As `block` makes it.
        said: Comment of the first line.
    """
    lines = ["tasks:", f"  {name}: # {plain(said)}"]
    for key, value in content.items():
        comment = f" # {COMMENTS[key]}" if key in COMMENTS else ""
        if key in ("options", "source") and len(flow(value)) > 70:
            lines.append(f"    {key}:{comment}")
            lines += [f"      {inner}: {flow(content)}" for inner, content in value.items()]
        else:
            lines.append(f"    {key}: {flow(value)}{comment}")
    return "\n".join(lines)


def flow(value: Any) -> str:
    """A value as YAML on one line, in which every character shows."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*( [\w./-]+)*", value, re.ASCII) and value.lower() not in RESERVED:
        return value
    return '"' + "".join(map(_quoted, value)) + '"'


def _quoted(char: str) -> str:
    """A character between YAML's double quotes."""
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    if char == "\t":
        return "\\t"
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
