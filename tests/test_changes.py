"""What changed between two versions of the data: rows, reasons of rejection, and versions that cannot be read."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from molf import changes, cli, rowdiff
from molf.errors import UserError
from molf.paths import PREPARED, RAW, own_tools, write_parquet
from tests.conftest import QUIET, ROOT

Make = Callable[[list[Any]], rowdiff.Rows]


def write_raw(path: Path, records: list[Any]) -> Path:
    """Raw rows as `fetch` writes them; a text stands for a row that could not be parsed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = {
        "file": pa.array([0] * len(records), pa.int32()),
        "source_row": pa.array(range(1, len(records) + 1), pa.int64()),
        "record": [json.dumps(record) for record in records],
        "problem": pa.array(["is JSON" if isinstance(record, str) else None for record in records], pa.string()),
    }
    pq.write_table(pa.table(frame), path, row_group_size=7)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Make:
    def make(records: list[Any]) -> rowdiff.Rows:
        return rowdiff.Rows(write_raw(tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet", records).open("rb"))

    return make


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Prepared rows."""

    def make(rows: list[Any]) -> rowdiff.Rows:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        write_parquet(path, pd.DataFrame([{"example_id": f"train-{i}", **row} for i, row in enumerate(rows, start=1)]))
        return rowdiff.Rows(path.open("rb"))

    return make


def compare(before: rowdiff.Rows, now: rowdiff.Rows, key: str | None = None) -> dict[str, Any]:
    """One split alone."""
    return rowdiff.compare_tables({"train": before}, {"train": now}, key)["train"]


def numbers(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(found[what] for what in ("same", "added", "removed", "changed"))


ROWS = [{"id": f"q{i}", "text": f"text {i}", "n": i} for i in range(20)]


def test_rows_are_told_apart_by_their_id_wherever_they_stand(raw: Make) -> None:
    now = [{"id": "new", "text": "first", "n": 0}, *ROWS[:3], {**ROWS[3], "n": 99}, *ROWS[5:]]
    found = compare(raw(ROWS), raw(now))
    assert (found["before"], found["now"], found["by"]) == (20, 20, "id")
    assert numbers(found) == (18, 1, 1, 1)
    (changed,), (added,), (removed,) = (found["examples"][what] for what in ("changed", "added", "removed"))
    assert changed["fields"] == {"n": {"before": 3, "now": 99}} and changed["place"]["source_row"] == 5
    assert added["fields"]["id"] == "new" and removed["fields"] == ROWS[4]
    assert not found["reordered"]


def test_without_an_id_a_row_at_the_same_place_counts_as_changed(raw: Make) -> None:
    plain = [{"text": row["text"]} for row in ROWS]
    # A row put in above moves the others: the place is told by the rows around.
    now = [{"text": "put in"}, *plain[:3], {"text": "text 3, edited"}, *plain[4:-1]]
    found = compare(raw(plain), raw(now))
    assert found["by"] == "place" and numbers(found) == (18, 1, 1, 1)
    assert found["examples"]["changed"][0]["fields"] == {"text": {"before": "text 3", "now": "text 3, edited"}}
    # Where rows came or went alone, nothing had to be paired.
    assert compare(raw(plain), raw(plain[:-2]))["by"] == "content"


def test_neither_the_order_of_keys_nor_of_rows_is_a_change_of_rows(raw: Make) -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    assert numbers(compare(raw(ROWS), raw(turned))) == (20, 0, 0, 0)
    found = compare(raw(ROWS), raw(ROWS[::-1]))
    assert numbers(found) == (20, 0, 0, 0) and found["reordered"]


@pytest.mark.parametrize("now", [True, 1.0, "1"])
def test_a_value_of_another_type_is_shown_as_what_changed(raw: Make, now: object) -> None:
    before = [{"id": "a", "n": 1, "x": float("nan")}]
    (example,) = compare(raw(before), raw([{**before[0], "n": now}]))["examples"]["changed"]
    assert example["fields"] == {"n": {"before": 1, "now": now}}


def test_a_column_whose_values_repeat_is_no_id_unless_it_is_given(raw: Make) -> None:
    rows = [{"db_id": f"db{i % 3}", "text": f"text {i}"} for i in range(9)]
    now = [*rows[:4], {**rows[4], "text": "edited"}, *rows[5:8], {"db_id": "db1", "text": "another"}]
    assert compare(raw(rows), raw(now))["by"] == "place"
    given = compare(raw(rows), raw(now), key="db_id")
    # By db_id, the new db1 row takes no part: the edited one stands first.
    assert given["by"] == "db_id" and numbers(given) == (7, 1, 1, 1)
    assert compare(raw(rows), raw(now), key="nothing")["by"] == "place"


def test_equal_rows_are_counted_each(raw: Make) -> None:
    assert numbers(compare(raw([*ROWS, *ROWS[:3]]), raw([*ROWS, ROWS[0]]))) == (21, 0, 2, 0)


def test_rows_that_could_not_be_parsed_take_part(raw: Make) -> None:
    before = ['{"id": "q0", "text', *ROWS[1:]]
    found = compare(raw(before), raw([ROWS[0], *ROWS[1:5], {**ROWS[5], "n": 7}, *ROWS[6:]]))
    assert found["by"] == "id" and numbers(found) == (18, 1, 1, 1)
    assert found["examples"]["removed"][0]["fields"] == '{"id": "q0", "text'


def test_random_edits_are_counted_exactly(raw: Make) -> None:
    random.seed(0)
    for _ in range(20):
        rows: list[dict[str, Any]] = [
            {"uid": i, "text": random.choice("abc"), "more": [i]} for i in range(random.randint(1, 60))
        ]
        kept = [row for row in rows if random.random() > 0.2]
        edited = {row["uid"] for row in kept if random.random() < 0.3}
        fresh = random.randint(1, 5)
        now = [{**row, "text": row["text"] + "!"} if row["uid"] in edited else row for row in kept]
        now += [{"uid": 1000 + i, "text": "a", "more": []} for i in range(fresh)]
        random.shuffle(now)
        found = compare(raw(rows), raw(now))
        assert numbers(found) == (len(kept) - len(edited), fresh, len(rows) - len(kept), len(edited))


def test_a_prepared_row_is_what_it_says_not_the_number_it_has(made: Make) -> None:
    rows = [{"prompt": f"p{i}", "completion": " a", "subject": None if i % 2 else "s"} for i in range(6)]
    found = compare(made(rows), made([{"prompt": "new", "completion": " b", "subject": "s"}, *rows]))
    assert numbers(found) == (6, 1, 0, 0)
    edited = compare(made(rows), made([*rows[:2], {**rows[2], "completion": " c"}, *rows[3:]]))
    assert edited["examples"]["changed"] == [
        {"place": {"example_id": "train-3"}, "fields": {"completion": {"before": " a", "now": " c"}}}
    ]
    # Nothing and an empty text differ, and so do turns of a conversation.
    assert numbers(compare(made(rows), made([{**row, "subject": row["subject"] or ""} for row in rows]))) == (
        3,
        0,
        0,
        3,
    )
    talks = [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(4)]
    other = [*talks[:3], {"messages": [{"role": "user", "content": "bye"}]}]
    assert numbers(compare(made(talks), made(other))) == (3, 0, 0, 1)
    wider = compare(made(rows), made([{**row, "level": 1} for row in rows]))
    assert wider["columns"] == {"added": ["level"], "removed": []} and numbers(wider) == (6, 0, 0, 0)


def test_rows_that_went_to_another_split_are_told_apart(raw: Make, made: Make) -> None:
    # One file before, two now, and one row of them edited.
    now = {
        "train": raw(ROWS[4:]),
        "test": raw([ROWS[0], dict(reversed(ROWS[1].items())), ROWS[2], {**ROWS[3], "n": 9}]),
    }
    found = rowdiff.compare_tables({"train": raw(ROWS)}, now)
    assert numbers(found["train"]) == (16, 0, 1, 0) and found["train"]["moved_out"] == 3
    assert numbers(found["test"]) == (0, 1, 0, 0) and found["test"]["moved_in"] == 3
    # A split drawn anew moves rows; the edited one stays the only change.
    rows = [{"prompt": f"p{i}"} for i in range(10)]
    before = {"train": made(rows[:7]), "validation": made(rows[7:])}
    edited = [{"prompt": "p3, edited"}, *rows[4:8]]
    found = rowdiff.compare_tables(
        before, {"train": made([*rows[:1], *edited]), "validation": made([*rows[1:3], *rows[8:]])}
    )
    assert numbers(found["train"]) == (4, 0, 0, 1)
    assert (found["train"]["moved_in"], found["train"]["moved_out"]) == (1, 2)
    assert (found["validation"]["moved_in"], found["validation"]["moved_out"]) == (2, 1)


# --- versions ------------------------------------------------------------------------------------------------------


STAGES = """
stages:
  fetch:
    foreach: [quiz, shop]
    do: {cmd: none, deps: ["${item}.jsonl"], outs: ["data/raw/${item}"]}
  prepare:
    foreach: [quiz, shop]
    do: {cmd: none, deps: ["data/raw/${item}"], outs: ["data/prepared/${item}"]}
"""
REASONS = ["split", "file", "source_row", "column", "check", "value", "record"]


class Folder:
    """A project with two tasks whose stages' outputs are written here instead of run, as DVC sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        yaml = YAML(typ="safe")
        params = yaml.load((ROOT / "params.yaml").read_text())
        params["tasks"] = {"quiz": params["tasks"]["med"], "shop": params["tasks"]["sql"]}
        params["grid"]["tasks"] = ["quiz"]
        yaml.dump(params, root / "params.yaml")
        (root / "dvc.yaml").write_text(STAGES)
        self.sh("git init --quiet; git config user.name test; git config user.email test@localhost")
        self.sh("dvc init --quiet; dvc config core.analytics false")
        self.write("quiz", ROWS)
        self.write("shop", ROWS, database=b"1")
        self.commit()

    def sh(self, command: str) -> None:
        subprocess.run(
            command, shell=True, cwd=self.root, env={**own_tools(), **QUIET}, check=True, stdout=subprocess.DEVNULL
        )

    def write(self, task: str, rows: list[Any], bad: dict[str, list[int]] | None = None, database: bytes = b"") -> None:
        """Source, raw and prepared data of a task; `bad` names the rows that fail a check."""
        (self.root / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_raw(self.root / RAW / task / "train.parquet", rows)
        (self.root / RAW / task / "source.json").write_text("{}")
        if database:
            folder = self.root / RAW / task / "databases/shop"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "shop.sqlite").write_bytes(database)
        failed = [("train", 0, i, "n", check, "?", "{}") for check, found in (bad or {}).items() for i in found]
        write_parquet(self.root / PREPARED / task / "rejected.parquet", pd.DataFrame(failed, columns=REASONS))
        prepared = [{"example_id": f"train-{i}", "prompt": row["text"]} for i, row in enumerate(rows, start=1)]
        write_parquet(self.root / PREPARED / task / "train.parquet", pd.DataFrame(prepared))

    def commit(self) -> None:
        self.sh("dvc commit --quiet --force; git add --all; git commit --quiet --allow-empty -m version")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    made = Folder(tmp_path / "project")
    monkeypatch.chdir(made.root)
    # DVC remembers folders of a cache in a place of the machine's.
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return made


def test_rows_and_reasons_since_a_revision(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "diff", "HEAD"]) == 0
    out = capsys.readouterr().out
    assert "quiz: no change\nshop: no change" in out

    folder.write("quiz", [*ROWS[:4], {**ROWS[4], "text": "text\x1b[31m 4"}, *ROWS[5:]], bad={"n is small": [18, 19]})
    folder.write("shop", [*ROWS[:-1], {**ROWS[-1], "\x9b2J": "\u202e"}], database=b"2")
    assert cli.run(["data", "diff", "HEAD"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()  # whatever columns and values hold
    # The files changed by hand, so that the stages of both would run.
    assert out.count("not up to date with its source and params.yaml: `dvc repro prepare@quiz`") == 1
    assert "raw train: 20 -> 20 rows: 0 added, 0 removed, 1 changed (rows told apart by id)" in out
    assert '    changed, row 5: text: "text 4" -> "text\\u001b[31m 4"' in out
    assert "prepared train: 20 -> 20 rows: 0 added, 0 removed, 1 changed (no id: " in out
    assert '    changed, train-5: prompt: "text 4" -> ' in out
    assert 'rejected: train, n: n is small: 0 -> 2 rows (first row 18: "?")' in out
    assert "raw: changed databases/shop/shop.sqlite" in out

    folder.commit()
    for arguments in (["HEAD~1"], ["HEAD~1", "--to", "HEAD"]):
        assert cli.run(["data", "diff", arguments[0], "quiz", *arguments[1:], "--json"]) == 0
        task = json.loads(capsys.readouterr().out)["tasks"].pop("quiz")
        assert (task["raw"]["state"], task["prepared"]["state"], task["stale"]) == ("changed", "changed", False)
        assert task["raw"]["splits"]["train"]["examples"]["changed"][0]["fields"]["text"]["before"] == "text 4"
        reason = task["reasons"][0]
        assert (reason["check"], reason["before"], reason["now"]) == ("n is small", 0, 2)


def test_tasks_that_are_new_or_gone_or_not_here(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder.root / "params.yaml").read_text()
    (folder.root / "params.yaml").write_text(text.replace("shop:", "other:"))
    shutil.rmtree(folder.root / PREPARED / "quiz")
    (folder.root / "data/raw/other").mkdir()
    write_raw(folder.root / "data/raw/other/train.parquet", ROWS)
    assert cli.run(["data", "diff", "HEAD"]) == 0
    out = capsys.readouterr().out
    assert "other\n  raw: made since: 20 train rows\n  prepared: not made, then or now\n" in out
    assert "quiz\n  raw: no change\n  prepared: not here; `dvc pull --with-deps prepare@quiz`, or `dvc repro" in out
    assert "shop\n  raw: gone\n  prepared: gone" in out


def test_what_was_given_wrongly_is_named(folder: Folder) -> None:
    def problem(*arguments: Any) -> str:
        with pytest.raises(UserError) as caught:
            changes.changes(folder.root, *arguments)
        return str(caught.value)

    assert "unknown Git revision 'nope'; `git log --oneline`" in problem("nope", None, ["quiz"])
    assert "there is no task quizz in HEAD" in problem("HEAD", None, ["quiz"], "quizz")
    folder.write("quiz", [{**row, "text": "new"} for row in ROWS])
    assert "--key nothing: the rows that changed have no such column" in problem(
        "HEAD", None, ["quiz"], None, "nothing"
    )
    shutil.rmtree(folder.root / ".git")
    assert "is not a git repository" in problem("HEAD", None, ["quiz"])


def test_rows_that_lie_in_no_cache_come_from_the_remote(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write("quiz", ROWS[:-1])
    shutil.copytree(folder.root / ".dvc/cache", tmp_path / "cache")
    shutil.rmtree(folder.root / ".dvc/cache")
    assert cli.run(["data", "diff", "HEAD", "quiz"]) == 1
    said = capsys.readouterr()
    assert "data/raw/quiz of HEAD" in said.out and "there is no remote: `dvc remote add -d NAME URL`" in said.out
    assert "`dvc fetch --all-commits data/raw/quiz`" in said.out and "quiz could not be read" in said.err

    folder.sh(f"dvc remote add --quiet --default team {tmp_path / 'remote'}")
    assert cli.run(["data", "diff", "HEAD", "quiz"]) == 1
    assert "nor in the remote team: who made it types `dvc push --all-commits`, then `dvc" in capsys.readouterr().out

    (tmp_path / "cache").rename(folder.root / ".dvc/cache")
    folder.sh("dvc push --quiet --all-commits")
    shutil.rmtree(folder.root / ".dvc/cache")
    assert cli.run(["data", "diff", "HEAD", "quiz"]) == 0
    assert "raw train: 20 -> 19 rows: 0 added, 1 removed, 0 changed" in capsys.readouterr().out


def test_a_project_inside_a_larger_repository(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder.root / ".git")
    inner = tmp_path / "large/inner"
    inner.parent.mkdir()
    folder.root = folder.root.rename(inner)
    monkeypatch.chdir(inner)
    folder.sh(f"dvc remote add --quiet --default team {tmp_path / 'remote'}")
    folder.sh("cd .. && git init --quiet && git config user.name test && git config user.email test@localhost")
    folder.commit()
    folder.write("quiz", ROWS[1:])
    folder.sh("dvc push --quiet --all-commits")
    shutil.rmtree(inner / ".dvc/cache")
    assert cli.run(["data", "diff", "HEAD", "quiz"]) == 0
    assert "raw train: 20 -> 19 rows: 0 added, 1 removed, 0 changed" in capsys.readouterr().out
