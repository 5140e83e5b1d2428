"""Rows and files broken in every way that was thought of: each is named, no good row is lost, nothing crashes."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from molf import data, generate, raw
from molf.errors import UserError
from tests.test_data import file_block

GOOD = 20  # rows beside the broken one


def good(kind: str) -> list[dict[str, Any]]:
    return generate.rows(kind, {"train": GOOD}, 0)["train"]


def lines(rows: list[Any]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


class Broken(NamedTuple):
    """One broken row among good ones.

    Attributes:
        kind: Of the task.
        name: Of the file.
        content: Its bytes, made from the good rows.
        row: Number that the rejected row must have.
        column, check: That it must fail.
        value: That must be shown, or its beginning.
    """

    kind: str
    name: str
    content: Callable[[list[dict[str, Any]]], bytes]
    row: int
    column: str
    check: str
    value: str


def line(text: bytes) -> Callable[[list[dict[str, Any]]], bytes]:
    """Good rows as JSON lines, with one more in the fourth place."""

    def content(rows: list[dict[str, Any]]) -> bytes:
        whole = lines(rows)
        return b"".join([*whole[:3], text + b"\n", *whole[3:]])

    return content


def row(kind: str, column: str, check: str, value: str, /, **changes: Any) -> Broken:
    """One more good row, in the fourth place, with changed fields."""

    def content(rows: list[dict[str, Any]]) -> bytes:
        return line(json.dumps(rows[0] | changes).encode())(rows)

    return Broken(kind, "rows.jsonl", content, 4, column, check, value)


def unread(check: str, text: bytes, value: str) -> Broken:
    return Broken("med", "rows.jsonl", line(text), 4, "(row)", check, value)


def table(change: Callable[[list[str]], list[str]], delimiter: str = ",") -> Callable[[list[dict[str, Any]]], bytes]:
    """Good rows as a table, its lines changed."""

    def content(rows: list[dict[str, Any]]) -> bytes:
        text = pd.DataFrame(rows).to_csv(index=False, sep=delimiter)
        return "".join(change(text.splitlines(keepends=True))).encode("utf-8", "surrogateescape")

    return content


def with_fourth(text: str) -> Callable[[list[str]], list[str]]:
    return lambda rows: [*rows[:4], text, *rows[4:]]


REWRITE = good("fact")[0]["requested_rewrite"]
FIRST = good("med")[0]
CSV_ROW = pd.DataFrame([FIRST]).to_csv(index=False, header=False)
ROWS: dict[str, Broken] = {
    # lines that are no row
    "half an object": unread("is JSON", b'{"question": "q"', '{"question": "q"'),
    "two objects on a line": unread("is JSON", b"{} {}", "{} {}"),
    "plain text": unread("is JSON", b"hello", "hello"),
    "single quotes": unread("is JSON", b"{'question': 'q'}", "{'question'"),
    "a number of 5,000 digits": unread("is JSON", b'{"cop": ' + b"9" * 5000 + b"}", '{"cop": 999'),
    "100,000 brackets": unread("is JSON", b"[" * 100_000, "[[["),
    "a list": unread("is a JSON object", b"[1, 2]", "[1, 2]"),
    "null": unread("is a JSON object", b"null", "null"),
    "a string": unread("is a JSON object", b'"row"', '"row"'),
    "a key twice": unread("has each key once", json.dumps(FIRST).encode()[:-1] + b', "cop": 2}', '{"question"'),
    "a key twice, nested": unread("has each key once", b'{"a": {"b": 1, "b": 2}}', '{"a"'),
    "Latin-1": unread("is UTF-8", '{"question": "naïve"}'.encode("latin-1"), '{"question": "na\\xefve"}'),
    "a key with half a surrogate pair": unread("is UTF-8", b'{"\\ud83d": 1}', '{"\\ud83d": 1}'),
    "a NUL byte": unread("is JSON", b'{"question": "a\x00b"}', '{"question": "a\x00b"}'),
    "a line of 50 MB": unread("is a line of at most 32 MiB", b'{"question": "' + b"x" * 50_000_000 + b'"}', ""),
    # rows whose fields are wrong
    "NUL, escaped": row("med", "opa", "has no control characters", "a\x00b", opa="a\x00b"),
    "a bell": row("med", "question", "has no control characters", "a\x07", question="a\x07"),
    "half a surrogate pair": row("med", "opb", "is UTF-8", "x\\ud83d", opb="x\ud83d"),
    "a character that was lost": row("med", "opb", "has no lost characters (U+FFFD)", "na\ufffdve", opb="na\ufffdve"),
    "empty": row("med", "question", "is not empty", "", question=""),
    "white space": row("med", "question", "is not empty", " \n\u00a0", question=" \n\u00a0"),
    "null field": row("med", "opd", "is given", "", opd=None),
    "NaN": row("med", "cop", "is given", "", cop=float("nan")),
    "a number where text is": row("med", "question", "is text", "7", question=7),
    "true where text is": row("med", "question", "is text", "True", question=True),
    "a list where text is": row("med", "opa", "is text", "['a']", opa=["a"]),
    "an object where text is": row("med", "opa", "is text", "{'a': 1}", opa={"a": 1}),
    "a million characters": row("med", "opa", "is at most 1,000,000 characters", "xxx", opa="x" * 1_000_001),
    "a number as text": row("med", "cop", "is an option's number, 1 to 4", "2", cop="2"),
    "an answer outside": row("med", "cop", "is an option's number, 1 to 4", "5", cop=5),
    "an answer between": row("med", "cop", "is an option's number, 1 to 4", "1.5", cop=1.5),
    "an answer of 400 digits": row("med", "cop", "is an option's number, 1 to 4", "1000", cop=10**400),
    "true as the answer": row("med", "cop", "is an option's number, 1 to 4", "True", cop=True),
    "two options alike": row("med", "(row)", "options differ", '{"question"', opa="same ", opb=" same"),
    "a prompt without a slot": row(
        "fact", "requested_rewrite.prompt", "has {} once", "No slot", requested_rewrite=REWRITE | {"prompt": "No slot"}
    ),
    "two slots": row(
        "fact", "requested_rewrite.prompt", "has {} once", "{} {}", requested_rewrite=REWRITE | {"prompt": "{} {}"}
    ),
    "nested null": row(
        "fact", "requested_rewrite.target_new.str", "is given", "", requested_rewrite=REWRITE | {"target_new": None}
    ),
    "null inside nested": row(
        "fact",
        "requested_rewrite.target_true.str",
        "is given",
        "",
        requested_rewrite=REWRITE | {"target_true": {"str": None}},
    ),
    "a number where an object is": row("fact", "requested_rewrite.prompt", "is given", "", requested_rewrite=3),
    "new is true": row(
        "fact",
        "(row)",
        "new and true object differ",
        '{"',
        requested_rewrite=REWRITE | {"target_new": REWRITE["target_true"]},
    ),
    "an empty list": row("fact", "paraphrase_prompts", "is a list of texts", "[]", paraphrase_prompts=[]),
    "null in a list": row(
        "fact", "paraphrase_prompts", "is a list of texts", "['a', None]", paraphrase_prompts=["a", None]
    ),
    "text for a list": row("fact", "neighborhood_prompts", "is a list of texts", "alone", neighborhood_prompts="alone"),
    "broken SQL": row("sql", "sqlite", "query is SQL", 'near "SELEKT": syntax error', sql="SELEKT 1"),
    "SQL of a table that lacks": row(
        "sql", "sqlite", "query runs in its context", "no such table: nowhere", sql="SELECT * FROM nowhere"
    ),
    "a context that is none": row("sql", "sqlite", "context runs", "context: near", sql_context="CREATE TABEL t (x)"),
    # tables
    "CSV, a field too many": Broken(
        "med", "rows.csv", table(with_fourth("x," + CSV_ROW)), 5, "(row)", "has as many fields as the header", '["x", '
    ),
    "CSV, a field too few": Broken(
        "med", "rows.csv", table(with_fourth("q,a,b\n")), 5, "(row)", "has as many fields as the header", '["q", "a"'
    ),
    "CSV, text behind a quote": Broken(
        "med", "rows.csv", table(with_fourth('"q"x,a,b\n')), 5, "(row)", "has its quotes in pairs", '"q"x,a,b'
    ),
    "CSV, a quote that never ends": Broken(
        "med",
        "rows.csv",
        table(lambda rows: [*rows, '"q,a,b\n']),
        GOOD + 2,
        "(row)",
        "has its quotes in pairs",
        '"q,a,b',
    ),
    "CSV, a quote that never ends, among rows": Broken(
        "med", "rows.csv", table(with_fourth('"q,a,b\n')), 5, "(row)", "has its quotes in pairs", '"q,a,b'
    ),
    "CSV, an empty cell": Broken(
        "med", "rows.csv", table(with_fourth(CSV_ROW.replace(FIRST["opa"], ""))), 5, "opa", "is given", ""
    ),
    "CSV, Latin-1": Broken(
        "med",
        "rows.csv",
        table(with_fourth(CSV_ROW.replace(FIRST["opa"], "na\udcefve"))),
        5,
        "opa",
        "is UTF-8",
        "na\\udcefve",
    ),
    "TSV, a field too many": Broken(
        "med",
        "rows.tsv",
        table(with_fourth("a\t" * 12 + "\n"), "\t"),
        5,
        "(row)",
        "has as many fields as the header",
        '["a"',
    ),
    "an item that is no object": Broken(
        "med",
        "rows.json",
        lambda rows: json.dumps([*rows[:3], 7, *rows[3:]]).encode(),
        4,
        "(row)",
        "is a JSON object",
        "7",
    ),
    "an item with a number of 5,000 digits": Broken(
        "med",
        "rows.json",
        lambda rows: json.dumps([*rows[:3], {"cop": "#"}, *rows[3:]]).replace('"#"', "9" * 5000).encode(),
        4,
        "(row)",
        "is JSON",
        '{"cop": 999',
    ),
    "Parquet, bytes that are no text": Broken(
        "med",
        "rows.parquet",
        lambda rows: parquet(
            [row | {"opa": row["opa"].encode()} for row in rows[:3]]
            + [row | {"opa": row["opa"].encode() + b"\xff" * (i == 0)} for i, row in enumerate([FIRST, *rows[3:]])]
        ),
        4,
        "opa",
        "is UTF-8",
        "",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_broken_row_is_named_and_no_other_is_lost(case: str, tmp_path: Path) -> None:
    broken = ROWS[case]
    path = tmp_path / broken.name
    path.write_bytes(broken.content(good(broken.kind)))
    task = file_block(broken.kind, path, max_rejected=0.1, limits=dict.fromkeys(("train", "validation", "test")))
    raw.fetch(broken.kind, task, tmp_path / "raw")
    summary = data.prepare(broken.kind, task, tmp_path / "raw", tmp_path / "prepared")
    rows = summary["rows"]
    assert rows["train"]["raw"] == GOOD + 1 and rows["train"]["rejected"] == 1
    kept = {split: count["kept"] for split, count in rows.items() if split != "test" or broken.kind != "fact"}
    assert sum(kept.values()) == GOOD, rows
    rejected = pd.read_parquet(tmp_path / "prepared/rejected.parquet")
    named = rejected[(rejected["column"] == broken.column) & (rejected["check"] == broken.check)]
    assert len(named) == 1, rejected.to_string()
    assert named["source_row"].tolist() == [broken.row] == rejected["source_row"].unique().tolist()
    value = named["value"].iloc[0]
    assert value.startswith(broken.value) and len(value) <= data.SHOWN and (value or not broken.value)
    assert len(named["record"].iloc[0]) <= data.RECORD
    reason = next(reason for reason in summary["reasons"] if reason["check"] == broken.check)
    assert reason["column"] == broken.column and reason["rows"] == 1 and reason["first"]["source_row"] == broken.row


def whole(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(lines(rows))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    return _written(pa.Table.from_pylist(rows))


def _written(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


FINE: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "BOM": ("rows.jsonl", lambda rows: b"\xef\xbb\xbf" + whole(rows)),
    "BOM before a header": ("rows.csv", lambda rows: b"\xef\xbb\xbf" + table(list)(rows)),
    "BOM before a list": ("rows.json", lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode()),
    "CR LF": ("rows.jsonl", lambda rows: whole(rows).replace(b"\n", b"\r\n")),
    "CR alone": ("rows.jsonl", lambda rows: whole(rows).replace(b"\n", b"\r")),
    "mixed line ends": (
        "rows.jsonl",
        lambda rows: b"".join(
            text[:-1] + end for text, end in zip(lines(rows), [b"\r\n", b"\n", b"\r"] * 7, strict=False)
        ),
    ),
    "empty lines": ("rows.jsonl", lambda rows: b"\n\n" + whole(rows).replace(b"\n", b"\n \n")),
    "no end of line at the end": ("rows.jsonl", lambda rows: whole(rows)[:-1]),
    "CSV with CR LF": ("rows.csv", lambda rows: table(list)(rows).replace(b"\n", b"\r\n")),
    "JSON lines named JSON": ("rows.json", whole),
    "two gzip members": ("rows.jsonl.gz", lambda rows: gzip.compress(whole(rows[:9])) + gzip.compress(whole(rows[9:]))),
    "zstd": ("rows.jsonl.zst", lambda rows: zstandard.compress(whole(rows))),
    "two zstd frames": (
        "rows.jsonl.zst",
        lambda rows: zstandard.compress(whole(rows[:9])) + zstandard.compress(whole(rows[9:])),
    ),
    "a name in capitals": ("ROWS.JSONL", whole),
    "CSV with semicolons": (
        "rows.csv",
        lambda rows: pd.DataFrame(rows).to_csv(index=False, sep=";").encode(),
    ),
    "gzipped CSV": ("rows.csv.gz", lambda rows: gzip.compress(table(list)(rows))),
    "Parquet": ("rows.parquet", parquet),
    "gzipped Parquet": ("rows.parquet.gz", lambda rows: gzip.compress(parquet(rows))),
    "columns in another order": ("rows.jsonl", lambda rows: whole([dict(reversed(row.items())) for row in rows])),
    "columns that no task knows": ("rows.jsonl", lambda rows: whole([row | {"note": {"a": [1]}} for row in rows])),
}


@pytest.mark.parametrize("case", FINE)
def test_what_looks_odd_and_is_fine_loses_nothing(case: str, tmp_path: Path) -> None:
    name, content = FINE[case]
    (tmp_path / name).write_bytes(content(good("med")))
    task = file_block("med", tmp_path / name)
    raw.fetch("med", task, tmp_path / "raw")
    summary = data.prepare("med", task, tmp_path / "raw", tmp_path / "prepared")
    assert summary["reasons"] == [] and sum(count["kept"] for count in summary["rows"].values()) == GOOD


FILES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes], str]] = {
    "nothing": ("rows.jsonl", lambda rows: b"", "has no rows"),
    "empty lines alone": ("rows.jsonl", lambda rows: b"\n\r\n \n", "has no rows"),
    "a header alone": ("rows.csv", lambda rows: b"question,opa\n", "has no rows"),
    "truncated gzip": (
        "rows.jsonl.gz",
        lambda rows: gzip.compress(whole(rows))[:-9],
        "the compressed file ends too early",
    ),
    "truncated zstd": (
        "rows.jsonl.zst",
        lambda rows: zstandard.compress(whole(rows))[:-9],
        "the compressed file ends too early",
    ),
    "damaged gzip": (
        "rows.jsonl.gz",
        lambda rows: gzip.compress(whole(rows))[:-8] + b"\0" * 8,
        "cannot be read: CRC check failed",
    ),
    "no gzip": ("rows.jsonl.gz", whole, "cannot be read: Not a gzipped file"),
    "no zstd": ("rows.jsonl.zst", whole, "cannot be read: "),
    "UTF-16": (
        "rows.jsonl",
        lambda rows: whole(rows).decode().encode("utf-16"),
        "the file is UTF-16; save it as UTF-8",
    ),
    "UTF-16 table": ("rows.csv", lambda rows: table(list)(rows).decode().encode("utf-16"), "the file is UTF-16"),
    "JSON, Latin-1": ("rows.json", lambda rows: '["é"]'.encode("latin-1"), "byte 2 is not UTF-8"),
    "JSON, an object": (
        "rows.json",
        lambda rows: b'{"data": []}',
        "a JSON list of objects is expected, found an object",
    ),
    "JSON, cut off": (
        "rows.json",
        lambda rows: json.dumps(rows).encode()[:-1],
        "the list ends too early, after row 20",
    ),
    "JSON, cut in a row": ("rows.json", lambda rows: json.dumps(rows).encode()[:-9], "row 20 is not JSON (line 1: "),
    "JSON, two lists": (
        "rows.json",
        lambda rows: json.dumps(rows[:9]).encode() + b"\n" + json.dumps(rows[9:]).encode(),
        "more follows behind the list of 9 rows",
    ),
    "no Parquet": ("rows.parquet", lambda rows: b"PAR1nothing", "cannot be read: "),
    "truncated Parquet": ("rows.parquet", lambda rows: parquet(rows)[:-20], "cannot be read: "),
    "Parquet with another schema": (
        "rows.parquet",
        lambda rows: parquet([{"text": "a", "label": 1}] * 9),
        "lacks the columns question, opa",
    ),
    "a column lacks": (
        "rows.csv",
        lambda rows: b"question,opa,opb,opc,cop\nq,a,b,c,1\n",
        "lacks the column opd; there is",
    ),
    "a header with a name twice": ("rows.csv", lambda rows: b"question,opa,opa\nq,a,b\n", "the header names opa twice"),
    "a header with no name": (
        "rows.csv",
        lambda rows: b"question,,opa\nq,a,b\n",
        "the header has a column without a name",
    ),
    "a header in Latin-1": (
        "rows.csv",
        lambda rows: "question,opa,café\nq,a,b\n".encode("latin-1"),
        "the header is not UTF-8: question, opa, caf\\xe9; save the file as UTF-8",
    ),
    "Parquet with a name twice": (
        "rows.parquet",
        lambda rows: _written(pa.Table.from_arrays([pa.array(["q"])] * 2, names=["question", "question"])),
        "names the column question twice",
    ),
    "an unknown format": ("rows.xlsx", whole, "the format is told by the name; allowed: .jsonl"),
    "no format": ("rows", whole, "the format is told by the name"),
    "a compression alone": ("rows.gz", whole, "the format is told by the name"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    name, content, said = FILES[case]
    (tmp_path / name).write_bytes(content(good("med")))
    with pytest.raises(UserError) as caught:
        raw.fetch("med", file_block("med", tmp_path / name), tmp_path / "raw")
    text = str(caught.value)
    assert said in text and name in text and "\n" not in text


@pytest.mark.parametrize("text", [b"{broken\n" * 9, b"\xff\xfe\xfd\n".replace(b"\xff\xfe", b"\xfd\xfe") * 9])
def test_a_file_of_which_no_row_can_be_read_gets_the_table_of_reasons(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(text)
    task = file_block("med", tmp_path / "rows.jsonl")
    raw.fetch("med", task, tmp_path / "raw")
    with pytest.raises(
        UserError, match=r"9 of 9 rows are rejected \(100.0%\)(.|\n)*is (JSON|UTF-8): 9 rows, first row 1"
    ):
        data.prepare("med", task, tmp_path / "raw", tmp_path / "prepared")
    assert len(pd.read_parquet(tmp_path / "prepared/rejected.parquet")) == 9
