"""Rows from every kind of source, good and bad: what is wrong is named by file, row and column."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from molf import data, generate, raw, sources
from molf.blocks import SPLITS, TaskBlock
from molf.config import check_params, read_yaml
from molf.errors import UserError
from molf.paths import read_json, write_json
from molf.tasks import med

ROOT = Path(__file__).parents[1]


def block(kind: str, **changes: Any) -> TaskBlock:
    """A task block of params.yaml with other values."""
    params = read_yaml(ROOT / "params.yaml")
    params["tasks"][kind] |= changes
    return check_params(params, "params.yaml").tasks[kind]


def file_block(kind: str, path: Path, **changes: Any) -> TaskBlock:
    return block(kind, source={"kind": "file", "path": str(path)}, **changes)


def med_rows(count: int = 40) -> list[dict[str, Any]]:
    return generate.rows("med", {"train": count}, 0)["train"]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(kind: str, task: TaskBlock, folder: Path) -> dict[str, Any]:
    raw.fetch(kind, task, folder / "raw")
    return data.prepare(kind, task, folder / "raw", folder / "prepared")


def frame(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "prepared" / f"{name}.parquet")


# --- sources -------------------------------------------------------------------------------------------------------


def _csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def _tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False, sep="\t")
    return path


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


def _json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def _gzip(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": _json,
    "rows.csv": _csv,
    "rows.tsv": _tsv,
    "rows.parquet": _parquet,
    "rows.jsonl.gz": _gzip,
}


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    hashes = set()
    for name, write in WRITERS.items():
        task = file_block("med", write(tmp_path / name, med_rows()))
        summary = run("med", task, tmp_path / name.replace(".", "-"))
        # Rows are named by their line, and the first line of a table is its header.
        hashes.add(frame(tmp_path / name.replace(".", "-"), "train").drop(columns="example_id").to_json())
        assert summary["rows"]["train"]["raw"] == 40 and not summary["generated"]
    assert len(hashes) == 1


def test_a_hub_data_set_is_loaded_at_its_pin_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", med_rows(20))
    write_jsonl(tmp_path / "set" / "test.jsonl", med_rows(28)[20:])
    source = {"kind": "hub", "id": "./set", "revision": "main", "splits": {"train": "train", "test": "test"}}
    source |= {"path": "sources.lock"}
    task = block("med", source=source)
    with pytest.raises(UserError, match="sources.lock pins no revision; run `molf pin`"):
        raw.fetch("med", task, tmp_path / "raw")
    write_json(tmp_path / "sources.lock", {"tasks.med": {"revision": "a" * 40}})
    info = raw.fetch("med", task, tmp_path / "raw")
    assert info["revision"] == "a" * 40 and info["files"]["test"][0]["from"] == "./set/test"
    assert data.prepare("med", task, tmp_path / "raw", tmp_path / "prepared")["rows"]["test"]["kept"] == 8


def test_a_url_is_read_once_and_must_be_what_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = "memory://med/rows.jsonl.gz"
    content = _gzip(tmp_path / "rows", med_rows(30)).read_bytes()
    opened = []
    plain = MemoryFileSystem._open

    def counted(self: MemoryFileSystem, path: str, *rest: Any, **more: Any) -> Any:
        opened.append(path)
        return plain(self, path, *rest, **more)

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    with fsspec.open(url, "wb") as file:
        file.write(content)
    params = read_yaml(ROOT / "params.yaml")
    source = {"kind": "url", "path": "sources.lock", "files": {"train": [url]}}
    params["tasks"]["med"] |= {"source": source, "limits": dict.fromkeys(SPLITS)}
    checked = check_params(params, "params.yaml")
    with pytest.raises(UserError, match="sources.lock pins no sha256:memory"):
        raw.fetch("med", checked.tasks["med"], tmp_path / "raw")
    sources.pin(checked, sources.hub_commit, sources.url_sha256)
    opened.clear()
    info = raw.fetch("med", checked.tasks["med"], tmp_path / "raw")
    assert len(opened) == 1 and info["files"]["train"][0]["bytes"] == len(content)
    assert info["files"]["train"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    with fsspec.open(url, "wb") as file:
        file.write(_gzip(tmp_path / "rows", med_rows(29)).read_bytes())
    with pytest.raises(UserError, match="is not what sources.lock pins; run `molf pin` to take it"):
        raw.fetch("med", checked.tasks["med"], tmp_path / "raw")


def test_preparing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    task = block("sql", source={"kind": "generated", "path": "x", "seed": 0, "rows": {"train": 60, "test": 12}})
    first = run("sql", task, tmp_path / "a")
    assert run("sql", task, tmp_path / "b")["data_hash"] == first["data_hash"]
    for split in SPLITS:
        assert (tmp_path / f"a/prepared/{split}.parquet").read_bytes() == (
            tmp_path / f"b/prepared/{split}.parquet"
        ).read_bytes()


# --- splits --------------------------------------------------------------------------------------------------------


def test_splits_share_no_prompt_and_a_leak_is_counted(tmp_path: Path) -> None:
    rows = med_rows(60)
    write_jsonl(tmp_path / "train.jsonl", rows[:40])
    write_jsonl(tmp_path / "test.jsonl", rows[35:60])
    source = {
        "kind": "file",
        "path": str(tmp_path),
        "files": {"train": "train.jsonl", "test": "test.jsonl"},
    }
    task = block("med", source=source, limits={"train": None, "validation": 5, "test": None})
    summary = run("med", task, tmp_path)
    prompts = [set(frame(tmp_path, split)["prompt"]) for split in SPLITS]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert sum(leak["exact"] for leak in summary["leaks"] if leak["dropped"]) == 5
    assert len(frame(tmp_path, "test")) == 25


def test_limits_keep_so_many_rows_drawn_by_the_seed(tmp_path: Path) -> None:
    limits = {"train": 10, "validation": 4, "test": 6}
    path = write_jsonl(tmp_path / "rows.jsonl", med_rows(60))
    kept = []
    for seed in (0, 0, 1):
        rule = {"validation": 0.1, "test": 0.1, "seed": seed, "group": None}
        run("med", file_block("med", path, limits=limits, split=rule), tmp_path)
        assert {split: len(frame(tmp_path, split)) for split in SPLITS} == limits
        kept.append(frame(tmp_path, "train")["example_id"].tolist())
    assert kept[0] == kept[1] != kept[2]


def test_facts_are_trained_and_scored_alike_and_tuned_on_others(tmp_path: Path) -> None:
    source = {"kind": "generated", "path": "x", "seed": 0, "rows": {"train": 30, "validation": 10}}
    run("fact", block("fact", source=source, limits={"train": None, "validation": None, "test": None}), tmp_path)
    train, test, validation = (frame(tmp_path, split) for split in ("train", "test", "validation"))
    pd.testing.assert_frame_equal(train, test)
    assert len(train) == 30 and not set(validation["prompt"]) & set(train["prompt"])


def test_a_row_that_stands_twice_is_kept_once_and_counted(tmp_path: Path) -> None:
    rows = med_rows(30)
    summary = run("med", file_block("med", write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[3]])), tmp_path)
    assert summary["rows"]["train"]["duplicates"] == 1


# --- bad rows ------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_fail_with_a_table_of_reasons(tmp_path: Path) -> None:
    rows = med_rows(40)
    rows[4]["cop"] = 9
    rows[8]["opa"] = rows[8]["opb"]
    task = file_block("med", write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError) as caught:
        run("med", task, tmp_path)
    text = str(caught.value)
    assert "2 of 40 rows are rejected (5.0%), max_rejected allows 1.0%" in text
    assert "train, cop: is an option's number, 1 to 4: 1 rows, first row 5 ('9')" in text
    assert "train, (row): options differ: 1 rows, first row 9" in text


@pytest.mark.parametrize(("declared", "shift"), [(1, -1), (0, 0)])
def test_answers_counted_from_the_other_end_are_recognised(declared: int, shift: int, tmp_path: Path) -> None:
    rows = [{**row, "cop": row["cop"] + shift} for row in med_rows(40)]
    task = file_block("med", write_jsonl(tmp_path / "rows.jsonl", rows), options={"first_option": declared})
    with pytest.raises(UserError, match=rf"set options.first_option to {1 - declared}"):
        run("med", task, tmp_path)
    right = file_block("med", tmp_path / "rows.jsonl", options={"first_option": 1 - declared})
    assert run("med", right, tmp_path)["reasons"] == []


# --- bad files -----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl: there is no such file"):
        raw.fetch("med", file_block("med", tmp_path / "nowhere.jsonl"), tmp_path / "raw")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    source = {"kind": "file", "path": str(tmp_path), "files": {"train": "folder.jsonl"}}
    with pytest.raises(UserError, match=r"folder.jsonl: cannot be read"):
        raw.fetch("med", block("med", source=source), tmp_path / "raw")


def test_more_generated_rows_than_there_are_is_a_message(tmp_path: Path) -> None:
    source = {"kind": "generated", "path": "x", "seed": 0, "rows": {"train": 9000}}
    with pytest.raises(UserError, match=r"tasks.med.source.rows: 9000 generated med rows .* has 768"):
        raw.fetch("med", block("med", source=source), tmp_path / "raw")


def test_no_row_left_for_a_split_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", med_rows(2))
    with pytest.raises(
        UserError, match=r"left for train: of its 2 rows 0 are rejected, .* the other splits take the rest"
    ):
        run("med", file_block("med", path), tmp_path)
    write_jsonl(path, [row | {"author": 7} for row in med_rows(30)])
    one = {"validation": 0.1, "test": 0.1, "seed": 0, "group": "author"}
    with pytest.raises(
        UserError, match=r"which is cut off the train rows, where equal prompts, a group, .* split.group"
    ):
        run("med", file_block("med", path, split=one), tmp_path)
    with pytest.raises(UserError, match=r"tasks.med.split.validation: 0 leaves no row for validation"):
        run("med", file_block("med", path, split=one | {"validation": 0.0, "group": None}), tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [row | {"cop": 9} for row in med_rows(2)])
    source = {"kind": "file", "path": str(tmp_path), "files": {"train": "rows.jsonl", "test": "test.jsonl"}}
    with pytest.raises(UserError, match=r"left for test: of its 2 rows 2 are rejected, 0 equal others"):
        run("med", block("med", source=source, max_rejected=0.1), tmp_path)


def test_columns_that_no_task_asks_for_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {f"note {i}": i} for i, row in enumerate(med_rows(30))]
    seen: list[list[str]] = []
    normalise = med.normalise

    def noting(frame: pd.DataFrame, options: Any) -> pd.DataFrame:
        seen.append(frame.columns.tolist())
        return normalise(frame, options)

    monkeypatch.setattr(med, "normalise", noting)
    run("med", file_block("med", write_jsonl(tmp_path / "rows.jsonl", rows)), tmp_path)
    assert [set(columns) for columns in seen] == [{"question", *med.OPTIONS, "cop", "subject_name"}]


def test_queries_that_name_databases_need_them(tmp_path: Path) -> None:
    rows = [
        {
            "db_id": "pets",
            "question": f"How many are above {i}?",
            "query": f"SELECT {i}",
            "context": "CREATE TABLE t (a)",
        }
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"tasks.sql.options.databases: .* such as pets, and none is here"):
        run("sql", file_block("sql", path), tmp_path)
    (tmp_path / "db/pets").mkdir(parents=True)
    (tmp_path / "db/pets/pets.sqlite").write_bytes(b"")
    task = file_block("sql", path, options={"databases": str(tmp_path / "db"), "must_run": True})
    run("sql", task, tmp_path)
    assert set(frame(tmp_path, "test")["database"]) == {str(tmp_path / "prepared/databases/pets.sqlite")}


# --- the real files ------------------------------------------------------------------------------------------------


def test_the_real_files_are_taken_with_few_rows_rejected(shared_data: Path, tmp_path: Path) -> None:
    files: dict[str, dict[str, Any]] = {
        "sql": {"path": "sql", "files": {"train": "gretel_train.jsonl.gz", "test": "gretel_eval.jsonl.gz"}},
        "med": {"path": "med", "files": {"train": "train.jsonl.gz", "test": "validation.jsonl.gz"}},
        "fact": {"path": "fact/counterfact.jsonl.gz"},
    }
    for kind, source in files.items():
        where = {**source, "kind": "file", "path": str(shared_data / source["path"])}
        limits = {"train": None, "validation": 40, "test": None}
        task = block(kind, source=where, limits=limits, max_rejected=0.04)
        summary = run(kind, task, tmp_path / kind)
        for split, count in summary["rows"].items():
            assert count["rejected"] <= 0.04 * count["raw"], (kind, split, count)
            assert count["kept"] == len(frame(tmp_path / kind, split)) > 0
        assert read_json(tmp_path / kind / "prepared" / "summary.json") == summary


def test_answers_of_the_real_med_file_counted_from_0_are_refused(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "med" / "train.jsonl.gz"
    with pytest.raises(UserError, match="`cop` seems to count from 1"):
        run("med", file_block("med", path, options={"first_option": 0}, max_rejected=0.02), tmp_path)


def test_facts_take_no_test_split(tmp_path: Path) -> None:
    """They are scored on what they train."""
    task = block("fact", limits={"train": 20, "validation": 5, "test": 3})
    with pytest.raises(UserError, match="limits.test: fact is scored on the facts that it trains"):
        run("fact", task, tmp_path)
