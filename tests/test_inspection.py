import csv
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from molf import inspection
from molf.cli import run
from molf.config import check_params, read_yaml
from molf.data import prepare
from molf.errors import UserError
from molf.inspection import page
from molf.inspection.files import find
from molf.inspection.profile import measured
from molf.raw import Origin, fetch, write_split
from molf.readers import as_row
from tests.conftest import ROOT
from tests.own_rows import FORMS, made

QA = [{"question": f"What is {i} and {i * i}?", "answer": f"It is {i + i * i}."} for i in range(120)]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, in which commands are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    return tmp_path


def lines(path: str, rows: Iterable[dict[str, Any]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def looked(rows: Iterable[dict[str, Any]], **other: Any) -> tuple[inspection.Found, str]:
    found = inspection.inspect(lines("rows.jsonl", rows), {}, **other)
    return found, "\n".join(found.lines)


def pasted(found: inspection.Found) -> dict[str, Any]:
    """params.yaml with the block in it and in its grid."""
    params = read_yaml(Path("params.yaml"))
    params["tasks"] |= yaml.safe_load(found.yaml)["tasks"]
    params["grid"]["tasks"] = [found.name]
    return params


def prepared(found: inspection.Found) -> dict[str, Any]:
    """What the stages make of the block."""
    block = check_params(pasted(found), "params.yaml").tasks[found.name]
    fetch(found.name, block, Path("raw"))
    return prepare(found.name, block, Path("raw"), Path("prepared"))


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_is_known_and_its_block_passes_prepare(name: str) -> None:
    form = FORMS[name]
    found, text = looked(made(name))
    assert (found.guess.kind if found.guess else None) == form.kind
    assert form.says in text
    if found.guess is None or found.block is None:
        assert "looked for: " in text and found.yaml == ""
        return
    assert form.options.items() <= found.guess.options.items()
    assert found.block["split"]["group"] == form.group
    assert ("prepare will stop" in text) == form.stops
    if form.stops:
        with pytest.raises(UserError, match="databases"):
            prepared(found)
        return
    counts = prepared(found)["rows"]
    assert sum(count["rejected"] for count in counts.values()) == 0
    assert sum(count["kept"] for count in counts.values()) >= 55
    first = pd.read_parquet("prepared/train.parquet").iloc[0]
    assert first["prompt"].strip() and first["completion"].strip()


def test_the_page_holds_the_block_that_yaml_prints(capsys: pytest.CaptureFixture[str]) -> None:
    lines("data/quiz.jsonl", QA)
    assert run(["inspect", "data/quiz.jsonl"]) == 0
    text = capsys.readouterr().out
    assert run(["inspect", "data/quiz.jsonl", "--yaml"]) == 0
    block = capsys.readouterr().out
    assert block.splitlines()[0] == "tasks:" and block.partition("\n")[2] in text
    assert yaml.safe_load(block)["tasks"]["quiz"]["source"] == {"kind": "file", "path": "data/quiz.jsonl"}
    assert "tasks: [quiz]" in text and "molf check && dvc repro prepare@quiz" in text
    assert "data/quiz.jsonl: 120 rows, " in text
    assert "  question  text         -       120  What is 0 and 0?" in text
    assert "guess: completion, because" in text
    assert "prompt | What is 0 and 0?\n  completion |  It is 0." in text
    assert "nothing looks wrong" in text


def test_a_block_has_a_name_of_its_own() -> None:
    for path, name in (
        ("sql.jsonl", "sql-2"),
        ("data/train.jsonl", "data-2"),
        ("My Quiz (2).csv.gz", "my-quiz-2"),
        ("quiz/train-00000-of-00001.parquet", "quiz"),
        ("base.jsonl", "base-2"),
    ):
        Path(path).parent.mkdir(exist_ok=True)
        frame = pd.DataFrame(QA)
        if path.endswith("parquet"):
            frame.to_parquet(path)
        elif "csv" in path:
            frame.to_csv(path, index=False)
        else:
            lines(path, QA)
        expected = "mine" if name == "data-2" else name
        found = inspection.inspect(path, {})
        assert found.name in (expected, Path.cwd().name) and found.block is not None
        check_params(pasted(found), path)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.zst", "memory", "pandas"])
def test_any_file_is_read(form: str) -> None:
    frame = pd.DataFrame(QA)
    path = f"rows.{form}"
    if form == "parquet":
        frame.to_parquet(path)
    elif form == "json":
        Path(path).write_text(json.dumps(QA, indent=1))
    elif form == "memory":
        import fsspec

        path = "memory://inspected/rows.jsonl"
        with fsspec.open(path, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in QA))
    elif "csv" in form or form == "tsv":
        frame.to_csv(path, index=False, sep="\t" if form == "tsv" else ",")
    elif form == "pandas":
        path = "rows.csv"
        frame.to_csv(path)  # with its index, whose column has no name
    else:
        frame.to_json(path, orient="records", lines=True)
    found = inspection.inspect(path, {})
    assert found.guess is not None and found.guess.options == {"prompt": "question", "completion": "answer"}
    assert found.profiles["train"].rows == 120 and found.block is not None
    kind = found.block["source"]["kind"]
    assert kind == ("url" if form == "memory" else "file")
    assert ("molf pin && " in found.lines[-1]) == (kind == "url")
    check_params(pasted(found), path)


def test_empty_cells_of_a_csv_are_empty_inputs() -> None:
    with Path("alpaca.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(made("Alpaca"))
    found = inspection.inspect("alpaca.csv", {})
    assert "nothing looks wrong" not in "\n".join(found.lines)  # 60 rows are few
    assert prepared(found)["rows"]["train"]["rejected"] == 0


def test_the_guide_s_blocks_and_names_of_checks_are_true() -> None:
    from molf import readers
    from molf.tasks import TASKS, choice, completion
    from molf.tasks.columns import text_checks

    guide = (ROOT / "docs/data.md").read_text().partition("## Bring your own data")[2].partition("\n## ")[0]
    params = read_yaml(Path("params.yaml"))
    for block in re.findall(r"```yaml\n(.+?)```", guide, flags=re.DOTALL):
        params["tasks"] |= yaml.safe_load(block)["tasks"]
    params["grid"]["tasks"] = ["support", "quiz"]
    tasks = check_params(params, "docs/data.md").tasks
    named = set(re.findall(r"`([^`]+)`", re.sub(r"```.+?```", "", guide, flags=re.DOTALL)))
    for check in (readers.IS_JSON, readers.IS_OBJECT, readers.KEYS_ONCE, readers.IS_UTF_8, readers.IS_SHORT):
        assert check in named
    assert {readers.HAS_FIELDS, readers.IS_CSV, *(check.name for check in text_checks())} <= named
    known = {choice.LIST, choice.GAP, choice.DIFFER, choice.INSIDE, *choice.FORM.values()}
    assert known <= named
    assert {completion.TURNS, completion.ROLE, completion.ANSWERED, completion.FIRST, completion.LAST} <= named
    for kind in ("sql", "med", "fact"):
        schema = TASKS[kind].raw_schema(tasks[kind].options)
        own = [*schema.checks, *(check for column in schema.columns.values() for check in column.checks)]
        assert {check.name for check in own} <= named, kind


# --- splits --------------------------------------------------------------------------------------------------------


def test_a_folder_s_files_are_its_splits() -> None:
    for name, rows in (
        ("train-0.jsonl", QA[:50]),
        ("train-1.jsonl", QA[50:90]),
        ("dev.jsonl", QA[90:]),
        ("README.json", []),
    ):
        lines(f"data/{name}", rows)
    found = inspection.inspect("data", {})
    assert found.block is not None
    files = {"train": ["train-0.jsonl", "train-1.jsonl"], "validation": "dev.jsonl"}
    assert found.block["source"] == {"kind": "file", "path": "data", "files": files}
    assert {split: part.rows for split, part in found.profiles.items()} == {"train": 90, "validation": 30}
    assert prepared(found)["rows"]["validation"]["raw"] == 30
    alone = inspection.inspect("data/train-0.jsonl", {})
    assert "  beside it: dev.jsonl" not in alone.lines


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a_train.csv", "a_eval.csv"], {"train": 1, "test": 1}),
        (["a_train.csv", "a_eval.csv", "a_test.csv"], {"train": 1, "validation": 1, "test": 1}),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], {"train": 2, "test": 1}),
        (["part-1.jsonl", "part-2.jsonl"], {"train": 2}),
        (["train.jsonl", "labels.csv", "valid.jsonl"], {"train": 1, "validation": 1}),
    ],
)
def test_names_tell_splits(names: list[str], splits: dict[str, int]) -> None:
    for name in names:
        lines(f"own/{name}", [])
    assert {split: len(paths) for split, paths in find("own", {}).items()} == splits


def test_a_folder_of_several_sets_or_without_train_is_named() -> None:
    for name in ("a_train.csv", "a_test.csv", "b_train.csv"):
        lines(f"own/{name}", [])
    with pytest.raises(UserError, match="files of 2 data sets(.|\n)*a_test.csv, a_train.csv\n    b_train.csv"):
        find("own", {})
    lines("other/test.csv", [])
    with pytest.raises(UserError, match="there is test and no train file"):
        find("other", {})
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no file in it has a name that ends with .jsonl"):
        find("empty", {})


def test_a_test_file_without_answers_is_left_out_and_copies_across_splits_are_told() -> None:
    lines("train.jsonl", QA)
    lines("test.jsonl", [{"question": row["question"] + "?", "answer": None} for row in QA])
    found = inspection.inspect("train.jsonl", {"test": "test.jsonl"})
    text = "\n".join(found.lines)
    assert found.block is not None and found.block["source"]["path"] == "train.jsonl"
    assert "the test file has no answers and is left out" in text
    lines("test.jsonl", [{**row, "more": 1} for row in QA[:30]])
    found = inspection.inspect("train.jsonl", {"test": "test.jsonl"})
    text = "\n".join(found.lines)
    assert re.search(r"train rows also in test: \d+ with an equal prompt, 0 near copies: prepare will stop", text)
    assert re.search(r"validation rows also in test: \d with an equal prompt, 0 near copies: they are left out", text)
    assert "the files lie in the project's own root" in text
    with pytest.raises(UserError, match="have copies in another"):
        prepared(found)


def test_other_splits_that_lack_a_column_are_told() -> None:
    lines("train.jsonl", QA)
    lines("test.jsonl", [{"question": "What?"}])
    found = inspection.inspect("train.jsonl", {"test": "test.jsonl"})
    assert any("test: the file lacks answer, which train has" in line for line in found.lines)


# --- what looks wrong ----------------------------------------------------------------------------------------------


def test_what_prepare_rejects_is_told() -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in QA]
    rows[3]["answer"] = ""
    rows[4]["question"] = ["a list"]
    Path("rows.jsonl").write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in rows + rows[:2]))
    found = inspection.inspect("rows.jsonl", {})
    text = "\n".join(found.lines)
    assert "3 of 123 rows (2.44%) fail a check; max_rejected is 1%, so prepare will stop:" in text
    assert "train, (row): is JSON: 1 row, first at row 1" in text
    assert "train, answer: is not empty: 1 row, first at row 5" in text
    assert "train, question: is text or a finite number: 1 row, first at row 6 (\"['a list']\")" in text
    assert "train: 2 rows equal to one before; each is kept once" in text
    assert "`question` mixes types: 121 text, 1 list" in text
    assert "  1 of them cannot be read" in text
    with pytest.raises(UserError, match="3 of 123 rows are rejected"):
        prepared(found)


def test_what_is_odd_in_columns_is_told() -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"{row['question']} {row['answer']}", "label": "yes" if i % 2 else "no"} for i, row in enumerate(QA)
    ]
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = "Yes", "no ", "maybe"
    rows[3]["text"] += " caf\u00c3\u00a9"
    rows[4]["text"] = "<p>" + rows[4]["text"] + "</p>"
    rows[5]["text"] = " ".join(row["text"] for row in rows)
    rows[6]["label"] = 1
    _, text = looked(rows)
    assert "'Yes' (1), 'yes' (59) look like one label, and are 2" in text
    assert "'no ' (1), 'no' (57) look like one label, and are 2" in text
    assert "`label`: 1 text (0.8%) with white space at an end" in text
    assert "`label` mixes types: 119 text, 1 whole number" in text
    assert "`text`: 2 texts (1.7%) with HTML" in text
    assert "UTF-8 that was read in another encoding" in text
    assert re.search(r"`text`: the longest text, at row 6, has 3,\d{3} characters", text)


def test_one_answer_for_nearly_all_rows_and_near_copies_are_told() -> None:
    rows = [{"question": row["question"], "answer": "no" if i % 20 else "yes"} for i, row in enumerate(QA)]
    copies = [{"question": f"{' '.join(f'word{j}' for j in range(80))} {i}?", "answer": f"a{i}"} for i in range(120)]
    assert "of the answers are 'no'; a model that always says it" in looked(rows)[1]
    found, text = looked(copies)
    assert "the rows seem to be of one template" in text
    assert found.block is not None and found.block["duplicates"]["similarity"] is None
    assert prepared(found)["rows"]["train"]["kept"] == 96
    few = [*QA, *copies[:12]]
    assert "train: 11 of 132 rows are near copies of a row before them" in looked(few)[1]


def test_a_column_whose_values_repeat_is_a_group() -> None:
    rows = [{"doc_id": f"d{i // 4}", "house": f"h{i // 3}", **row} for i, row in enumerate(QA)]
    found, text = looked(rows)
    assert found.block is not None and found.block["split"]["group"] == "doc_id"
    assert "`doc_id` has 30 values, and 100% of the rows share theirs with another" in text
    assert "values of `house` repeat too" in text
    assert prepared(found)["rows"]["train"]["kept"] > 80


def test_ambiguous_numbers_are_told() -> None:
    rows = [
        {"question": row["question"], "options": ["a", "b", "c", "d"], "answer": 1 + i % 3} for i, row in enumerate(QA)
    ]
    found, text = looked(rows)
    assert found.guess is not None and found.guess.options["answer_is"] == "index0"
    assert "from 1 to 3, which does not tell whether they count from 0 or 1" in text
    cop = [
        {"question": row["question"], **dict.fromkeys(("opa", "opb"), "x"), "opc": "y", "opd": "z", "cop": 2}
        for row in QA
    ]
    assert "`cop` goes from 2 to 2, which does not tell" in looked(cop)[1]


def test_queries_of_another_dialect_are_kept() -> None:
    rows = list(made("Gretel"))
    for row in rows[:6]:
        row["sql"] = "SELECT TOP 3 * FROM nothing"
    found, text = looked(rows)
    assert found.block is not None and found.block["options"]["must_run"] is False
    assert "10.0% of the queries do not run in SQLite: must_run: false keeps and counts them" in text
    assert prepared(found)["rows"]["train"]["kept"] > 40


def test_databases_beside_spider_s_file_are_found() -> None:
    import sqlite3

    for i in range(15):
        Path(f"own/database/db{i}").mkdir(parents=True)
        sqlite3.connect(f"own/database/db{i}/db{i}.sqlite").close()
    lines("own/spider.jsonl", made("Spider"))
    found = inspection.inspect("own/spider.jsonl", {})
    assert found.block is not None and found.block["options"]["databases"] == "own/database"
    assert any("'no such table: t0'" in line for line in found.lines)


def test_a_kind_may_be_asked_for() -> None:
    rows = list(made("MedMCQA"))
    found, _ = looked(rows, kind="choice")
    assert found.guess is not None and found.guess.options["options"] == ["opa", "opb", "opc", "opd"]
    assert prepared(found)["rows"]["train"]["rejected"] == 0
    found, text = looked(rows, kind="fact")
    assert found.guess is None and "no task is guessed of kind fact:" in text


# --- terminal ------------------------------------------------------------------------------------------------------


def test_a_hostile_file_does_not_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\r\x00 a b"
    rows = [
        {f"question{evil}": evil, "question": f"{evil} {i}", f"answer{evil}": i, "answer": f"{evil}{i}"}
        for i in range(40)
    ]
    lines("rows.jsonl", rows)
    assert run(["inspect", "rows.jsonl"]) == 0
    assert run(["inspect", "rows.jsonl", "--yaml"]) == 0
    lines("rows.jsonl", [{f"prompt{evil}": "a b c d e f", f"completion{evil}": "g h i j k l"}])
    assert run(["inspect", "rows.jsonl"]) == 0
    Path("rows.csv").write_text("a\x1b[2J\u202e,a\x1b[2J\u202e\n1,2\n")
    assert run(["inspect", "rows.csv"]) == 2
    Path("rows.json").write_text(json.dumps({evil: [{evil: 1}]}))
    assert run(["inspect", "rows.json"]) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert text and all(char.isprintable() or char == "\n" for char in text)


def test_lines_are_cut_to_the_terminal_and_wide_letters_count_twice() -> None:
    rows = [{"question": "\u4f60\u597d" * 200 + str(i), "answer": "x" * 500} for i in range(30)]
    found, _ = looked(rows)
    start, end = found.lines.index("columns:"), found.lines.index("guess: completion, because")
    for line in found.lines[start:end]:
        assert sum(2 if char in "\u4f60\u597d" else 1 for char in line) <= 100
    assert page.cut("abcdef", 6) == "abcdef" and page.cut("abcdefg", 6) == "abc..."


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "two words",
        "",
        " x",
        "no",
        "Null",
        "1",
        "1.5",
        "a: b",
        "a#b",
        "{x}",
        "x\ny\t",
        '"q"',
        "\\",
        "\u202e",
        "\U000e0001",
        "-",
        "~",
        "é",
        "a, b",
        "[a]",
        "*x",
        "&x",
        "0x10",
        "1e3",
        "2020-01-01",
        "..",
        "a.b",
        "y",
        "@x",
        "`x`",
        "%",
        "a/b-c_d.jsonl",
    ],
)
def test_a_value_stays_what_it_is_in_yaml(value: str) -> None:
    written = page.flow({"key": [value, None, True, 2], value or "empty": 0.1})
    assert all(char.isprintable() for char in written)
    Path("x.yaml").write_text(written, encoding="utf-8")
    assert read_yaml(Path("x.yaml")) == {"key": [value, None, True, 2], value or "empty": 0.1}


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_a_local_model(base: Path) -> None:
    params = (Path("params.yaml")).read_text()
    params = params.replace(
        "  tiny: # built", f"  own: {{kind: path, path: {json.dumps(str(base))}, license: unknown}}\n  tiny: # built"
    )
    Path("params.yaml").write_text(params.replace("max_length: 256", "max_length: 12"))
    rows = [{"prompt": f"w{i % 9} w1 w2 x{i}", "completion": "w3 w4" if i % 4 else "w5 " * 10} for i in range(100)]
    _, text = looked(rows, model="own")
    # BOS, four words, two or ten, EOS.
    assert "length in tokens of own (all examples)" in text
    assert "median 8, 95th percentile 16, longest 16; completions alone: 3, 11, 11" in text
    assert "25.0% of the examples are over training.max_length (12) and left out of training" in text
    _, text = looked(rows)
    assert "estimated as a quarter of the bytes" in text and "`dvc repro base@tiny`" in text
    _, text = looked(
        [
            {"messages": [{"role": "user", "content": f"w1 w{i % 9} {i}"}, {"role": "assistant", "content": "w2"}]}
            for i in range(50)
        ],
        model="own",
    )
    assert "length in tokens of own" in text
    with pytest.raises(
        UserError, match="--model other: params.yaml has tiny, own|--model other: params.yaml has own, tiny"
    ):
        looked(rows, model="other")


def test_one_conversation_without_an_answer_is_counted() -> None:
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    rows = [{"messages": [{**turns[0], "content": f"w1 {i}"}, turns[1]]} for i in range(300)] + [{"messages": turns}]
    assert "1 of 301 conversations looked at end without the assistant: rejected" in looked(rows)[1]


def test_answers_that_evaluation_cuts_are_told() -> None:
    rows = [{"question": row["question"], "answer": row["answer"] * 40} for row in QA]
    _, text = looked(rows)
    assert "about 99.2% of the answers are longer than evaluation.max_new_tokens allows (64)" in text or (
        "of the answers are longer than evaluation.max_new_tokens allows (64)" in text
    )


# --- files that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["$(touch ran)", "`touch ran`", '";touch ran;"', "';touch ran;'", "\\", "\u00e9 \U0001f600"]
)
def test_the_line_that_turns_an_object_into_rows_runs_nothing_of_the_file(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.json").write_text(json.dumps({key: [{"a": 1}, {"a": key}]}))
    assert run(["inspect", "rows.json"]) == 2
    (line,) = re.findall(r"(python -c .*)", capsys.readouterr().err)
    subprocess.run(line, shell=True, check=True)
    assert [json.loads(row) for row in Path("rows.jsonl").read_text().splitlines()] == [{"a": 1}, {"a": key}]
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing.jsonl", None, "there is no such file"),
        ("rows.xlsx", b"PK", ".xlsx is not read; save the sheet as CSV"),
        ("rows.ndjson", b"{}", "rename it to .jsonl"),
        ("rows.txt", b"a", "a text file has no columns"),
        ("rows.foo", b"a", "the format is told by the name"),
        ("empty.jsonl", b"", "has no rows"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:40], "the compressed file ends too early"),
        ("rows.json", b'{"data": [{"a": 1}], "version": 2}', "holds 1 rows below 'data': python -c"),
        (
            "pandas.json",
            b'{"a": {"0": 1, "1": 2}, "b": {"0": 3, "1": 4}}',
            "holds a column each in 'a', 'b': python -c",
        ),
        ("keyed.json", b'{"x": {"a": 1}, "y": {"a": 2}}', "holds 2 rows, each below a key of its own"),
        ("pairs.json", b'{"Who?": "me", "What?": "that"}', "holds 2 pairs"),
        (
            "squad.json",
            b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}',
            "texts, each with its questions",
        ),
    ],
)
def test_a_file_that_cannot_be_read_exits_with_2(
    name: str, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    assert run(["inspect", name]) == 2
    assert said in capsys.readouterr().err


def test_the_command_that_makes_rows_of_an_object_works(project: Path) -> None:
    import subprocess
    import sys

    answers = [{"text": "Paris", "answer_start": 0}]
    held = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "Paris is big.",
                        "qas": [{"question": f"Q{i}?", "id": i, "answers": answers} for i in range(40)],
                    }
                ]
            }
        ]
    }
    Path("squad.json").write_text(json.dumps(held))
    with pytest.raises(UserError) as caught:
        inspection.inspect("squad.json", {})
    command = caught.value.problems[1].partition("python")[2]
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True)
    found = inspection.inspect("squad.jsonl", {})
    assert found.guess is not None and found.guess.options["completion"] == "answers.0.text"


@pytest.mark.parametrize(
    "arguments", [["--split-of", "x"], ["--split-of", "train=y"], ["--rows", "0"], ["--first", "0"], ["--model", "no"]]
)
def test_arguments_that_make_no_sense_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", lines("rows.jsonl", QA), *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_without_params_the_page_says_so_and_with_broken_ones_too() -> None:
    Path("params.yaml").unlink()
    assert "there is no params.yaml here" in looked(QA)[1]
    Path("params.yaml").write_text("grid: {}\n")
    assert "params.yaml has mistakes, such as" in looked(QA)[1]


def test_another_separator_and_no_task_at_all() -> None:
    Path("rows.csv").write_text("frage|antwort\n" + "\n".join(f"Was ist {i}?|Nichts {i}" for i in range(30)))
    assert any("separate its columns by that" in line for line in inspection.inspect("rows.csv", {}).lines)
    assert run(["inspect", "rows.csv", "--yaml"]) == 2


def test_the_first_rows_only_can_be_looked_at() -> None:
    found, text = looked(QA, most=50, shown=1)
    assert found.profiles["train"].rows == 50 and "the first 50 rows" in text
    assert "What is 1 and 1?" not in text


def test_a_profile_counts_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molf.inspection.profile.CHUNK", 7)
    rows = [
        {
            "id": i,
            "text": f"word {i % 10} " if i % 2 else None,
            "number": str(i) if i % 3 else i / 2,
            "deep": {"a": {"b": i % 4}} if i > 30 else None,
            "list": ["x"] * (i % 3),
        }
        for i in range(50)
    ]
    write_split("x", [Origin("x", [as_row(i + 1, row) for i, row in enumerate(rows)])], tmp_path / "train.parquet")
    found = measured(tmp_path / "train.parquet", 2)
    assert found.rows == 50 and [number for number, _ in found.first] == [1, 2] and len(found.sample) == 50
    assert list(found.top) == ["id", "text", "number", "deep", "list"]
    assert {column.rows for column in found.columns.values()} == {50}
    some = found.columns["text"]
    assert (some.missing, len(some.distinct), some.spaced, some.distinct.repeated) == (25, 5, 25, 1.0)
    assert (found.columns["id"].least, found.columns["id"].most, found.columns["number"].most) == (0, 49, 49)
    assert found.columns["number"].kinds == {"text": 33, "number": 17}
    assert (found.columns["deep.a.b"].missing, len(found.columns["deep.a.b"].distinct)) == (31, 4)
    assert found.columns["list"].lengths == {0: 17, 1: 17, 2: 16}
