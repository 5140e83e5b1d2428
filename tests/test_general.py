"""The general text: from every kind of source; what cannot be asked is counted, what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import general, generate
from molf.blocks import GeneralBlock
from molf.config import check_params, read_yaml
from molf.errors import UserError
from molf.paths import read_json, write_json
from tests.conftest import ROOT

COMMIT = "d" * 40


def block(**keys: Any) -> GeneralBlock:
    data = read_yaml(ROOT / "params.yaml")
    return check_params(data | {"general": keys}, "params.yaml").general


def of_file(path: Path, column: str | None = None, rows: int | None = None) -> GeneralBlock:
    return block(kind="file", path=str(path), column=column, rows=rows, max_length=16)


def texts(folder: Path) -> list[str]:
    frame = pd.read_parquet(folder / "text.parquet")
    assert list(frame) == ["text_id", "text"] and frame["text_id"].is_unique
    return list(frame["text"])


def test_the_default_is_generated_and_says_so(tmp_path: Path) -> None:
    summary = general.collect(check_params(read_yaml(ROOT / "params.yaml"), "p").general, tmp_path / "out")
    assert summary["generated"] and summary["source"]["kind"] == "generated"
    assert texts(tmp_path / "out") == generate.running_text(0, 200)
    assert read_json(tmp_path / "out/summary.json") == summary
    before = (tmp_path / "out/text.parquet").read_bytes()
    general.collect(check_params(read_yaml(ROOT / "params.yaml"), "p").general, tmp_path / "out")
    assert (tmp_path / "out/text.parquet").read_bytes() == before


def test_paragraphs_of_a_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne ä\r\nand two.\r\n\r\n \n\nThree.\n".encode())
    summary = general.collect(of_file(path), tmp_path / "out")
    assert texts(tmp_path / "out") == ["One ä\nand two.", "Three."]
    assert (summary["texts"], summary["generated"], summary["max_length"]) == (2, False, 16)
    general.collect(of_file(path, rows=1), tmp_path / "out")
    assert texts(tmp_path / "out") == ["One ä\nand two."]
    monkeypatch.setattr(general, "KEPT", 10)
    path.write_text("a" * 25 + "\nbcd\nefg\n\nh\n")
    general.collect(of_file(path), tmp_path / "out")
    assert texts(tmp_path / "out") == ["a" * 10, "a" * 10, "aaaaa\nbcd", "efg", "h"]


def test_a_column_of_a_table_and_what_of_it_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        '{"t": "one"}',
        '{"t": ""}',
        '{"t": null}',
        '{"t": 5}',
        "{",
        '{"u": "x"}',
        '{"t": "\\ud800"}',
        '{"t": "two"}',
    ]
    path.write_text("\n".join(rows))
    summary = general.collect(of_file(path, "t"), tmp_path / "out")
    assert texts(tmp_path / "out") == ["one", "two"]
    assert summary["left_out"] == {"has text": 3, "is text": 1, "is JSON": 1, "is UTF-8": 1}
    pd.DataFrame({"body": ["p", "q"]}).to_parquet(tmp_path / "a.parquet")
    general.collect(of_file(tmp_path / "a.parquet", "body"), tmp_path / "out")
    assert texts(tmp_path / "out") == ["p", "q"]


def test_a_hub_data_set_at_its_pin_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    lines = [{"text": text} for text in ("", " = Title = \n", "Words.\n")]
    (tmp_path / "set/test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    paper = read_yaml(ROOT / "src/molf/presets/paper.yaml")["general"]
    hub = block(**paper | {"id": "./set", "config": None})
    with pytest.raises(UserError, match=r"general: sources.lock pins no revision; run `molf pin`"):
        general.collect(hub, tmp_path / "out")
    write_json(tmp_path / "sources.lock", {"general": {"revision": COMMIT}})
    summary = general.collect(hub, tmp_path / "out")
    assert texts(tmp_path / "out") == [" = Title = \n", "Words.\n"]
    assert summary["source"]["revision"] == COMMIT and summary["left_out"] == {"has text": 1}


def test_none_leaves_no_text(tmp_path: Path) -> None:
    summary = general.collect(block(kind="none", path="sources.lock"), tmp_path / "out")
    assert summary == {"kind": "none", "generated": False}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("name", "content", "column", "said"),
    [
        ("a.txt", "ä".encode("latin-1"), None, r"a.txt is not UTF-8 \(.*, behind line 0\); save it as UTF-8"),
        ("a.txt", b" \n\n", None, "a.txt holds no text"),
        ("a.csv", b"t,u\n,1\n", "t", "a.csv holds no text: 1 rows fail the check `has text`"),
        ("a.csv", b"t,u\nx,1\n", "v", "general.column: .*a.csv has no column 'v'; there is 't', 'u'"),
        ("a.xlsx", b"", "t", "a.xlsx: the format is told by the name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, column: str | None, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        general.collect(of_file(tmp_path / name, column), tmp_path / "out")


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no.txt", "is not there"), (tmp_path, "column is null")):
        with pytest.raises(UserError, match=said):
            general.collect(of_file(path), tmp_path / "out")


def test_the_hash_tells_other_texts_another_order_and_another_window() -> None:
    same = general.text_hash(["a", "b"], 8)
    others = [general.text_hash(*given) for given in ((["a", "b"], 9), (["b", "a"], 8), (["a\0b"], 8), (["ab"], 8))]
    assert same == general.text_hash(["a", "b"], 8) and same not in others and len({*others}) == 4
