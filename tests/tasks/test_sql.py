import sqlite3
import time
from pathlib import Path

import pandas as pd
import pytest

from molf.blocks import SqlOptions
from molf.errors import RunError
from molf.raw import extract_databases
from molf.tasks import sql
from tests.tasks.helpers import EVALUATION, SHARED, StandIn, real, rejected, with_ids

OPTIONS = SqlOptions(must_run=True)
PEOPLE = "CREATE TABLE people (name TEXT, age INT); INSERT INTO people VALUES ('Ann', 30), ('Bob', 40), ('Cy', 40);"


def gretel(*queries: str, context: str = PEOPLE) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sql_prompt": [f"Question {i}?" for i in range(len(queries))],
            "sql_context": context,
            "sql": list(queries),
        }
    )


def scored(frame: pd.DataFrame, said: list[str], options: SqlOptions = OPTIONS) -> pd.DataFrame:
    examples = with_ids(sql.to_examples(frame, options))
    answers = iter(said)
    return sql.predict(StandIn(lambda _: next(answers)), examples, EVALUATION)  # type: ignore[arg-type]


def gold_as_prediction(frame: pd.DataFrame, options: SqlOptions = OPTIONS) -> pd.DataFrame:
    return scored(frame, [f" {query}" for query in frame["sql" if "sql" in frame else "query"]], options)


def test_the_prompt_and_the_completion() -> None:
    assert sql.prompt("CREATE TABLE t (x);", "How many?") == "CREATE TABLE t (x);\n\n-- Question: How many?\n-- Query:"
    assert sql.completion("SELECT 1") == " SELECT 1"


def test_both_sets_of_columns_become_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    sqlite3.connect(tmp_path / "zoo/zoo.sqlite").close()
    spider = pd.DataFrame(
        {
            "db_id": ["zoo", "g" * 300, "../zoo"],
            "question": "Q?",
            "context": " CREATE TABLE t (x)",
            "query": "SELECT 1 ",
        }
    )
    examples = with_ids(
        sql.to_examples(spider.set_index(pd.Index([4, 2, 9])), SqlOptions(databases=str(tmp_path), must_run=True))
    )
    sql.prepared_schema().validate(examples, lazy=True)
    assert examples.index.tolist() == [4, 2, 9]
    assert examples["db_id"].tolist() == ["zoo", "g" * 300, "../zoo"]
    assert examples.loc[4, "database"] == str(tmp_path / "zoo/zoo.sqlite")
    assert examples["database"].isna().tolist() == [False, True, True]
    other = with_ids(sql.to_examples(gretel("SELECT 1", context="CREATE TABLE t (x)"), OPTIONS))
    sql.prepared_schema().validate(other, lazy=True)
    assert other["completion"].tolist() == [examples.loc[4, "completion"]] == [" SELECT 1"]
    assert other["db_id"].isna().all() and other["database"].isna().all()


def test_columns_of_the_other_set_s_names_have_no_part() -> None:
    plain = gretel("SELECT 1", "SELECT 2")
    odd = plain.assign(question=None, context=7, db_id="zoo")
    frame = sql.normalise(odd, OPTIONS)
    assert rejected(sql.raw_schema(OPTIONS), frame) == set()
    pd.testing.assert_frame_equal(sql.to_examples(frame, OPTIONS), sql.to_examples(plain, OPTIONS))
    assert sql.identity(frame, OPTIONS).tolist() == ["Question 0?\nSELECT 1", "Question 1?\nSELECT 2"]


def test_a_bad_row_is_found_with_its_check() -> None:
    frame = gretel("SELECT 1", "SELECT 2", "  ").assign(
        sql_prompt=pd.Series(["a", 5, "c"]), sql_context=pd.Series([None, "b", "c\x1b"])
    )
    assert rejected(sql.raw_schema(OPTIONS), frame) == {
        ("is given", 0),
        ("is text", 1),
        ("is not empty", 2),
        ("has no control characters", 2),
    }


@pytest.mark.parametrize(
    ("gold", "said", "accuracy", "exact", "valid"),
    [
        ("SELECT name FROM people", "select NAME from People;", 1, 1, 1),
        ("SELECT name FROM people", "SELECT name FROM people WHERE age > 1", 1, 0, 1),
        ("SELECT name FROM people", "SELECT name FROM people ORDER BY name DESC", 1, 0, 1),
        ("SELECT name FROM people ORDER BY name", "SELECT name FROM people ORDER BY name DESC", 0, 0, 1),
        ("SELECT age FROM people", "SELECT DISTINCT age FROM people", 0, 0, 1),
        ("SELECT name, age FROM people", "SELECT age, name FROM people", 0, 0, 1),
        ("SELECT AVG(age) FROM people", "SELECT SUM(age) / 3.0 FROM people", 1, 0, 1),
        ("SELECT name FROM people", "SELECT nme FROM people", 0, 0, 0),
        ("SELECT name FROM people", "SELECT name FROM people; SELECT 1", 0, 0, 0),
        ("SELECT name FROM people", "", 0, 0, 0),
        ("SELECT name FROM people WHERE age > 99", "DELETE FROM people", 0, 0, 1),
        ("DELETE FROM people WHERE age = 40", "DELETE FROM people WHERE age > 30", 1, 0, 1),
        ("DELETE FROM people WHERE age = 40", "DELETE FROM people", 0, 0, 1),
        ("DELETE FROM people WHERE age = 99", "SELECT name FROM people", 0, 0, 1),
        ("INSERT INTO people VALUES ('Di', 1)", "INSERT INTO people (age, name) VALUES (1, 'Di')", 1, 0, 1),
        ("UPDATE people SET age = 41 WHERE age = 40", "UPDATE people SET age = 41 WHERE name <> 'Ann'", 1, 0, 1),
        ("UPDATE people SET age = 41 WHERE age = 40", "UPDATE people SET age = 41", 0, 0, 1),
    ],
)
def test_scores_of_hand_made_queries(gold: str, said: str, accuracy: float, exact: float, valid: float) -> None:
    row = scored(gretel(gold), [said]).iloc[0]
    assert (row["execution_accuracy"], row["exact_match"], row["valid_sql"]) == (accuracy, exact, valid)
    assert (row["error"] == row["error"]) == (valid == 0)  # NaN where there is none


def test_a_gold_query_that_does_not_run_is_left_out_and_counted() -> None:
    predictions = scored(gretel("SELECT name FROM people", "SELECT CURDATE()"), ["SELECT name FROM people", "SELECT 1"])
    assert predictions["execution_accuracy"].isna().tolist() == [False, True]
    assert predictions["gold_error"].tolist()[1] == "no such function: CURDATE"
    assert sql.metrics(predictions) == {
        "primary": 1.0,
        "primary_name": "execution_accuracy",
        "n": 1,
        "left_out": {"gold_does_not_run": 1},
        "execution_accuracy": 1.0,
        "exact_match": 0.5,
        "valid_sql": 1.0,
        "errors": {},
    }


def test_predictions_that_do_not_run_are_counted_by_kind() -> None:
    gold = "SELECT name FROM people"
    said = [gold, "SELECT nme FROM people", "SELECT nm FROM people", "ATTACH 'x' AS x", "", f"{gold}; {gold}"]
    predictions = scored(gretel(*[gold] * len(said)), said)
    kinds = ["no_such_column", "no_such_column", "forbidden", "empty", "several_statements"]
    assert predictions["error_kind"].tolist()[1:] == kinds and pd.isna(predictions["error_kind"][0])
    scores = sql.metrics(predictions)
    assert scores["errors"] == {"no_such_column": 2, "forbidden": 1, "empty": 1, "several_statements": 1}
    assert scores["valid_sql"] == scores["execution_accuracy"] == 1 / 6 and scores["n"] == 6


def test_spider_rows_without_their_database_are_not_judged() -> None:
    """On Spider's context, which has no rows, most queries agree."""
    frame = pd.DataFrame(
        {"db_id": ["zoo"], "question": ["Q?"], "context": ["CREATE TABLE t (x)"], "query": ["SELECT x FROM t"]}
    )
    predictions = gold_as_prediction(frame)
    assert predictions["left_out"].tolist() == ["no_database"]
    assert predictions["valid_sql"].tolist() == [1.0]
    with pytest.raises(RunError, match=r"no_database.*options\.databases"):
        sql.metrics(predictions)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("SELECT a  FROM t;", 'select "A"\nfrom T', True),
        ("SELECT count(*) FROM t -- all", "SELECT COUNT(*) FROM t", True),
        ("SELECT a FROM t WHERE b <> 'X'", "SELECT a FROM t WHERE b != 'X'", True),
        ("SELECT a FROM t WHERE b = 'X'", "SELECT a FROM t WHERE b = 'x'", False),
        ("SELEC (", " SELEC (; ", True),
        ("SELEC (", "SELEC )", False),
        ("", "SELECT 1", False),
        ("(" * 3000, "SELECT 1", False),
    ],
)
def test_canonical(one: str, other: str, equal: bool) -> None:
    assert (sql.canonical(one) == sql.canonical(other)) is equal


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        # A text, by SQLite's leave, in what is else the quotes of a name.
        ('SELECT a FROM t WHERE b = "Robbin CV"', 'SELECT A FROM t WHERE b = "Robbin CV"', True),
        ('SELECT a FROM t WHERE b = "robbin cv"', 'SELECT a FROM t WHERE b = "Robbin CV"', False),
        ('SELECT "A" FROM t', "SELECT a FROM t", True),
        ('SELECT t."A" FROM t', 'SELECT t."a" FROM t', True),
        ('SELECT a FROM "T"', 'SELECT a FROM "t"', True),
        ("SELEC (", "SELEC (;", True),
    ],
)
def test_a_text_in_double_quotes_keeps_its_case(answer: str, gold: str, equal: bool) -> None:
    assert sql.right(answer, gold) is equal and sql.right(gold, answer) is equal


@pytest.mark.parametrize("word", ["CHAR", "DECIMAL", "STRUCT", "UNION", "x", ""])
def test_what_a_model_says_over_and_over_is_spelled_in_no_time(word: str) -> None:
    started = time.process_time()
    for end in ("", "1", "1" + ")" * 60):
        said = f"SELECT {word}(" + f"{word}(" * 59 + end
        assert sql.right(said, said) and not sql.right(said, "SELECT 1")
    assert time.process_time() - started < 5  # each of these would take years
    assert sql.right("SELECT " + "(" * 10 + "1" + ")" * 10, "select " + "( " * 10 + "1" + ")" * 10)


@pytest.mark.parametrize(("split", "share"), [("train", 0.9655), ("eval", 0.98)])
def test_real_gretel_rows(split: str, share: float) -> None:
    frame = real(f"sql/gretel_{split}.jsonl.gz")
    assert rejected(sql.raw_schema(OPTIONS), frame) == set()
    scores = sql.metrics(gold_as_prediction(frame))
    assert scores["execution_accuracy"] == scores["exact_match"] == 1.0
    assert scores["n"] / len(frame) == scores["valid_sql"] == pytest.approx(share, abs=1e-3)


def test_real_spider_rows(tmp_path: Path) -> None:
    frame = real("sql/spider_dev.jsonl.gz")
    assert rejected(sql.raw_schema(OPTIONS), frame) == set()
    extract_databases(SHARED / "sql/spider_databases.tar.gz", tmp_path, "databases")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*") if path.parent.name in set(frame["db_id"])}
    scores = sql.metrics(gold_as_prediction(frame, SqlOptions(databases=str(tmp_path), must_run=True)))
    assert scores["execution_accuracy"] == scores["exact_match"] == 1.0
    assert scores["n"] == len(frame) and before
    assert before == {path: path.read_bytes() for path in before}
