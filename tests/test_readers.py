"""Rows of a file in parts of it, and names of files."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from molf import readers
from molf.errors import UserError
from molf.readers import RowFile


def records(path: Path) -> list[Any]:
    return [json.loads(row.record) for row in RowFile(str(path))]


@pytest.mark.parametrize(
    "location",
    [
        "https://host/rows.jsonl?download=true",
        "s3://bucket.name/v1.2/rows.JSONL",
        "simplecache::https://host/rows.jsonl#top",
        "zip://rows.jsonl::https://host/all.zip",
        "a.b/rows.v1.jsonl",
    ],
)
def test_the_format_of_a_url_is_its_files(location: str) -> None:
    assert RowFile(location).format == ".jsonl"


def test_a_json_list_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{"i": i, "text": "é" * (i % 977)} for i in range(4000)]
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text("\ufeff \n" + json.dumps(rows, ensure_ascii=False, indent=indent))
        assert records(tmp_path / "rows.json") == rows
    # A number that the end of a part cuts in two.
    (tmp_path / "rows.json").write_text("[" + "7" * 5 + " " * (2**20 - 8) + "," + "123456789" + "]")
    assert records(tmp_path / "rows.json") == ["77777", "123456789"]
    text = json.dumps(rows, indent=1).replace('"i": 3999', '"i" 3999')
    (tmp_path / "rows.json").write_text(text)
    line = text[: text.index('"i" 3999')].count("\n") + 1
    with pytest.raises(UserError, match=rf"row 4000 is not JSON \(line {line}: Expecting ':' delimiter\)"):
        records(tmp_path / "rows.json")
    good = json.dumps(rows, ensure_ascii=False).encode()
    (tmp_path / "rows.json").write_bytes(good[:-2] + b"\xff" + good[-2:])
    with pytest.raises(UserError, match=f"byte {len(good) - 2} is not UTF-8"):
        records(tmp_path / "rows.json")


def test_long_lines_are_named_and_lines_around_them_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 50)
    rows = [json.dumps({"i": i}) for i in range(40)]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "rows.jsonl").write_bytes(end.join(rows).encode())
        assert [record["i"] for record in records(tmp_path / "rows.jsonl")] == list(range(40))
    table = ["i,j", "1,2", "x" * 80 + ",2", "3,4", '"5,6', "7,8", "y" * 80, '9,"10"']
    (tmp_path / "rows.csv").write_text("\n".join(table) + "\n")
    found = [(row.number, row.problem, json.loads(row.record)) for row in RowFile(str(tmp_path / "rows.csv"))]
    assert found == [
        (2, None, {"i": "1", "j": "2"}),
        (3, readers.IS_SHORT, ""),
        (4, None, {"i": "3", "j": "4"}),
        (5, readers.IS_CSV, '"5,6'),
        (6, None, {"i": "7", "j": "8"}),
        (7, readers.IS_SHORT, ""),
        (8, None, {"i": "9", "j": "10"}),
    ]


def test_cells_of_a_table_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("cop,case_id\n007, 1\n")
    assert records(tmp_path / "rows.csv") == [{"cop": "007", "case_id": " 1"}]
    (tmp_path / "rows.csv").write_text("question,opa,opb,opc,opd,cop\n1,2,3,4,5,6\n")
    assert list(records(tmp_path / "rows.csv")[0].values()) == ["1", "2", "3", "4", "5", 6]


def test_a_file_that_grows_a_thousandfold_is_read_in_small_parts() -> None:
    packed = zstandard.compress(bytes(2**28))
    stream = readers._Zstandard(io.BytesIO(packed))
    largest = count = 0
    while data := stream.read(1 << 16):
        count, largest = count + len(data), max(largest, len(stream.ready))
    assert count == 2**28 and len(packed) < 2**28 / 10_000 and largest < 2**28
