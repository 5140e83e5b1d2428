"""Runs SQL that a model wrote, which is hostile input, in a process of its own with limits.

This file is both sides: `SqlExecutor`, and the worker that it starts from this very file, alone and without the
package. So it imports the standard library only.

The walls, from the inside out: an authorizer that allows reading and writing the database in memory and nothing else;
SQLite's own limits on sizes and depths; a time limit for each query; limits on rows and bytes of a result; limits on
the process (memory, CPU time, no byte written to any file); and a parent that kills and replaces a worker that is
late. A query that runs into any of them costs its own example only.
"""

import json
import os
import re
import select
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MAX_SQL = 2_000_000  # bytes of a context or query
MAX_VALUE = 1_000_000  # bytes of one text, blob or row
MAX_ROWS = 100_000  # of a result, and of all tables together
MAX_BYTES = 16_000_000  # of a result's texts and blobs
HEAP = 256 * 2**20  # bytes that SQLite may hold
ADDRESS_SPACE = 2**30  # bytes of the worker's whole address space
FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a query.

    Attributes:
        ok: Whether it ran.
        rows: Its result; empty if it returns none.
        tables: What the database holds after a query that writes, by table; None after one that only reads.
        reason: Why it did not run, None if it did.
    """

    ok: bool
    rows: list[Row]
    tables: dict[str, list[Row]] | None
    reason: str | None


class SqlExecutor:
    """Runs queries, each in a fresh database in memory, in a worker process that is replaced when it fails.

    Args:
        seconds: Time limit of one query, and of its context's script; the parent's limit on both is three times this
            and a second.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "SqlExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker; the next `run` starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()

    def run(self, context: str, query: str, database: Path | None = None) -> Outcome:
        """Runs one statement in a fresh database.

        Args:
            context: Script that fills the database; not run where `database` is given.
            query: The statement; several are refused.
            database: SQLite file whose copy is the database.
        """
        request = {
            "context": context,
            "query": query,
            "database": str(database.absolute()) if database is not None else None,
            "seconds": self.seconds,
        }
        try:
            # json's default spelling is pure ASCII, so that any text, however broken, crosses the pipe.
            answer = self._ask(json.dumps(request).encode() + b"\n", 3 * self.seconds + 1)
        except TimeoutError:
            self.close()
            return Outcome(False, [], None, "killed: over the time limit")
        except (EOFError, BrokenPipeError):
            self.close()
            return Outcome(False, [], None, "killed: the worker died, most likely over the memory or CPU limit")
        decoded = json.loads(answer, object_hook=_from_json)
        if "reason" in decoded:
            return Outcome(False, [], None, decoded["reason"])
        tables = decoded["tables"]
        return Outcome(
            True,
            [tuple(row) for row in decoded["rows"]],
            None if tables is None else {name: [tuple(row) for row in rows] for name, rows in tables},
            None,
        )

    def _ask(self, request: bytes, seconds: float) -> bytes:
        """Sends a line and waits for the answering one."""
        worker = self._worker = self._worker or self._start()
        assert worker.stdin is not None
        worker.stdin.write(request)
        worker.stdin.flush()
        return _read_line(worker, seconds)

    def _start(self) -> "subprocess.Popen[bytes]":
        """Starts a worker and waits until it is ready, so that one that cannot start fails no query."""
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            _read_line(worker, 60)
        except (TimeoutError, EOFError):
            from molf.errors import RunError

            worker.kill()
            raise RunError(f"the process that runs SQL does not start: {sys.executable} {__file__}") from None
        return worker


def _read_line(worker: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """Reads the worker's one answering line.

    Raises:
        TimeoutError: It did not come in time.
        EOFError: The worker is gone.
    """
    assert worker.stdout is not None
    deadline, chunks = time.monotonic() + seconds, [b""]
    while not chunks[-1].endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([worker.stdout], [], [], left)[0]:
            raise TimeoutError
        chunks.append(os.read(worker.stdout.fileno(), 1 << 20))
        if not chunks[-1]:
            raise EOFError
    return b"".join(chunks)


# --- comparing -----------------------------------------------------------------------------------------------------


def same_result(gold: Outcome, predicted: Outcome, in_order: bool) -> bool:
    """Whether two queries that ran on like databases did the same.

    Rows are compared as multisets, or in order; after a gold query that writes, the contents of all tables instead.
    """
    if not gold.ok or not predicted.ok or (gold.tables is None) != (predicted.tables is None):
        return False
    if gold.tables is not None and predicted.tables is not None:
        return {name: Counter(rows) for name, rows in gold.tables.items()} == {
            name: Counter(rows) for name, rows in predicted.tables.items()
        }
    return gold.rows == predicted.rows if in_order else Counter(gold.rows) == Counter(predicted.rows)


TOKENS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|\(|\)|\w+", re.DOTALL)


def has_order(query: str) -> bool:
    """Whether a query has an ORDER BY at its top level: not in a subquery, window, text or comment."""
    depth, words = 0, []
    for token in TOKENS.findall(query):
        if token in "()":
            depth += 1 if token == "(" else -1
        elif depth == 0 and (token[0].isalpha() or token[0] == "_"):
            words.append(token.lower())
    return any(pair == ("order", "by") for pair in zip(words, words[1:], strict=False))


# --- the worker ----------------------------------------------------------------------------------------------------


def _serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Answers requests, a line of JSON each, until the parent goes."""
    _limit_process()
    stdout.write(b"ready\n")
    stdout.flush()
    for line in stdin:
        request = json.loads(line)
        _limit_cpu(request["seconds"])
        try:
            answer = _execute(request)
        except MemoryError:
            answer = {"reason": "out of memory"}
        except Exception as error:  # whatever hostile text can make sqlite3 raise is a reason, not our failure
            answer = {"reason": f"{error}"[:500] or type(error).__name__}
        stdout.write(json.dumps(answer, default=_to_json).encode() + b"\n")
        stdout.flush()


def _limit_process() -> None:
    import resource

    # FSIZE 0: not one byte into any file.
    for kind, limit in (
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(kind, (limit, limit))


def _limit_cpu(seconds: float) -> None:
    """Lets the process have CPU time for one more request; beyond it the kernel ends it."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 3 * seconds + 2), hard))


def _execute(request: dict[str, Any]) -> dict[str, Any]:
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP}")
        if request["database"] is not None:
            source = sqlite3.connect(f"{Path(request['database']).as_uri()}?mode=ro&immutable=1", uri=True)
            try:
                source.backup(connection)
            finally:
                source.close()
        _limit_connection(connection)
        writes: set[str] = set()
        connection.set_authorizer(_authorizer(writes))
        if request["database"] is None:
            try:
                with _time_limit(connection, request["seconds"]):
                    connection.executescript(request["context"])
            except Exception as error:
                raise ValueError(f"context: {error}") from None
        if not re.search(r"[^\s;]", re.sub(r"--[^\n]*|/\*.*?(\*/|$)", " ", request["query"], flags=re.DOTALL)):
            raise sqlite3.ProgrammingError("no statement")
        writes.clear()
        with _time_limit(connection, request["seconds"]):
            cursor = connection.execute(request["query"])
            rows = _fetch(cursor, MAX_ROWS)
        tables = None
        # A SELECT that uses json_each seems to write the schema table, where SQLite declares json_each's columns.
        if writes - {"sqlite_master"} or (writes and cursor.description is None):
            with _time_limit(connection, request["seconds"]):
                tables = _contents(connection)
        return {"rows": rows, "tables": tables}
    finally:
        connection.close()


def _limit_connection(connection: sqlite3.Connection) -> None:
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, max(MAX_SQL, MAX_VALUE)),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL),
        (sqlite3.SQLITE_LIMIT_COLUMN, 500),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 100),
        (sqlite3.SQLITE_LIMIT_VDBE_OP, 250_000),
        (sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 32),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 10),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(limit, value)


def _authorizer(writes: set[str]) -> Callable[..., int]:
    """Allows statements on the database in memory; notes in `writes` the tables that they write."""
    allowed = {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_TRANSACTION,
        sqlite3.SQLITE_SAVEPOINT,
        sqlite3.SQLITE_ANALYZE,
        sqlite3.SQLITE_REINDEX,
    }
    verbs = [f"{verb}_{what}" for verb in ("CREATE", "DROP") for what in ("INDEX", "TABLE", "TRIGGER", "VIEW")]
    allowed |= {getattr(sqlite3, f"SQLITE_{name}") for name in (*verbs, *(n.replace("_", "_TEMP_") for n in verbs))}
    # Every CREATE and DROP is one of these too, on the schema table.
    writing = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_ALTER_TABLE}

    def authorize(action: int, first: str | None, second: str | None, schema: str | None, source: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_DENY if (second or "").lower() in FORBIDDEN_FUNCTIONS else sqlite3.SQLITE_OK
        if action in writing:
            writes.add(first or "")
            return sqlite3.SQLITE_OK
        # Attach, detach, pragmas, virtual tables and whatever a later SQLite brings.
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    return authorize


@contextmanager
def _time_limit(connection: sqlite3.Connection, seconds: float) -> Iterator[None]:
    """Interrupts what the connection does after so many seconds."""
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)
        # Asked on success too: a single long operation cannot be interrupted.
        if time.monotonic() > deadline:
            raise TimeoutError(f"over the time limit of {seconds:g} s") from None


def _fetch(cursor: sqlite3.Cursor, most: int) -> list[Row]:
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) > most or size > MAX_BYTES:
            raise OverflowError(f"the result is over {most:,} rows or {MAX_BYTES:,} bytes")
    return rows


def _contents(connection: sqlite3.Connection) -> list[tuple[str, list[Row]]]:
    """Every table with its rows, named with its columns; and which indexes, triggers and views there are."""
    schema = connection.execute("SELECT type, name, lower(tbl_name) FROM sqlite_master").fetchall()
    others = [(kind, table) for kind, _, table in schema if kind != "table"]
    contents: list[tuple[str, list[Row]]] = [("indexes, triggers, views", others)]
    left = MAX_ROWS
    for kind, name, _ in schema:
        if kind == "table":
            quoted = name.replace('"', '""')
            cursor = connection.execute(f'SELECT * FROM "{quoted}"')
            columns = ", ".join(column[0] for column in cursor.description)
            rows = _fetch(cursor, left)
            left -= len(rows)
            contents.append((f"{name} ({columns})".lower(), rows))
    return contents


def _to_json(value: Any) -> dict[str, str]:
    return {"blob": value.hex()}


def _from_json(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["blob"]) if value.keys() == {"blob"} else value


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
