"""What comes of SQL that a model wrote, read from a pool that ran all of the hostile statements side by side."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molf import sqlexec, sqlworker
from molf.errors import RunError
from molf.sqlexec import Job, Outcome, SqlExecutor, has_order, same_result

TEN = "CREATE TABLE t (x INT); INSERT INTO t VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9), (10);"
SECONDS = 0.3
LIMIT = 3 * SECONDS + 1  # the parent's, on the wall's clock of a machine that has a core for each worker
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) "
NAME = f"hostile-{os.getpid()}"  # of every file that a statement asks for
RUNS = "runs"
MEGABYTE = "hex(zeroblob(499999))"

# Statement, and what may come of it: `RUNS` where it is harmless, else kinds of failures. More than one where versions
# of SQLite differ. $FOLDER is replaced by a folder in which no file may appear, $NAME by that of a file.
HOSTILE: list[tuple[str, str]] = [
    # files and extensions
    ("ATTACH DATABASE '$FOLDER/$NAME' AS a", "forbidden"),
    ("ATTACH DATABASE 'file:$FOLDER/$NAME?mode=rwc' AS a", "forbidden"),
    ("ATTACH '$NAME' AS a", "forbidden"),
    ("ATTACH ':memory:' AS a", "forbidden"),
    ("ATTACH '' AS a", "forbidden"),
    ("DETACH DATABASE main", "forbidden"),
    ("VACUUM", "forbidden"),
    ("VACUUM INTO '$FOLDER/$NAME'", "forbidden"),
    ("VACUUM main INTO '$NAME'", "forbidden"),
    ("SELECT load_extension('$FOLDER/$NAME.so')", "forbidden"),
    ("SELECT load_extension('$NAME', 'main')", "forbidden"),
    ("SELECT readfile('/etc/passwd')", "no_such_function"),
    ("SELECT writefile('$FOLDER/$NAME', 'x')", "no_such_function"),
    ("SELECT edit('x', 'touch $FOLDER/$NAME')", "no_such_function"),
    ("SELECT fts3_tokenizer('simple')", "forbidden no_such_function"),
    ("SELECT * FROM fsdir('/')", "no_such_table"),
    (".shell touch $FOLDER/$NAME", "syntax"),
    (".output $NAME", "syntax"),
    ("COPY t TO '$FOLDER/$NAME'", "syntax"),
    ("SELECT * FROM t INTO OUTFILE '$FOLDER/$NAME'", "syntax"),
    # pragmas
    ("PRAGMA writable_schema = 1", "forbidden"),
    ("PRAGMA journal_mode = WAL", "forbidden"),
    ("PRAGMA temp_store = FILE", "forbidden"),
    ("PRAGMA temp_store_directory = '$FOLDER'", "forbidden"),
    ("PRAGMA data_store_directory = '$FOLDER'", "forbidden"),
    ("PRAGMA mmap_size = 1000000000000", "forbidden"),
    ("PRAGMA hard_heap_limit = 0", "forbidden"),
    ("PRAGMA schema_version = 7", "forbidden"),
    ("PRAGMA trusted_schema = 1", "forbidden"),
    ("PRAGMA threads = 64", "forbidden"),
    ("PRAGMA cache_size = -100000000", "forbidden"),
    ("PRAGMA table_info(t)", "forbidden"),
    ("SELECT * FROM pragma_database_list", "forbidden"),
    ("SELECT * FROM pragma_compile_options", "forbidden"),
    # the schema
    ("UPDATE sqlite_master SET sql = 'x'", "forbidden"),
    ("DELETE FROM sqlite_master", "forbidden"),
    ("INSERT INTO sqlite_schema VALUES ('table', 'u', 'u', 2, 'CREATE TABLE u (x)')", "forbidden"),
    ("DROP TABLE sqlite_master", "forbidden"),
    ("CREATE TABLE sqlite_mine (x)", "forbidden other"),
    # virtual tables
    ("CREATE VIRTUAL TABLE v USING fts5(x)", "forbidden"),
    ("CREATE VIRTUAL TABLE temp.v USING rtree(i, a, b)", "forbidden"),
    ("CREATE VIRTUAL TABLE v USING csv(filename = '/etc/passwd')", "forbidden"),
    ("CREATE VIRTUAL TABLE v USING dbstat(main)", "forbidden"),
    ("SELECT sum(pgsize) FROM dbstat", "runs forbidden no_such_table"),
    ("SELECT * FROM sqlite_dbpage", "forbidden no_such_table"),
    ("SELECT count(*) FROM generate_series(1, 1000000000000)", "no_such_table time"),
    # without end
    (ENDLESS.format("") + "SELECT count(*) FROM n", "time"),
    (ENDLESS.format("") + "SELECT i FROM n", "size time"),
    (ENDLESS.format("") + "SELECT sum(i) OVER (ORDER BY i) FROM n", "time memory"),
    (ENDLESS.format("") + "INSERT INTO t SELECT i FROM n", "time memory"),
    (ENDLESS.format("") + "DELETE FROM t WHERE x IN (SELECT i FROM n)", "time memory"),
    (ENDLESS.format("") + "SELECT * FROM t WHERE EXISTS (SELECT 1 FROM n WHERE i < 0)", "time"),
    ("SELECT * FROM " + ", ".join(f"t {name}" for name in "abcdefghijkl"), "size time"),  # 10^12 rows
    ("SELECT count(*) FROM " + ", ".join(f"t {name}" for name in "abcdefghijkl"), "time"),
    ("SELECT count(*) FROM " + " CROSS JOIN ".join(f"t {name}" for name in "abcdefghijkl"), "time"),
    ("SELECT sum(a.x) OVER (ORDER BY b.x ROWS 99999999 PRECEDING) FROM t a, t b, t c, t d, t e, t f, t g", "time size"),
    # operations that are long each, and cannot be interrupted
    ("SELECT " + ", ".join(["printf('%.*c', 1000000000, 'x')"] * 10), "size time memory"),
    (f"SELECT instr({MEGABYTE}, substr({MEGABYTE}, 1, 499999) || 'x')", "time"),
    ("SELECT '" + "a" * 900_000 + "' LIKE '" + "%a" * 90 + "b'", "runs time"),
    ("SELECT '" + "a" * 900_000 + "' GLOB '" + "*a" * 90 + "b'", "runs time"),
    # bombs
    ("SELECT randomblob(900000000)", "size memory"),
    ("SELECT zeroblob(2000000000)", "size"),
    ("SELECT hex(zeroblob(1000000000))", "size"),
    ("SELECT printf('%2000000000d', 1)", "runs size memory"),
    ("SELECT replace(hex(zeroblob(400000)), '0', hex(zeroblob(400000)))", "size"),
    ("SELECT quote(zeroblob(900000)) || quote(zeroblob(900000))", "size"),
    (ENDLESS.format(" LIMIT 100000") + "SELECT group_concat(hex(randomblob(5000))) FROM n", "size time"),
    (ENDLESS.format(" LIMIT 100000") + "SELECT json_group_array(hex(randomblob(5000))) FROM n", "size memory time"),
    ("WITH RECURSIVE n (s) AS (SELECT 'x' UNION ALL SELECT s || s FROM n) SELECT length(s) FROM n", "size"),
    (ENDLESS.format(" LIMIT 10000") + "SELECT randomblob(1000000) AS b FROM n ORDER BY b", "memory time"),
    (ENDLESS.format(" LIMIT 1000") + "SELECT randomblob(100000) FROM n", "size time"),
    ("CREATE TABLE big AS " + ENDLESS.format(" LIMIT 10000") + "SELECT randomblob(1000000) FROM n", "memory time"),
    ("CREATE TABLE big AS SELECT 1 FROM t a, t b, t c, t d, t e, t f", "size time"),
    ("SELECT " + "json_array(" * 30 + "1" + ")" * 30, "runs complex"),
    ("SELECT json('" + "[" * 100_000 + "')", "other complex"),
    ("SELECT count(*) FROM json_tree('" + "[" * 900 + "]" * 900 + "')", "runs"),
    # deep and wide
    ("SELECT " + "(" * 50_000 + "1" + ")" * 50_000, "complex memory"),
    ("SELECT " + "(SELECT " * 5000 + "1" + ")" * 5000, "complex memory"),
    ("SELECT * FROM " + "(SELECT * FROM " * 3000 + "t" + ")" * 3000, "complex memory"),
    ("SELECT " + "CASE WHEN 1 THEN " * 3000 + "1" + " END" * 3000, "complex memory"),
    ("SELECT 1" + " + 1" * 100_000, "complex"),
    ("SELECT " + "NOT " * 100_000 + "1", "complex memory"),
    (" UNION ".join(["SELECT 1"] * 5000), "complex"),
    ("SELECT " + ", ".join(["1"] * 5000), "complex"),
    ("SELECT max(" + ", ".join(["1"] * 500) + ")", "complex"),
    ("SELECT 1 FROM " + ", ".join(f"t t{i}" for i in range(100)), "complex"),
    ("CREATE TABLE wide (" + ", ".join(f"c{i}" for i in range(3000)) + ")", "complex"),
    ("SELECT 'a' LIKE '" + "%a" * 50_000 + "'", "complex"),
    ("SELECT 'a' GLOB '" + "*a" * 50_000 + "'", "complex"),
    ("SELECT '" + "x" * 3_000_000 + "'", "size"),
    ("SELECT length('" + "x" * 1_900_000 + "')", "runs"),
    # several, none, broken
    ("SELECT 1; DROP TABLE t", "several_statements"),
    ("SELECT 1; ATTACH DATABASE '$FOLDER/$NAME' AS a", "several_statements"),
    ("BEGIN; SELECT 1; COMMIT", "several_statements"),
    ("SELECT 1;;", "runs several_statements"),
    ("", "empty"),
    (" ; ", "empty"),
    ("-- nothing", "empty"),
    ("/* open", "empty"),
    ("SELECT 'a\0b'", "syntax"),
    ("SELECT 1\0; DROP TABLE t", "syntax"),
    ("SELECT '\ud800'", "syntax"),
    ("SELECT \udcff\udcfe", "syntax"),
    ("SELECT cast(x'c3280080ff' AS TEXT)", "runs"),
    ("SELECT '\ufffe\uffff\u202e\x1b[2J'", "runs"),
    ("SELECT char(0, 1114111, 55296, 2000000000)", "runs"),
    ("SELEC x FROM t", "syntax"),
    ("SELECT 'open", "syntax"),
    ("SELECT x FROM", "syntax"),
    ("SELECT x FROM u", "no_such_table"),
    ("SELECT y FROM t", "no_such_column"),
    ("INSERT INTO t (y) VALUES (1)", "no_such_column"),
    ("SELECT CURDATE()", "no_such_function"),
    ("SELECT ?1, :name", "other"),
    ("INSERT INTO t (x) VALUES (1, 2)", "other"),
    # what writes, and what stays open
    ("CREATE TEMP TABLE u AS SELECT * FROM t", "runs"),
    ("CREATE TABLE t (x)", "other"),
    ("CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t VALUES (new.x + 1); END", "runs"),
    ("CREATE VIEW v AS SELECT * FROM v", "runs"),
    ("CREATE VIEW v AS " + ENDLESS.format("") + "SELECT count(*) FROM n", "time"),
    ("BEGIN EXCLUSIVE", "runs"),
    ("SAVEPOINT s", "runs"),
    ("COMMIT", "other"),
    ("EXPLAIN SELECT * FROM t", "runs"),
    ("EXPLAIN QUERY PLAN SELECT * FROM t", "runs"),
    ("DELETE FROM t RETURNING x", "runs"),
    ("INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING RETURNING x", "runs"),
    ('ALTER TABLE t RENAME TO "; DROP TABLE t; --"', "runs"),
    ('CREATE TABLE "" ("" INT, \' \' INT, [a]]] INT)', "runs syntax"),
    ("CREATE TABLE u (x CHECK (x > 0), y GENERATED ALWAYS AS (x / 0))", "runs"),
    ("CREATE UNIQUE INDEX i ON t (x % 2)", "constraint"),
    ("REINDEX", "runs"),
    ("ANALYZE", "runs"),
    ("SELECT last_insert_rowid(), changes(), sqlite_version(), random()", "runs"),
]
# Context, query, likewise.
CONTEXTS: list[tuple[str, str, str]] = [
    ("ATTACH '$FOLDER/$NAME' AS a; CREATE TABLE a.t (x);", "SELECT 1", "context"),
    ("VACUUM INTO '$FOLDER/$NAME';", "SELECT 1", "context"),
    (ENDLESS.format("") + "SELECT i FROM n;", "SELECT 1", "context time"),
    ("CREATE TABLE t (x); " + "INSERT INTO t SELECT randomblob(900000); " * 2000, "SELECT 1", "context time"),
    ("CREATE TABLE t (x", "SELECT 1", "context"),
    ("CREATE TABLE t (x);\0", "SELECT 1", "context"),
    ("\ud800", "SELECT 1", "context"),
    ("BEGIN; CREATE TABLE t (x); SAVEPOINT s;", "SELECT count(*) FROM t", "runs"),
    (
        "CREATE TABLE t (x); CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t VALUES (new.x + 1); END;",
        "INSERT INTO t VALUES (1)",
        "complex runs",  # whether triggers call themselves is a matter of how SQLite was built
    ),
    ("CREATE VIEW a AS SELECT * FROM b; CREATE VIEW b AS SELECT * FROM a;", "SELECT * FROM a", "complex"),
    (TEN + "CREATE VIEW v AS " + ENDLESS.format("") + "SELECT i FROM n;", "DELETE FROM t", "time size"),
    ("CREATE TABLE t (x DEFAULT (load_extension('$NAME')));", "INSERT INTO t DEFAULT VALUES", "context forbidden"),
]


class Run:
    """What came of all hostile statements in one pool, a good query after each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, {}  # type: Path, dict[Job, float]
        texts = [(TEN, query, allowed) for query, allowed in HOSTILE] + CONTEXTS
        self.allowed = {self.job(context, query): set(allowed.split()) for context, query, allowed in texts}
        self.outcomes: dict[Job, Outcome] = {}
        self.good: list[Outcome] = []

    def job(self, context: str, query: str) -> Job:
        def filled(text: str) -> str:
            return text.replace("$FOLDER", str(self.folder)).replace("$NAME", NAME)

        return Job(filled(context), filled(query))

    def all(self) -> None:
        jobs = list(self.allowed)
        asked = [one for i, job in enumerate(jobs) for one in (job, Job(TEN, f"SELECT sum(x) + {i} FROM t"))]
        with SqlExecutor(seconds=SECONDS, workers=3) as executor:
            outcomes = list(executor.run_all(asked))
        self.outcomes, self.good = dict(zip(jobs, outcomes[::2], strict=True)), outcomes[1::2]

    def watched(self) -> type:
        """A worker that notes how long each job took."""
        run = self

        class Watched(sqlexec._Worker):
            job, began = None, 0.0

            def give(self, task: Any, seconds: float) -> None:
                self.job, self.began = task.job, time.monotonic()
                super().give(task, seconds)

            def read(self) -> None:
                super().read()
                if self.task is None:
                    self.note()

            def end(self) -> int:
                self.note()
                return super().end()

            def note(self) -> None:
                if self.job is not None:
                    run.seconds.setdefault(self.job, time.monotonic() - self.began)

        return Watched


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("hostile")
    run = Run(folder / "asked for")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR", "SQLITE_TMPDIR", "TMP", "cwd", "asked for"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        patch.chdir(folder / "cwd")
        patch.setattr(sqlexec, "_Worker", run.watched())
        run.all()
    yield run


@pytest.fixture(scope="module")
def executor() -> Iterator[SqlExecutor]:
    with SqlExecutor(seconds=SECONDS) as executor:
        yield executor


@pytest.mark.parametrize(
    ("context", "query"),
    [(TEN, query) for query, _ in HOSTILE] + [(context, query) for context, query, _ in CONTEXTS],
    ids=lambda text: repr(text[:40]) if text != TEN else "",
)
def test_a_hostile_statement_is_harmless_or_refused_with_its_kind(run: Run, context: str, query: str) -> None:
    job = run.job(context, query)
    outcome = run.outcomes[job]
    assert (RUNS if outcome.ok else outcome.kind) in run.allowed[job], outcome.reason
    assert outcome.ok or outcome.reason
    assert run.seconds[job] < sqlexec.PATIENCE * LIMIT + 3  # a slow machine starts a worker slowly


def test_no_hostile_statement_leaves_a_file_or_costs_another_example(run: Run) -> None:
    folders = list(run.folder.parent.iterdir())
    assert len(folders) == 6 and all(list(folder.iterdir()) == [] for folder in folders)
    for place in ("/", "/tmp", str(Path.home()), str(Path(sqlworker.__file__).parent), os.getcwd()):
        assert [name for name in os.listdir(place) if name.startswith(NAME)] == []
    assert [outcome.rows for outcome in run.good] == [[(55 + i,)] for i in range(len(run.allowed))]


def test_all_failures_are_counted_by_kind(run: Run) -> None:
    failed = [outcome for outcome in run.outcomes.values() if not outcome.ok]
    kinds = Counter(outcome.kind for outcome in failed)
    assert set(kinds) <= set(sqlworker.KINDS) and kinds.total() == len(failed) >= 100
    assert kinds["other"] < len(failed) / 10
    assert len(set(sqlworker.KINDS)) == len(sqlworker.KINDS)


def test_without_the_authorizer_the_process_itself_opens_no_file(tmp_path: Path) -> None:
    """The walls stand one behind the other."""
    worker = (
        f"import sys; sys.path.insert(0, {str(Path(sqlworker.__file__).parent)!r}); import sqlworker\n"
        "sqlworker._authorizer = lambda writes: lambda *_: 0\n"
        "sqlworker._limit_connection = lambda connection: None\n"
        "sqlworker.serve(sys.stdin.buffer, sys.stdout.buffer)"
    )
    asked = [f"ATTACH '{tmp_path}/a.db' AS a", f"VACUUM INTO '{tmp_path}/b.db'", "SELECT 1"]
    requests = [{"context": TEN, "query": query, "database": None, "seconds": 1} for query in asked]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, "-I", "-S", "-c", worker]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=True)
    attach, vacuum, plain = map(json.loads, done.stdout.splitlines()[1:])
    assert "unable to open database" in attach["reason"] and "unable to open database" in vacuum["reason"]
    assert plain["rows"] == [[1]] and list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_costs_its_own_example_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of one in the middle of its query, of a second that then hangs (SIGSTOP), and of one between queries."""
    slow = Job(TEN, "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i")
    stuck = Job(TEN, "SELECT count(*), 1 FROM t a, t b, t c, t d, t e, t f, t g, t h, t i")
    give = sqlexec._Worker.give

    def watched(worker: Any, task: Any, seconds: float) -> None:
        give(worker, task, seconds)
        if task.job in (slow, stuck):
            worker.process.send_signal(signal.SIGKILL if task.job is slow else signal.SIGSTOP)

    monkeypatch.setattr(sqlexec._Worker, "give", watched)
    good = [Job(TEN, f"SELECT sum(x) + {i} FROM t") for i in range(40)]
    with SqlExecutor(seconds=SECONDS, workers=2) as executor:
        assert executor.run(TEN, "SELECT 1").ok  # else the kill would come while the worker starts
        list(executor.run_all(good[:2]))
        outcomes = list(executor.run_all([*good[:10], slow, *good[10:20], stuck, *good[20:]]))
        pool = list(executor._pool)
        for worker in pool:
            worker.process.kill()
            worker.process.wait()
        assert executor.run(TEN, "SELECT 1").ok
    died, late = outcomes.pop(10), outcomes.pop(20)
    assert (died.kind, late.kind) == ("died", "time") and "-9" in str(died.reason)
    assert [outcome.rows for outcome in outcomes] == [[(55 + i,)] for i in range(40)]
    assert all(worker.process.poll() is not None for worker in pool)


@pytest.mark.parametrize(
    ("runs", "spent", "after", "late"),
    [
        (True, 1.0, 6.9, False),
        (True, 1.0, 7.1, False),  # others have the cores
        (True, 7.0, 7.1, True),
        (False, 1.0, 7.1, True),  # it hangs
        (True, 1.0, 35.1, True),
    ],
)
def test_a_worker_that_gets_no_core_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, runs: bool, spent: float, after: float, late: bool
) -> None:
    with SqlExecutor(seconds=2, workers=1) as executor:
        assert executor.run(TEN, "SELECT 1").ok
        [worker] = executor._pool
        monkeypatch.setattr(sqlexec, "_usage", lambda pid: (runs, 50.0))
        worker._moved()
        began = worker.deadline - 7
        monkeypatch.setattr(sqlexec, "_usage", lambda pid: (runs, 50.0 + spent))
        assert worker.late(began + after) is late
        assert not late or worker.deadline == began + 7
        assert worker.deadline <= began + 7 * sqlexec.PATIENCE


def test_what_a_process_used_is_known_where_the_system_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = [*"RSTDZ", *"234567", "30", "12", "9"]
    (tmp_path / "7/stat").write_text(f"7 (a ) b) {' '.join(fields)}\n")
    monkeypatch.setattr(sqlexec, "PROC", tmp_path)
    assert sqlexec._usage(7) == (True, 42 / os.sysconf("SC_CLK_TCK"))
    assert sqlexec._usage(8) == (False, 0.0)


def test_outcomes_that_nobody_waits_for_leave_no_worker_behind() -> None:
    with SqlExecutor(seconds=SECONDS, workers=2) as executor:
        outcomes = executor.run_all([Job(TEN, f"SELECT sum(x) + {i} FROM t") for i in range(50)])
        assert next(outcomes).rows == [(55,)]
        outcomes.close()  # type: ignore[attr-defined]
        assert all(worker.task is None for worker in executor._pool)
        assert executor.run(TEN, "SELECT 7").rows == [(7,)]


def test_equal_jobs_run_once_and_answers_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Job] = []
    give = sqlexec._Worker.give

    def watched(worker: Any, task: Any, seconds: float) -> None:
        given.append(task.job)
        give(worker, task, seconds)

    monkeypatch.setattr(sqlexec._Worker, "give", watched)
    jobs = [Job(TEN, f"SELECT {i % 7}") for i in range(3 * sqlexec.AHEAD)]
    with SqlExecutor(workers=2) as executor:
        assert [outcome.rows for outcome in executor.run_all(iter(jobs))] == [[(i % 7,)] for i in range(len(jobs))]
    assert set(given) == set(jobs) and len(given) < 40


def test_a_worker_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlexec.sys, "executable", "/bin/false")
    with SqlExecutor() as executor, pytest.raises(RunError, match="does not start: /bin/false"):
        executor.run(TEN, "SELECT 1")


def test_a_temporary_table_does_not_hide_what_a_query_did(executor: SqlExecutor) -> None:
    gold = executor.run(TEN, "DELETE FROM t")
    assert not same_result(gold, executor.run(TEN, "CREATE TEMP TABLE t (x)"), in_order=False)
    assert same_result(gold, executor.run(TEN, "DELETE FROM t WHERE x"), in_order=False)
    one, other = (executor.run(TEN, f"CREATE TEMP TABLE u AS SELECT {x} AS y") for x in (1, 2))
    assert not same_result(one, other, in_order=False) and same_result(one, one, in_order=False)


def test_a_view_is_what_it_shows(executor: SqlExecutor) -> None:
    gold = executor.run(TEN, "CREATE VIEW v AS SELECT x FROM t WHERE x > 5")
    assert same_result(gold, executor.run(TEN, "CREATE VIEW v AS SELECT x FROM t WHERE x >= 6"), in_order=False)
    assert not same_result(gold, executor.run(TEN, "CREATE VIEW v AS SELECT x FROM t"), in_order=False)
    assert not same_result(gold, executor.run(TEN, "CREATE VIEW v AS SELECT x FROM nowhere"), in_order=False)


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
        ("DROP TABLE IF EXISTS u", True),
        ("BEGIN", True),
        ("REINDEX", True),
    ],
)
def test_a_writing_query_is_known_by_what_it_does(executor: SqlExecutor, query: str, writes: bool) -> None:
    outcome = executor.run(TEN, query)
    assert outcome.ok and (outcome.tables is not None) is writes


@pytest.mark.parametrize("query", ["BEGIN", "SAVEPOINT a", "REINDEX", "DROP TABLE IF EXISTS u"])
def test_what_returns_no_rows_is_unlike_a_query_that_finds_none(executor: SqlExecutor, query: str) -> None:
    gold, predicted = executor.run(TEN, "SELECT x FROM t WHERE x = 99"), executor.run(TEN, query)
    assert gold.ok and predicted.ok and not same_result(gold, predicted, in_order=False)
    assert same_result(executor.run(TEN, query), predicted, in_order=False)


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


def test_a_thousand_queries_take_seconds() -> None:
    jobs = [Job(TEN, f"SELECT sum(x) + {i} FROM t") for i in range(1000)]
    started = time.perf_counter()
    with SqlExecutor() as executor:
        assert [outcome.rows for outcome in executor.run_all(jobs)] == [[(55 + i,)] for i in range(1000)]
        took = time.perf_counter() - started
        print(f"1,000 queries in {took:.2f} s, {executor.workers} workers")
    assert took < 60  # some 0.3 s on two quiet cores
