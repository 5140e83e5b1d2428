import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from molf.sqlexec import Outcome, SqlExecutor, has_order, same_result

TEN = "CREATE TABLE t (x INT); INSERT INTO t VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9), (10);"
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) "
# FOLDER is replaced by a folder in which no file may appear.
HOSTILE = [
    "ATTACH DATABASE 'FOLDER/a.db' AS a",
    "ATTACH DATABASE 'file:FOLDER/a.db?mode=rwc' AS a",
    "DETACH DATABASE main",
    "VACUUM",
    "VACUUM INTO 'FOLDER/b.db'",
    "PRAGMA writable_schema = 1",
    "PRAGMA temp_store_directory = 'FOLDER'",
    "PRAGMA hard_heap_limit = 0",
    "SELECT * FROM pragma_database_list",
    "SELECT load_extension('FOLDER/x.so')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('FOLDER/c', 'x')",
    "SELECT edit('x', 'touch FOLDER/d')",
    "SELECT fts3_tokenizer('simple')",
    "CREATE VIRTUAL TABLE v USING fts5(x)",
    "CREATE VIRTUAL TABLE v USING csv(filename = '/etc/passwd')",
    "SELECT * FROM fsdir('/')",
    "SELECT 1; DROP TABLE t",
    "SELECT 1; ATTACH DATABASE 'FOLDER/a.db' AS a",
    "UPDATE sqlite_master SET sql = 'x'",
    "DELETE FROM sqlite_master",
    ENDLESS.format("") + "SELECT count(*) FROM n",
    ENDLESS.format("") + "SELECT i FROM n",
    ENDLESS.format("") + "INSERT INTO t SELECT i FROM n",
    ENDLESS.format(" LIMIT 10000") + "SELECT randomblob(1000000) AS b FROM n ORDER BY b",
    "CREATE TABLE big AS " + ENDLESS.format(" LIMIT 10000") + "SELECT randomblob(1000000) FROM n",
    "SELECT randomblob(900000000)",
    "SELECT hex(zeroblob(1000000000))",
    "SELECT replace(hex(zeroblob(400000)), '0', hex(zeroblob(400000)))",
    "SELECT " + ", ".join(["printf('%.*c', 1000000000, 'x')"] * 10),  # each one operation, which cannot be interrupted
    "SELECT * FROM t a, t b, t c, t d, t e, t f, t g, t h",
    "SELECT '" + "a" * 900_000 + "' LIKE '" + "%a" * 50_000 + "b'",
    "SELECT " + "(" * 50_000 + "1" + ")" * 50_000,
    "SELECT 1" + " + 1" * 100_000,
    " UNION ".join(["SELECT 1"] * 5000),
    "SELECT '" + "x" * 3_000_000 + "'",
    "SELECT 'a\0b'",
    "SELECT '\ud800'",
    "",
    " ; ",
    "-- nothing",
    "/* open",
]


@pytest.fixture(scope="module")
def executor() -> Iterator[SqlExecutor]:
    with SqlExecutor(seconds=0.3) as executor:
        yield executor


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: repr(query[:40]))
def test_a_hostile_query_costs_only_itself(executor: SqlExecutor, tmp_path: Path, query: str) -> None:
    root = set(os.listdir("/"))
    started = time.perf_counter()
    outcome = executor.run(TEN, query.replace("FOLDER", str(tmp_path)))
    assert not outcome.ok and outcome.reason
    assert time.perf_counter() - started < 10
    assert list(tmp_path.iterdir()) == [] and set(os.listdir("/")) == root
    assert executor.run(TEN, "SELECT count(*) FROM t").rows == [(10,)]


def test_a_hostile_context_costs_only_itself(executor: SqlExecutor, tmp_path: Path) -> None:
    for script in (f"ATTACH '{tmp_path}/a.db' AS a; CREATE TABLE a.t (x);", ENDLESS.format("") + "SELECT i FROM n;"):
        outcome = executor.run(script, "SELECT 1")
        assert not outcome.ok and outcome.reason is not None and outcome.reason.startswith("context: ")
    assert list(tmp_path.iterdir()) == []


def test_a_dead_worker_is_replaced() -> None:
    with SqlExecutor() as executor:
        assert executor.run(TEN, "SELECT 1").ok
        worker = executor._worker
        assert worker is not None
        worker.kill()
        worker.wait()
        outcome = executor.run(TEN, "SELECT 1")
        assert not outcome.ok and outcome.reason is not None and "died" in outcome.reason
        assert executor.run(TEN, "SELECT 1").ok
        last = executor._worker
    assert last is not None and last.poll() is not None


def test_every_query_has_a_fresh_database(executor: SqlExecutor) -> None:
    assert executor.run(TEN, "DELETE FROM t").tables == {"indexes, triggers, views": [], "t (x)": []}
    assert executor.run(TEN, "BEGIN").ok
    assert executor.run(TEN, "SELECT count(*) FROM t").rows == [(10,)]
    assert not executor.run("CREATE TABLE u (x)", "SELECT * FROM t").ok


def test_values_of_every_type_come_back(executor: SqlExecutor) -> None:
    outcome = executor.run("", "SELECT 1, 2.5, 'é\n', x'00ff', NULL, 9223372036854775807, 9e999, cast(x'ff' AS TEXT)")
    assert outcome == Outcome(
        True, [(1, 2.5, "é\n", b"\x00\xff", None, 9223372036854775807, float("inf"), "\ufffd")], None, None
    )


def test_a_file_is_copied_and_stays_as_it_is(executor: SqlExecutor, tmp_path: Path) -> None:
    file = tmp_path / "a # file?.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript(TEN)
    connection.close()
    before = file.read_bytes()
    assert executor.run("not run", "SELECT max(x) FROM t", file).rows == [(10,)]
    assert executor.run("not run", "DROP TABLE t", file).ok
    assert executor.run("not run", "SELECT max(x) FROM t", file).rows == [(10,)]
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    assert not executor.run("", "SELECT 1", tmp_path / "none.sqlite").ok


@pytest.mark.parametrize(
    ("query", "writes"),
    [
        ("SELECT x FROM t", False),
        ("WITH a AS (SELECT x FROM t) SELECT * FROM a", False),
        ("SELECT value FROM json_each('[1, 2]')", False),
        ("INSERT INTO t VALUES (1)", True),
        ("INSERT INTO t VALUES (1) RETURNING x", True),
        ("WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", True),
        ("UPDATE t SET x = x WHERE x = 99", True),
        ("DELETE FROM t WHERE x = 99", True),
        ("REPLACE INTO t VALUES (1)", True),
        ("CREATE TABLE u AS SELECT 1 AS y", True),
        ("CREATE VIEW v AS SELECT 1", True),
        ("CREATE INDEX i ON t (x)", True),
        ("ALTER TABLE t ADD COLUMN y", True),
        ("DROP TABLE t", True),
    ],
)
def test_a_writing_query_is_known_by_what_it_does(executor: SqlExecutor, query: str, writes: bool) -> None:
    outcome = executor.run(TEN, query)
    assert outcome.ok and (outcome.tables is not None) is writes


def test_changes_of_the_schema_show(executor: SqlExecutor) -> None:
    queries = [
        "DELETE FROM t WHERE x = 99",
        "CREATE TABLE u (y)",
        "CREATE TABLE u (z)",
        "CREATE VIEW u AS SELECT 1",
        "CREATE INDEX u ON t (x)",
        "ALTER TABLE t ADD COLUMN y",
        "ALTER TABLE t RENAME TO u",
    ]
    outcomes = [executor.run(TEN, query) for query in queries]
    for i, one in enumerate(outcomes):
        for j, other in enumerate(outcomes):
            assert same_result(one, other, in_order=False) is (i == j)


def read(*rows: tuple[object, ...]) -> Outcome:
    return Outcome(True, list(rows), None, None)


def test_rows_are_compared_as_multisets_or_in_order() -> None:
    gold = read((1, "a"), (2, "b"), (2, "b"))
    turned = read((2, "b"), (1, "a"), (2, "b"))
    assert same_result(gold, turned, in_order=False) and not same_result(gold, turned, in_order=True)
    assert not same_result(gold, read((1, "a"), (2, "b")), in_order=False)
    assert not same_result(gold, read((1, "a"), (1, "a"), (2, "b")), in_order=False)
    assert not same_result(read((0.1 + 0.2,)), read((0.3,)), in_order=True)  # equal means equal
    assert same_result(read((2,)), read((2.0,)), in_order=False)
    assert not same_result(read(("2",)), read((2,)), in_order=False)
    assert not same_result(read((None,)), read((0,)), in_order=False)


def test_a_failed_query_equals_nothing_and_reading_is_not_writing() -> None:
    failed = Outcome(False, [], None, "no such table")
    assert not same_result(failed, failed, in_order=False)
    assert not same_result(read(), failed, in_order=False)
    assert not same_result(read(), Outcome(True, [], {"t (x)": []}, None), in_order=False)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3;", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'x ORDER BY y' FROM t", False),
        ('SELECT "order" by FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT ')' FROM t ORDER BY a", True),
    ],
)
def test_has_order(query: str, ordered: bool) -> None:
    assert has_order(query) is ordered


def test_hundreds_of_queries_a_second(executor: SqlExecutor) -> None:
    executor.run(TEN, "SELECT 1")
    started = time.perf_counter()
    for _ in range(300):
        executor.run(TEN, "SELECT sum(x) FROM t")
    assert time.perf_counter() - started < 3  # some 0.15 s on two quiet cores
