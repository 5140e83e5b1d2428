"""What is known of a data set, as tables of text: for the page, the data card and MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNTS = {  # of summary.json's rows, and what stands above the column
    "raw": "raw",
    "kept": "kept",
    "rejected": "rejected",
    "duplicates": "equal copies left out",
    "near_duplicates": "near copies",
    "dropped": "copies of other splits left out",
    "limited": "over the limit",
}
HASH = 12  # hexadecimal digits that a table shows of a sha256


@dataclass(frozen=True)
class Table:
    """A table of text: what it shows, its header and its rows, and whether a page folds it away."""

    title: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False


def tables(data: Mapping[str, Any]) -> list[Table]:
    """The tables of a data set that have something to show.

    Args:
        data: Its description as `run.json` keeps it; what an earlier molf did not write is left out.
    """
    found = [
        Table("Rows", ["split", *COUNTS.values()], [_counts(split, row) for split, row in _items(data, "rows")]),
        _reasons("Rejected rows by reason", data, "reasons"),
        _reasons("Kept though a check failed, by reason", data, "noticed"),
        Table(
            "Copies across splits",
            ["split", "also in", "equal prompts", "near copies", "left out"],
            [
                [leak["split"], leak["of_split"], *(f"{leak[key]:,}" for key in ("exact", "near", "dropped"))]
                for leak in _listed(data, "leaks")
            ],
        ),
        Table(
            "Answers",
            ["split", "different", "most common's share", "the most common"],
            [
                [split, f"{answers['distinct']:,}", f"{answers['share']:.1%}", answers["most_common"]]
                for split, answers in _items(data, "answers")
            ],
        ),
        Table(
            "Lengths in characters",
            ["split", "text", "median", "95 % at most", "longest"],
            [
                [split, text, *(f"{lengths[key]:,}" for key in ("median", "p95", "longest"))]
                for split, texts in _items(data, "lengths")
                for text, lengths in texts.items()
            ],
            folded=True,
        ),
        Table("Source", ["split", "rows", "bytes", "sha256", "from"], _files(data), folded=True),
    ]
    return [table for table in found if table.rows]


def origin(source: Any) -> str:
    """A data set's source in words: generator and seed, files, or hub id and revision."""
    if not isinstance(source, Mapping):
        return str(source)
    match source.get("kind"):
        case "generated":
            return "the built-in generator" + (f", seed {source['seed']}" if "seed" in source else "")
        case "hub":
            config = f" ({source['config']})" if source.get("config") else ""
            return f"hub data set {source.get('id')}{config} at {source.get('revision')}"
        case kind:
            names = [str(file["from"]) for files in files_of(source).values() for file in files]
            return f"{kind}: {', '.join(dict.fromkeys(names))}" if names else str(kind)


def files_of(source: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """{split: its files} of a source; an earlier molf noted one file without a list."""
    given = source.get("files") or {}
    return {split: files if isinstance(files, list) else [files] for split, files in given.items()}


def rejected(data: Mapping[str, Any]) -> int:
    """Rows that were rejected, of all splits."""
    return sum(row.get("rejected", 0) for _, row in _items(data, "rows"))


def leaked(data: Mapping[str, Any]) -> tuple[int, int]:
    """Rows with a copy in another split: found, and kept there all the same."""
    leaks = _listed(data, "leaks")
    found = sum(leak["exact"] + leak["near"] for leak in leaks)
    return found, found - sum(leak["dropped"] for leak in leaks)


def _counts(split: str, row: Mapping[str, int]) -> list[str]:
    if not row.get("raw"):  # the source has no such split
        return [split, "of train", *(f"{row[key]:,}" if row.get(key) else "" for key in list(COUNTS)[1:])]
    return [split, *(f"{row[key]:,}" if key in row else "" for key in COUNTS)]


def _reasons(title: str, data: Mapping[str, Any], key: str) -> Table:
    names = files_of(data["source"]) if isinstance(data.get("source"), Mapping) else {}
    rows = []
    for reason in _listed(data, key):
        first, files = reason["first"], names.get(reason["split"], [])
        place = f"row {first['source_row']:,}"
        if len(files) > 1 and first["file"] < len(files):
            place += f" of {files[first['file']]['from']}"
        rows.append(
            [reason["split"], f"{reason['rows']:,}", reason["column"], reason["check"], place, str(first["value"])]
        )
    return Table(title, ["split", "rows", "column", "check", "first at", "its value"], rows)


def _files(data: Mapping[str, Any]) -> list[list[str]]:
    source = data.get("source")
    if not isinstance(source, Mapping):
        return []
    return [
        [
            split,
            f"{file['rows']:,}" if "rows" in file else "",
            f"{file['bytes']:,}" if file.get("bytes") is not None else "",
            (file.get("sha256") or "")[:HASH],
            str(file["from"]),
        ]
        for split, files in files_of(source).items()
        for file in files
    ]


def _items(data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = data.get(key)
    return list(value.items()) if isinstance(value, Mapping) else []


def _listed(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = data.get(key)
    return value if isinstance(value, list) else []
