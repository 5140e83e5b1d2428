"""Runs SQL that a model wrote, which is hostile input: a pool of processes of their own, each within limits.

`sqlworker.py` says what the walls are. A query that runs into any of them costs its own example only: a worker that is
late or dies is killed and replaced, while the others go on.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from molf import sqlworker
from molf.errors import RunError
from molf.sqlworker import Row

MOST_WORKERS = 4  # more hardly pay: this process has its own work with each answer
AHEAD = 256  # jobs under way or done before the one whose answer is asked for
AHEAD_BYTES = 128 * 2**20  # of answers that wait for that one; at more, no further job begins
START_SECONDS = 60  # for a worker's own start
PATIENCE = 5  # times its limit that a worker gets while others keep the machine busy
PROC = Path("/proc")


@dataclass(frozen=True)
class Job:
    """One statement in a fresh database.

    Attributes:
        context: Script that fills the database; not run where `database` is given.
        query: The statement; several are refused.
        database: SQLite file whose copy is the database.
    """

    context: str
    query: str
    database: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a query.

    Attributes:
        ok: Whether it ran.
        rows: Its result; empty if it returns none.
        tables: What the database holds after a statement that writes or returns nothing, by table; else None.
        reason: Why it did not run, None if it did.
        kind: Of the reason, one of `sqlworker.KINDS`; None if it did.
    """

    ok: bool
    rows: list[Row]
    tables: dict[str, list[Row]] | None
    reason: str | None
    kind: str | None = None


class _Task:
    """A job under way, for one or more equal ones of a list."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.uses = 0  # answers still to be given
        self.answer = b""  # as the worker wrote it; decoded late, since it may be large
        self.outcome: Outcome | None = None

    @property
    def done(self) -> bool:
        return bool(self.answer) or self.outcome is not None

    def result(self) -> Outcome:
        if self.outcome is None:
            self.outcome, self.answer = _decoded(self.answer), b""
        return self.outcome


class _Worker:
    """A process, what it is asked, and what it has answered of that."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(sqlworker.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)  # a worker that hangs may not make us hang
        self.selector = selector
        selector.register(self.stdout, selectors.EVENT_READ, self)
        self.ready = False
        self.task: _Task | None = None
        self.seconds = 0.0
        self.deadline = self.latest = time.monotonic() + START_SECONDS
        self.spent = 0.0  # CPU seconds when its clock was set back
        self.outgoing = memoryview(b"")
        self.incoming: list[bytes] = []

    def give(self, task: _Task, seconds: float) -> None:
        """Hands it a job; one that is still starting gets it then.

        Args:
            task: The job.
            seconds: Of CPU time, for each part of it.
        """
        job = task.job
        request = {
            "context": job.context,
            "query": job.query,
            "database": str(job.database.absolute()) if job.database is not None else None,
            "seconds": seconds,
        }
        # json's default spelling is pure ASCII, so that any text, however broken, crosses the pipe.
        self.outgoing = memoryview(json.dumps(request).encode() + b"\n")
        self.task, self.seconds = task, 3 * seconds + 1
        if self.ready:
            self._send()

    def _send(self) -> None:
        self.selector.register(self.stdin, selectors.EVENT_WRITE, self)
        self._moved()

    def _moved(self) -> None:
        """Sets its clock back: while bytes pass it does not hang, and they wait for us where we are slow."""
        now = time.monotonic()
        self.deadline, self.latest = now + self.seconds, now + PATIENCE * self.seconds
        self.spent = _usage(self.process.pid)[1]

    def late(self, now: float) -> bool:
        """Whether it has had its time; one that wants to compute, and may not, gets more.

        So what a query scores does not hang on what else the machine does.
        """
        if now < self.deadline:
            return False
        runs, spent = _usage(self.process.pid)
        left = self.seconds - (spent - self.spent)
        if not self.ready or not runs or left <= 0 or now >= self.latest:
            return True
        self.deadline = min(now + left, self.latest)
        return False

    def write(self) -> None:
        """Sends what the pipe takes.

        Raises:
            BrokenPipeError: The worker is gone.
        """
        self.outgoing = self.outgoing[os.write(self.stdin.fileno(), self.outgoing[: 1 << 16]) :]
        self._moved()
        if not self.outgoing:
            self.selector.unregister(self.stdin)

    def read(self) -> None:
        """Takes what there is of an answer.

        Raises:
            EOFError: The worker is gone.
        """
        self.incoming.append(os.read(self.stdout.fileno(), 1 << 20))
        self._moved()
        if not self.incoming[-1]:
            raise EOFError
        if not self.incoming[-1].endswith(b"\n"):
            return
        line, self.incoming = b"".join(self.incoming), []
        if not self.ready:
            self.ready = True
            self._send()
        elif self.task is not None:
            self.task.answer, self.task = line, None

    def end(self) -> int:
        """Kills it if need be; returns what it ended with."""
        for pipe in (self.stdin, self.stdout):
            with suppress(KeyError):
                self.selector.unregister(pipe)
            pipe.close()
        self.process.kill()
        return self.process.wait()


class SqlExecutor:
    """Runs queries, each in a fresh database in memory, in worker processes that are replaced when they fail.

    Args:
        seconds: CPU time that one query may take, and its context's script, and the reading of the tables after it; the
            limit of all three on the wall's clock is three times this and a second, or more on a busy machine (`late`).
        workers: Processes at most; None: as many as there are cores, up to `MOST_WORKERS`.
    """

    def __init__(self, seconds: float = 2.0, workers: int | None = None) -> None:
        self.seconds = seconds
        self.workers = workers or min(MOST_WORKERS, _cores())
        self._selector = selectors.DefaultSelector()
        self._pool: list[_Worker] = []

    def __enter__(self) -> "SqlExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; it can run nothing after."""
        for worker in list(self._pool):
            self._end(worker)
        self._selector.close()

    def run(self, context: str, query: str, database: Path | None = None) -> Outcome:
        """Runs one `Job`."""
        [outcome] = self.run_all([Job(context, query, database)])
        return outcome

    def run_all(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Runs jobs side by side; equal ones that are near each other run once.

        Args:
            jobs: Taken while they are needed, so that neither they nor their results need be in memory together.

        Yields:
            Their outcomes, in their order.

        Raises:
            RunError: A worker does not start.
        """
        source = iter(jobs)
        asked: deque[_Task] = deque()  # in the order of the jobs
        begin: deque[_Task] = deque()  # of these, what no worker has had
        known: dict[Job, _Task] = {}
        try:
            while True:
                held = sum(len(task.answer) for task in asked)
                while len(asked) < AHEAD and (held < AHEAD_BYTES or not asked):
                    job = next(source, None)
                    if job is None:
                        break
                    task = known.get(job)
                    if task is None:
                        task = known[job] = _Task(job)
                        begin.append(task)
                    task.uses += 1
                    asked.append(task)
                if not asked:
                    return
                if held < AHEAD_BYTES or begin and begin[0] is asked[0]:
                    self._hand_out(begin)
                first = asked[0]
                self._attend(wait=not first.done)
                if first.done:
                    asked.popleft()
                    first.uses -= 1
                    if not first.uses:
                        del known[first.job]
                    yield first.result()
        finally:
            for worker in [worker for worker in self._pool if worker.task is not None]:
                self._end(worker)  # a job that nobody waits for any more

    def _hand_out(self, tasks: "deque[_Task]") -> None:
        """Gives tasks to workers that have none, and starts workers for more."""
        for worker in [worker for worker in self._pool if worker.task is None]:
            if worker.process.poll() is not None:  # died between two jobs, which costs no example
                self._end(worker)
        while tasks:
            idle = next((worker for worker in self._pool if worker.task is None), None)
            if idle is None:
                if len(self._pool) == self.workers:
                    return
                idle = _Worker(self._selector)
                self._pool.append(idle)
            idle.give(tasks.popleft(), self.seconds)

    def _attend(self, wait: bool) -> None:
        """Takes and sends what can be, and parts with workers that are gone or late.

        Args:
            wait: Until there is something; else only what there is already.
        """
        deadlines = [worker.deadline for worker in self._pool if worker.task is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if wait and deadlines else 0.0
        gone = set()
        for key, events in self._selector.select(timeout):
            try:
                key.data.write() if events & selectors.EVENT_WRITE else key.data.read()
            except (BrokenPipeError, EOFError):
                gone.add(key.data)
        now = time.monotonic()
        for worker in list(self._pool):
            task = worker.task
            late = task is not None and worker.late(now)
            if worker not in gone and not late:
                continue
            status = self._end(worker)
            if not worker.ready:
                raise RunError(f"the process that runs SQL does not start: {sys.executable} {sqlworker.__file__}")
            if task is None:
                continue
            if late or status == -signal.SIGXCPU:
                task.outcome = _failed("killed: over the time limit", "time")
            else:
                task.outcome = _failed(f"the worker died, with status {status}", "died")

    def _end(self, worker: _Worker) -> int:
        self._pool.remove(worker)
        return worker.end()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _usage(pid: int) -> tuple[bool, float]:
    """Whether a process runs, or would if it got a core, and its CPU seconds; (False, 0) where the system tells not."""
    try:
        # Behind the name, which may hold anything: state, ten others, user's and system's time.
        values = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return values[0] == "R", (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return False, 0.0


def _failed(reason: str, kind: str) -> Outcome:
    return Outcome(False, [], None, reason, kind)


def _decoded(answer: bytes) -> Outcome:
    decoded = json.loads(answer, object_hook=_from_json)
    if "reason" in decoded:
        return _failed(decoded["reason"], decoded["kind"])
    tables = decoded["tables"]
    return Outcome(
        True,
        [tuple(row) for row in decoded["rows"]],
        None if tables is None else {name: [tuple(row) for row in rows] for name, rows in tables},
        None,
    )


def _from_json(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["blob"]) if value.keys() == {"blob"} else value


# --- comparing -----------------------------------------------------------------------------------------------------


def same_result(gold: Outcome, predicted: Outcome, in_order: bool) -> bool:
    """Whether two queries that ran on like databases did the same.

    Rows are compared as multisets, or in order; after statements that write or return nothing, all tables instead.
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
