"""A file of prompts answered by a cell's model: rows of all kinds in, one answer a row out."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from molf import asking, cells, lineage, models, predict
from molf.blocks import ChoiceOptions, CompletionOptions, SqlOptions
from molf.cli import run
from molf.config import Params, check_params
from molf.errors import UserError
from molf.paths import Cell, read_json, write_json
from molf.readers import as_row
from molf.tasks import letters
from tests.conftest import QUIET
from tests.report import fake
from tests.tasks.helpers import StandIn

FFT, LORA, BASE = (f"tiny/fact/{method}/seed-0" for method in ("fft", "lora", "base"))


class Model(StandIn):
    """Answers as told, as `Asked` sees a model."""

    def __init__(self, says: Any, logprobs: Any = None, places: int = 4000) -> None:
        super().__init__(says, logprobs)
        self.places = places
        words = SimpleNamespace(bos_token_id=0, encode=lambda text, add_special_tokens: list(range(len(text.split()))))
        self.tokenizer = words


def asked_of(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: Any, *says: StandIn, most: int | None = None
) -> asking.Asked:
    """A cell for each stand-in, of one task of this kind."""
    raw = fake.raw_params(("sql",))
    raw["tasks"] = {"mine": {**raw["tasks"]["sql"], "kind": kind, "options": options.model_dump()}}
    raw["grid"]["tasks"] = ["mine"]
    params = check_params(raw, "test")
    models_of = dict(zip((f"tiny/mine/{method}/seed-0" for method in ("fft", "lora")), says, strict=False))
    monkeypatch.setattr(lineage, "find", Cell.parse)
    monkeypatch.setattr(cells, "weights", lambda cell: cell.weights)
    monkeypatch.setattr(cells, "load", lambda cell, *_: models_of[cell.name])
    return asking.Asked(list(models_of), params, most)


def rows_of(*records: dict[str, Any]) -> list[Any]:
    return [as_row(number, record) for number, record in enumerate(records, start=1)]


def answered(asked: asking.Asked, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is written of rows."""
    questions = asked.questions(rows_of(*records))
    said = iter(zip(*asked.answers(questions), strict=True))
    return [predict.as_record(asked, q, next(said) if q.error is None else ()) for q in questions]


def test_queries_are_asked_by_either_sets_columns_and_judged_where_the_answer_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = asked_of(monkeypatch, "sql", SqlOptions(must_run=True), Model(lambda prompt: " select 1 "), most=3)
    context = "CREATE TABLE t (a INT)"
    found = answered(
        asked,
        [
            {"sql_prompt": " Which? ", "sql_context": context},
            {"question": "Which?", "context": context, "db_id": "d", "query": "SELECT  1"},
            {"sql_prompt": "Which?", "sql_context": context, "sql": "SELECT 2", "id": 7},
            {"sql_prompt": "Which?", "sql_context": context, "sql": "SELECT broken FROM t"},
            {"sql_prompt": "Which?", "sql": "SELECT 1"},
            {"prompt": "-- to the letter "},
            {"text": "?"},
            {"prompt": ""},
        ],
    )
    prompt = f"{context}\n\n-- Question: Which?\n-- Query:"
    assert [row["prompt"] for row in found] == [prompt] * 4 + [None, "-- to the letter ", None, None]
    assert [row["prediction"] for row in found] == ["select 1"] * 4 + [None, "select 1", None, None]
    # A gold query that does not run judges nobody.
    assert [row["gold"] for row in found] == [None, "SELECT  1", "SELECT 2", None, None, None, None, None]
    assert [row["right"] for row in found] == [None, True, False, None, None, None, None, None]
    assert found[2]["id"] == 7 and [row["error"] for row in found[:4]] == [None] * 4
    assert found[4]["error"] == "sql_context: is given"
    assert found[6]["error"] == "has no column prompt, and none of sql_prompt, sql_context"
    assert found[7]["error"] == "prompt: is no text, or empty" and found[7]["prompt (given)"] == ""
    assert len({tuple(key for key in row if key in found[0]) for row in found[:6]}) == 3  # its own columns aside


def likes(letter: str, *, others: float = 0.1) -> Model:
    """Prefers a letter at log-probability log 0.2 to others of log 0.1 or so."""
    return Model(lambda prompt: "", lambda prompt, said: [np.log(0.2 if said == f" {letter}" else others)])


def test_letters_are_chosen_among_a_rows_own_options_and_two_cells_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ChoiceOptions(question="q", options="o", answer="a", answer_is="index0")
    asked = asked_of(monkeypatch, "choice", options, likes("C"), likes("A"))
    found = answered(
        asked,
        [
            {"q": "Which?", "o": ["red", "blue"], "a": 0},
            {"q": "Which?", "o": ["red", "blue", "green"]},
            {"q": "Which?", "o": ["red"]},
            {"prompt": letters.prompt("Which?", ["one", "two", "three"]), "prediction": "mine"},
            {"prompt": "Which?"},
        ],
    )
    assert [row["prediction"] for row in found] == ["A", "C", None, "C", None]
    assert [row["other_prediction"] for row in found] == ["A", "A", None, "A", None]
    assert [row["prediction_option"] for row in found] == ["red", "green", None, "three", None]
    assert [row["same"] for row in found] == [True, False, None, False, None]
    shares = [row["prediction_probability"] for row in found]
    assert shares[0] == pytest.approx(0.5) and shares[1] == shares[3] == pytest.approx(0.5) and shares[2] is None
    assert (found[0]["right"], found[0]["other_right"], found[0]["gold"]) == (True, True, "A")
    assert "is a list of 2 to 26 options" in found[2]["error"] and "lists no options" in found[4]["error"]
    assert found[3]["prediction (given)"] == "mine" and "prompt (given)" not in found[3]


def test_conversations_are_asked_as_such_and_prompts_become_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(lambda said: said.upper())
    asked = asked_of(monkeypatch, "completion", CompletionOptions(messages="talk"), model)
    turn, reply = {"role": "user", "content": "hi"}, {"from": "gpt", "value": "HI"}
    found = answered(asked, [{"talk": [turn, reply]}, {"talk": [turn]}, {"prompt": "ho"}, {"talk": [reply]}])
    assert [row["prediction"] for row in found] == ["HI", "HI", "HO", None]
    assert [row["right"] for row in found] == [True, None, None, None]
    assert found[0]["prompt"] == "User: hi" and "has not the first turn" in found[3]["error"]
    assert model.calls == ["chat 8"]


def test_a_prompt_that_is_too_long_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    options = CompletionOptions(prompt="Say {text}", completion="answer")
    asked = asked_of(monkeypatch, "completion", options, Model(lambda prompt: prompt, places=40), most=5)
    found = answered(asked, [{"text": "w " * 33}, {"text": "w " * 34}, {"text": "w" * 9000}])
    assert [row["error"] is None for row in found] == [True, False, True]
    assert found[1]["error"] == "is 36 tokens long; with 5 of an answer the model has places for 40"


def test_a_conversation_that_the_template_refuses_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict:
        """A chat template without a system's turn."""

        def __init__(self, tokenizer: Any) -> None: ...

        def encode_prompt(self, messages: Any) -> list[int]:
            if messages[0]["role"] == "system":
                raise UserError("the model's chat template refuses it")
            return [0] * 50

    class Chatting(Model):
        def chat(self, conversations: Any, max_new_tokens: int) -> list[str]:
            for talk in conversations:
                Strict(None).encode_prompt(talk)
            return super().chat(conversations, max_new_tokens)

    monkeypatch.setattr(asking, "Chat", Strict)
    asked = asked_of(monkeypatch, "completion", CompletionOptions(messages="talk"), Chatting(str.upper))
    system, turn = {"role": "system", "content": "be"}, {"role": "user", "content": "hi"}
    found = answered(asked, [{"talk": [system, turn]}, {"talk": [turn]}])
    assert [row["error"] for row in found] == ["the model's chat template refuses it", None]
    assert [row["prediction"] for row in found] == [None, "HI"]
    asked = asked_of(monkeypatch, "completion", CompletionOptions(messages="talk"), Chatting(str.upper, places=40))
    (long,) = answered(asked, [{"talk": [turn]}])
    assert long["error"] == "is 50 tokens long; with 8 of an answer the model has places for 40"


def test_rows_that_cannot_be_read_and_lines_of_a_pipe() -> None:
    stream = io.BytesIO(b"\xef\xbb\xbfone two\r\n\n  \n \xff\nthree")
    found = list(predict.prompts(stream))
    assert [(row.number, row.problem) for row in found] == [(1, None), (4, "is UTF-8"), (5, None)]
    assert [json.loads(row.record) for row in found] == [{"prompt": "one two"}, " \\xff\n", {"prompt": "three"}]


def test_chunks_begin_small_and_keep_what_came_before_an_error() -> None:
    def rows(count: int) -> Iterator[Any]:
        yield from rows_of(*({"prompt": f"w{i}"} for i in range(count)))
        raise UserError("broken")

    chunks = predict.chunks(rows(9), 2, 4)
    assert [len(next(chunks)) for _ in range(3)] == [2, 4, 3]
    with pytest.raises(UserError, match="broken"):
        next(chunks)
    big = [{"prompt": "x" * (predict.CHUNK_BYTES // 2)}] * 4
    assert [len(chunk) for chunk in predict.chunks(rows_of(*big), 100, 100)] == [2, 2]


# --- whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("molf.models.quiet", lambda: None)  # which is for good
    return tmp_path / "project"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_cell_answers_as_it_was_evaluated_in_the_files_order(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", LORA, "rows.jsonl", "--out", "made/out.jsonl", "--with", BASE]) == 0
    said, found = capsys.readouterr(), lines_of(Path("made/out.jsonl"))
    given = lines_of(Path("rows.jsonl"))
    assert [row["requested_rewrite"] for row in found] == [row["requested_rewrite"] for row in given]
    (bad,) = [row for row in found if row["error"] is not None]
    assert "has {} once" in bad["error"] and bad["prediction"] is None and bad["same"] is None
    for name, column in ((LORA, "prediction"), (BASE, "other_prediction")):
        by_prompt = {row["prompt"]: row[column] for row in found}
        test = pd.read_parquet("data/prepared/fact/test.parquet")
        judged = pd.read_parquet(f"results/{name}/evaluation/predictions.parquet")
        expected = dict(zip(test["prompt"], judged["prediction"].str.strip(), strict=True))
        assert expected and expected == {prompt: by_prompt[prompt] for prompt in expected}
    good = [row for row in found if row["error"] is None]
    assert all(row["gold"] == row["requested_rewrite"]["target_new"]["str"] for row in good)
    assert all(row["right"] == row["prediction"].startswith(row["gold"]) for row in good)
    assert all(row["same"] == (row["prediction"] == row["other_prediction"]) for row in good)
    assert said.out == "" and not list(Path("made").glob("*.part"))
    same, right = sum(row["same"] for row in good), sum(row["right"] for row in good)
    for words in (
        "32 rows: 31 answered, 1 with an error (first: row 31: requested_rewrite.prompt: has {} once",
        f"{LORA}: {right} of 31 with a gold answer right",
        f"the same answer: {same} of 31",
        "next: molf lineage",
    ):
        assert words in said.err, said.err


def test_tables_text_and_the_first_rows(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("asked.csv").write_text('id,prompt\n1,w1 w2\n2,\n3,"w3, w4"\n')
    assert run(["predict", FFT, "asked.csv", "--out", "out.csv", "--max-new-tokens", "2"]) == 0
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2", "3"] and [row["prompt"] for row in rows] == ["w1 w2", "", "w3, w4"]
    assert rows[1]["error"] == "prompt: is no text, or empty" and rows[0]["error"] == rows[1]["prediction"] == ""
    assert all(len(rows[i]["prediction"].split()) <= 2 for i in (0, 2))
    capsys.readouterr()
    Path("asked.txt").write_text("w1 \x1b[31mw2\nw3\n")
    assert run(["predict", FFT, "asked.txt", "--rows", "1"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["prompt"] == "w1 \x1b[31mw2" and set(row) == {"prompt", "prediction", "gold", "right", "error"}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["predict", FFT, "asked.txt", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("row 1\n") and "w1 \\x1b[31mw2" in shown and FFT in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny/fact/lora/seed-9", "rows.jsonl"], "there is no cell"),
        ([LORA, "no.jsonl"], "no.jsonl: there is no such file"),
        ([LORA, "no.txt"], "no.txt: there is no such file"),
        ([LORA, "params.yaml"], "or .txt with a prompt in each line"),
        ([LORA, "empty.txt"], "empty.txt has no rows"),
        ([LORA, "other.jsonl"], "no row of other.jsonl can be asked, the first because: row 1: has no column prompt"),
        ([LORA, "rows.jsonl", "--out", "x.xlsx"], "allowed: .jsonl, .csv, .tsv"),
        ([LORA, "rows.jsonl", "--out", "rows.jsonl"], "is the file that is asked"),
        ([LORA, "rows.jsonl", "--rows", "0"], "--rows 0: at least 1"),
        ([LORA, "rows.jsonl", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
    ],
)
def test_what_cannot_be_asked_is_said(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("empty.txt").write_text("\n\n")
    Path("other.jsonl").write_text('{"text": "w1"}\n')
    assert run(["predict", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert len(lines_of(Path("rows.jsonl"))) == 32 and not list(Path().glob("*.part"))


def test_weights_and_blocks_that_are_not_here_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = read_json(Path("params.yaml"))
    write_json(Path("params.yaml"), {**raw, "methods": {k: v for k, v in raw["methods"].items() if k != "molf"}})
    raw["grid"]["methods"].remove("molf")
    write_json(Path("params.yaml"), {**raw, "methods": {k: v for k, v in raw["methods"].items() if k != "molf"}})
    assert run(["predict", "tiny/fact/molf/seed-0", "rows.jsonl"]) == 2
    assert "params.yaml has no block methods.molf" in capsys.readouterr().err
    shutil.rmtree(f"weights/{LORA}")
    assert run(["predict", LORA, "rows.jsonl"]) == 2
    assert f"`dvc pull weights/{LORA}`" in capsys.readouterr().err
    shutil.rmtree(f"weights/{FFT}")
    write_json(Path(f"weights/{FFT}") / models.ELSEWHERE, {"path": ".molf/gone", "hash": "0"})
    assert run(["predict", FFT, "rows.jsonl"]) == 2
    assert "`dvc repro -f -s train@tiny-fact-fft-0`" in capsys.readouterr().err


def test_answers_before_an_interrupt_or_a_broken_file_stay(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"w{i}"} for i in range(70)]
    Path("cut.json").write_text(json.dumps(rows)[:-1])
    assert run(["predict", FFT, "cut.json", "--out", "out.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "the list ends too early" in said and "70 rows were answered, as JSON lines in out.jsonl.part" in said
    assert len(lines_of(Path("out.jsonl.part"))) == 70 and not Path("out.jsonl").exists()

    with pytest.MonkeyPatch.context() as patch:
        calls = iter([None, KeyboardInterrupt()])
        answers = asking.Asked.answers

        def interrupted(self: asking.Asked, questions: Any) -> Any:
            if (error := next(calls)) is not None:
                raise error
            return answers(self, questions)

        patch.setattr(asking.Asked, "answers", interrupted)
        Path("rows.txt").write_text("".join(f"w{i}\n" for i in range(70)))
        assert run(["predict", FFT, "rows.txt", "--out", "out.jsonl"]) == 1
    assert "interrupted: 64 rows were answered, as JSON lines in out.jsonl.part" in capsys.readouterr().err
    assert len(lines_of(Path("out.jsonl.part"))) == 64


def test_a_pipe_is_read_and_may_be_closed(project: Path) -> None:
    command = f"yes 'w1 w2' | {sys.executable} -c 'from molf.cli import entry; entry()' predict {FFT} - | head -n 2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"({command}); echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET},
        timeout=120,
    )
    first, second, _ = done.stdout.splitlines()
    assert first == second and json.loads(first)["prompt"] == "w1 w2"
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr, done.stderr


def test_two_cells_of_unlike_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params: Params = fake.write_tree(tmp_path, fake.raw_params())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"tiny/sql/fft/seed-0 \(sql\), tiny/fact/fft/seed-0 \(fact\): .* of one kind"):
        asking.Asked(["tiny/sql/fft/seed-0", "tiny/fact/fft/seed-0"], params, None)
