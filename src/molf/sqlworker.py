"""The process that runs SQL which a model wrote: hostile input. `sqlexec.py` starts this very file, alone.

It imports the standard library only. The walls, from the inside out: an authorizer that allows reading and writing the
database in memory and nothing else; SQLite's own limits on sizes and depths; a time limit for each query; limits on
rows and bytes of a result; limits on the process (memory, CPU time, no file opened while a query runs, no byte written
to any); and a parent that kills and replaces a worker that is late.
"""

import json
import re
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

MAX_SQL = 2_000_000  # bytes of a context or query
MAX_VALUE = 1_000_000  # bytes of one text, blob or row
MAX_ROWS = 100_000  # of a result, and of all tables together
MAX_BYTES = 16_000_000  # of a result's texts and blobs
HEAP = 256 * 2**20  # bytes that SQLite may hold
ADDRESS_SPACE = 2**30  # bytes of the worker's whole address space
OPEN_FILES = 32  # while a database file is copied
FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}

Row = tuple[Any, ...]

# Why a query did not run: what SQLite's code says of it, else its words, the first that fits.
CODES = {
    sqlite3.SQLITE_AUTH: "forbidden",
    sqlite3.SQLITE_INTERRUPT: "time",
    sqlite3.SQLITE_NOMEM: "memory",
    sqlite3.SQLITE_TOOBIG: "size",
    sqlite3.SQLITE_CONSTRAINT: "constraint",
}
WORDS = {
    "no_such_table": "^no such table",
    "no_such_column": "^no such column|has no column named",
    "no_such_function": "^no such function",
    "syntax": ": syntax error$|^incomplete input$|^unrecognized token|null character|surrogates not allowed",
    "several_statements": "^You can only execute one statement",
    "empty": "^no statement$",
    "forbidden": "not authorized|may not be (modified|altered|dropped)|prohibited|too many attached|unsafe use",
    "complex": "too many|too complex|stack overflow|tree is too large|at most|circularly defined",
    "size": "^query string is too large|^the result is over",
}
# All of them: `context` where the context does not run, `died` where the process ended.
KINDS = ("context", *CODES.values(), *(kind for kind in WORDS if kind not in CODES.values()), "died", "other")


def serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Answers requests, a line of JSON each, until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to judge
    _limit_process()
    stdout.write(b"ready\n")
    stdout.flush()
    for line in stdin:
        request = json.loads(line)
        _limit_cpu(request["seconds"])
        try:
            answer = _execute(request)
        except Exception as error:  # whatever hostile text can make sqlite3 raise is a reason, not our failure
            answer = {"reason": _words(error), "kind": kind_of(error)}
        stdout.write(json.dumps(answer, default=_to_json).encode() + b"\n")
        stdout.flush()


class ContextError(Exception):
    """The context does not run, so that nothing can be said of the query."""


def kind_of(error: Exception) -> str:
    """Which of `KINDS` a failure is."""
    match error:
        case ContextError():
            return "context"
        case TimeoutError():
            return "time"
        case MemoryError():
            return "memory"
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in CODES:  # the low byte is the code, the others its variety
        return CODES[code & 0xFF]
    found = (kind for kind, words in WORDS.items() if re.search(words, str(error), re.IGNORECASE))
    return next(found, "other")


def _words(error: Exception) -> str:
    return "out of memory" if isinstance(error, MemoryError) else f"{error}"[:500] or type(error).__name__


def _limit_process() -> None:
    # FSIZE 0: not one byte into any file.
    for kind, limit in (
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(kind, (limit, limit))


def _limit_cpu(seconds: float) -> None:
    """Lets the process have CPU time for one more request; beyond it the kernel ends it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 3 * seconds + 2), hard))


def _allow_open(files: int) -> None:
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, OPEN_FILES))


def _execute(request: dict[str, Any]) -> dict[str, Any]:
    _allow_open(OPEN_FILES)
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
        _allow_open(0)  # what is open stays open
        if request["database"] is None:
            try:
                with _time_limit(connection, request["seconds"]):
                    connection.executescript(request["context"])
            except Exception as error:
                raise ContextError(f"context: {_words(error)}") from None
        if not re.search(r"[^\s;]", re.sub(r"--[^\n]*|/\*.*?(\*/|$)", " ", request["query"], flags=re.DOTALL)):
            raise sqlite3.ProgrammingError("no statement")
        writes.clear()
        with _time_limit(connection, request["seconds"]):
            cursor = connection.execute(request["query"])
            rows = _fetch(cursor, MAX_ROWS)
        tables = None
        # What returns nothing, not even no rows, is no query: BEGIN is unlike a SELECT that finds none. A SELECT that
        # uses json_each seems to write the schema table, where SQLite declares json_each's columns.
        if cursor.description is None or writes - {"sqlite_master"}:
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
    """Interrupts what the connection does after so many seconds of CPU time.

    Of the process's own, so that a query's fate does not hang on what else the machine does; the parent's clock is the
    wall's.
    """
    deadline = time.process_time() + seconds
    connection.set_progress_handler(lambda: time.process_time() > deadline, 1000)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)
        # Asked on success too: a single long operation cannot be interrupted.
        if time.process_time() > deadline:
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
    """Every table and view with its rows, named with its columns; and which indexes, triggers and views there are."""
    others: list[Row] = []
    contents: list[tuple[str, list[Row]]] = [("indexes, triggers, views", others)]
    left = MAX_ROWS
    # Each by its schema: a temporary table hides one of the same name.
    for schema, before in (("main", ""), ("temp", "temp.")):
        entries = connection.execute(f"SELECT type, name, lower(tbl_name) FROM {schema}.sqlite_master").fetchall()
        others += [(kind, before + table) for kind, _, table in entries if kind != "table"]
        for _, name, _ in (entry for entry in entries if entry[0] in ("table", "view")):
            quoted = name.replace('"', '""')
            try:
                cursor = connection.execute(f'SELECT * FROM {schema}."{quoted}"')
                columns = ", ".join(column[0] for column in cursor.description)
                rows = _fetch(cursor, left)
            except sqlite3.Error as error:  # of a view, which nobody has asked before
                columns, rows = "", [(str(error),)]
            left -= len(rows)
            contents.append((f"{before}{name} ({columns})".lower(), rows))
    return contents


def _to_json(value: Any) -> dict[str, str]:
    return {"blob": value.hex()}


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
