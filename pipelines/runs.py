"""Flow runs that are cancelled, lose their worker, or were killed and could tell nobody."""

import contextlib
import contextvars
import logging
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.states import Cancelled, Crashed

from molf.paths import SCRATCH, write_text
from pipelines import checkout, locks
from pipelines.checkout import FLOW

POLL = 5.0  # seconds between two looks at the run's state in Prefect
PATIENCE = 60.0  # seconds that a worker has to end its own run before the run ends itself
UNDER_WORKER = "PREFECT__FLOW_RUN_ID"  # which Prefect's workers and runners give to the runs that they start
IN_PLACE = "checkout"  # lock of a run in the checkout itself; that of another run is run-KEY
LOST = "Its process was killed, or its machine went down; a later run of the same checkout found it gone."


class Cancel(BaseException):
    """Someone cancelled this run in Prefect, and no worker ended it."""


@contextlib.contextmanager
def cancellable() -> Iterator[None]:
    """Ends its `with` block when the flow run is cancelled in Prefect, also without a worker that would end it.

    Raises:
        Cancel: It was.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    left, asked = threading.Event(), threading.Event()
    watch = partial(_watch, context.flow_run.id, left, asked)
    threading.Thread(target=contextvars.copy_context().run, args=(watch,), daemon=True).start()
    try:
        yield
    except TerminationSignal:
        if asked.is_set():
            raise Cancel from None
        raise
    finally:
        left.set()


def _watch(run: UUID, left: threading.Event, asked: threading.Event) -> None:
    """Interrupts the main thread as a worker does, some time after the run was cancelled."""
    while not left.wait(POLL):
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # no answer: asks again
            state = client.read_flow_run(run).state
            if state is None or not (state.is_cancelling() or state.is_cancelled()):
                continue
            if UNDER_WORKER not in os.environ or not left.wait(PATIENCE):
                asked.set()
                os.kill(os.getpid(), signal.SIGTERM)
            return


def outlive_output() -> None:
    """Lets the run go on when whoever read what it prints is gone: a worker that was killed, a closed pager.

    Prefect's console is rich's, which leaves the program at a broken pipe.
    """
    for handler in (*logging.getLogger().handlers, *logging.getLogger("prefect").handlers):
        console: Any = getattr(handler, "console", None)
        if console is not None:
            console.on_broken_pipe = partial(setattr, console, "quiet", True)


@contextlib.contextmanager
def noted(lock: Path, root: Path) -> Iterator[None]:
    """Notes in a lock's file, held meanwhile, which flow run holds it; a kill leaves the note for `sweep`.

    Args:
        lock: Of the run.
        root: Where it works; its worktree is marked as ended when the `with` block is left.
    """
    context = FlowRunContext.get()
    lock.write_text(str(context.flow_run.id) if context and context.flow_run else "")
    try:
        yield
    finally:
        if lock.name == IN_PLACE:
            lock.write_text("")
        else:
            if root.exists():
                write_text(root / SCRATCH / "ended", "")
            lock.unlink()


def sweep(home: Path) -> list[str]:
    """Tells Prefect of runs of this checkout whose process is gone, and removes their worktrees.

    Cells' worktrees stay: the next run of a cell goes on from its checkpoint.

    Returns:
        What was found, one line a run.
    """
    found = []
    for path in sorted((home / FLOW / "locks").glob("run-*")) + [home / FLOW / "locks" / IN_PLACE]:
        # An empty file is a run's that begins at this moment: it must not vanish under it.
        if not path.exists() or not path.stat().st_size:
            continue
        with locks.free(path) as mine:
            run = path.read_text() if mine else ""
            if not run:
                continue
            told = _tell(UUID(run))
            found.append(f"flow run {run} was killed: {told}")
            key = path.name.removeprefix("run-")
            if path.name == IN_PLACE:
                path.write_text("")
                continue
            tree = home / FLOW / "runs" / key
            checkout.remove_worktree(home, tree)
            checkout.drop_unused_branch(home, key)
            if not tree.exists():
                path.unlink()
    return found


def _tell(run: UUID) -> str:
    """Sets a lost run's state, and that of its tasks, unless they have ended; returns what was done."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(run).state
        except ObjectNotFound:
            return "this Prefect server does not know it"
        if state is not None and state.is_final():
            return f"Prefect has it as {state.name}"
        ended = partial(Cancelled if state is not None and state.is_cancelling() else Crashed, message=LOST)
        unended = {"state": {"type": {"any_": [StateType.RUNNING, StateType.PENDING]}}}
        for task in client.read_task_runs(
            flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run]}}),
            task_run_filter=TaskRunFilter.model_validate(unended),
        ):
            client.set_task_run_state(task.id, ended(), force=True)
        client.set_flow_run_state(run, ended(), force=True)
        return f"set to {ended().name}"


def begin(home: Path) -> None:
    """What a flow run does before its first step; trouble with earlier runs is said, and is not its own."""
    log = get_run_logger()
    outlive_output()
    try:
        for line in sweep(home):
            log.warning(line)
    except Exception as error:
        log.warning(f"earlier runs that were killed could not be tidied: {error}")


def cancelled() -> State[Any]:
    """The state of a run that ended itself."""
    return Cancelled(message="Cancelled; the next run goes on from the checkpoints.")
