"""Held-out text that is no task's, from the generator, a file or a hub data set: what forgetting is measured on."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from molf.blocks import FileText, GeneralBlock, GeneratedText, HubText, NoText
from molf.errors import UserError
from molf.paths import file_hash, read_json, write_json, write_parquet
from molf.raw import hub_revision, hub_rows
from molf.readers import IS_UTF_8, Row, RowFile, encodable

SOME_TEXT = "has text"
IS_TEXT = "is text"
KEPT = 100_000  # characters of one text: no model's window holds more, and a file without a blank line is one text


class Given(NamedTuple):
    """A row of the source: what it is called, its text as it came, and the check that it failed, if any."""

    text_id: str
    text: Any
    problem: str | None = None


def collect(block: GeneralBlock, directory: Path) -> dict[str, Any]:
    """Brings the general text into a folder.

    Args:
        block: `general` of params.yaml.
        directory: Emptied first; afterwards text.parquet (text_id, text) and summary.json. Of kind none: the latter
            alone.

    Returns:
        The content of summary.json: kind, generated, and but for kind none also source, max_length, hash (of the texts
        and of max_length: the losses on them compare only where it is equal), texts, characters, left_out {reason:
        rows}. The licence is not there: a word of it must not evaluate every cell anew.

    Raises:
        UserError: The source cannot be read, lacks the column, or holds no text.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    summary: dict[str, Any] = {"kind": block.kind, "generated": isinstance(block, GeneratedText)}
    if not isinstance(block, NoText):
        source, given = _given(block)
        left_out: Counter[str] = Counter()
        texts = list(islice(_usable(given, left_out), block.rows))
        if not texts:
            reasons = ", ".join(f"{count} rows fail the check `{why}`" for why, count in left_out.items())
            raise UserError(f"general: {block.path} holds no text" + (f": {reasons}" if reasons else ""))

        import pandas as pd

        summary |= {
            "source": source,
            "max_length": block.max_length,
            "hash": text_hash([text for _, text in texts], block.max_length),
            "texts": len(texts),
            "characters": sum(len(text) for _, text in texts),
            "left_out": dict(left_out),
        }
        write_parquet(directory / "text.parquet", pd.DataFrame(texts, columns=["text_id", "text"]))
    write_json(directory / "summary.json", summary)
    return summary


def text_hash(texts: Iterable[str], max_length: int) -> str:
    """Hash of the texts in their order, and of how much of each counts: 16 hexadecimal digits."""
    digest = hashlib.sha256(str(max_length).encode())
    for text in texts:
        digest.update(b"\0" + hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def folder_hash(directory: Path) -> str:
    """`text_hash` of the texts that a folder holds.

    Args:
        directory: As `collect` fills it, of another kind than none.
    """
    import pandas as pd

    summary = read_json(directory / "summary.json")
    return text_hash(pd.read_parquet(directory / "text.parquet")["text"], summary["max_length"])


def _given(block: GeneratedText | FileText | HubText) -> tuple[dict[str, Any], Iterator[Given]]:
    """What is noted of the source, and its rows."""
    match block:
        case GeneratedText():
            from molf import generate

            tales = generate.running_text(block.seed, block.rows)
            made = (Given(f"generated-{number}", text) for number, text in enumerate(tales, start=1))
            return {"kind": "generated", "generated": True, "seed": block.seed}, made
        case FileText():
            path = Path(block.path)
            if not path.is_file():
                raise UserError(f"general.path: {path} is {'a folder; name a file' if path.exists() else 'not there'}")
            source = {"kind": "file", "generated": False, "path": block.path, "column": block.column}
            rows = _paragraphs(path) if block.column is None else _column(block.path, RowFile(block.path), block.column)
            return source | {"sha256": file_hash(path)}, rows
        case HubText():
            revision = hub_revision("general", block)
            source = {"kind": "hub", "generated": False, "revision": revision}
            source |= {key: getattr(block, key) for key in ("id", "config", "split", "column")}
            return source, _column(block.id, hub_rows("general", block, block.split, revision), block.column)


def _column(name: str, rows: Iterable[Row], column: str) -> Iterator[Given]:
    """The values of a column.

    Raises:
        UserError: No row has the column.
    """
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row.columns))
        value = json.loads(row.record)[column] if column in row.columns else None
        yield Given(f"row-{row.number}", value, row.problem)
    if seen and column not in seen:
        raise UserError(f"general.column: {name} has no column {column!r}; there is {', '.join(map(repr, seen))}")


def _paragraphs(path: Path) -> Iterator[Given]:
    """The paragraphs of a plain text, which blank lines part; one of over `KEPT` characters is several.

    Raises:
        UserError: The file is not UTF-8.
    """
    held: list[str] = []
    line = count = size = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.readline(KEPT):
                line += 1
                if held and (not piece.strip() or size + len(piece) > KEPT):
                    count += 1
                    yield Given(f"paragraph-{count}", "".join(held).strip())
                    held, size = [], 0
                if piece.strip():
                    held.append(piece)
                    size += len(piece)
    except UnicodeDecodeError as error:
        raise UserError(
            f"general.path: {path} is not UTF-8 ({error.reason}, behind line {line}); save it as UTF-8"
        ) from None
    if held:
        yield Given(f"paragraph-{count + 1}", "".join(held).strip())


def _usable(given: Iterable[Given], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """text_id and text of the rows that can be asked; the others are counted by the check that they fail."""
    for text_id, text, problem in given:
        if problem is not None:
            left_out[problem] += 1
        elif text is None or isinstance(text, str) and not text.strip():
            left_out[SOME_TEXT] += 1
        elif not isinstance(text, str):
            left_out[IS_TEXT] += 1
        elif not encodable(text):
            left_out[IS_UTF_8] += 1
        else:
            yield text_id, text[:KEPT]
