"""Several processes that train one cell: started on this machine, joined in a group, ended together.

The process that DVC starts runs no training itself: it starts the others, waits for them, and says what went wrong.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from molf.errors import Diverged, RunError, UserError

NOTES = "MOLF_NOTES"  # names, in a started process, the folder where the first that fails leaves its reason
FAILURE = "failure.json"
GRACE = 10.0  # seconds that the others have to end by themselves after one failed
# One that died is noticed by the process that started it, not by a timeout, so that a long checkpoint is no failure.
TIMEOUT = timedelta(hours=4)


def started() -> bool:
    """Whether `launch` started this process."""
    return NOTES in os.environ


def launch(module: str, arguments: Sequence[str], processes: int, threads: int | None) -> None:
    """Runs `python -m MODULE ARGUMENTS` as a group of processes on this machine until all have ended.

    When one fails the others are ended; when this process is killed, however, they end themselves; SIGINT and SIGTERM
    are passed on to each. The first writes to this one's output; the others' is shown if one of them dies.

    Args:
        module: Its main runs inside `joined()`.
        arguments: Of each.
        processes: One a GPU where there are GPUs.
        threads: CPU threads of each; None shares the cores out.

    Raises:
        UserError: There are fewer GPUs than processes; or that of the process that failed first.
        RunError: That of the process that failed first, or one was killed.
        KeyboardInterrupt: They were interrupted.
    """
    import torch
    from torch.distributed import TCPStore

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(
            f"training.processes: {processes}, but there are {torch.cuda.device_count()} GPUs here, and each process "
            f"needs one; lower it to {torch.cuda.device_count()}, or choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    # Its port is the system's choice, taken before any of them looks for it. Of a socket of its own the store would
    # take all interfaces, whatever host it is told.
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # torch's own name for "the store is there already"
        "OMP_NUM_THREADS": threads or max(1, _cores() // processes),
    }
    if sys.platform == "linux":  # gloo would listen where the machine's name leads
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="molf-") as folder, contextlib.ExitStack() as stack:
        notes = Path(folder)
        children: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, children)
        asked = stack.enter_context(_passing_on(children))
        for number in range(processes):
            own = {"RANK": number, "LOCAL_RANK": number, NOTES: notes}
            output = None if number == 0 else stack.enter_context(_log(notes, number).open("wb"))
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env={**os.environ, **{key: str(value) for key, value in (shared | own).items()}},
                    stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # so that a terminal's interrupt comes once, from here
                )
            )
        _watch(children, notes)
        _raise_failure(children, notes, asked)


@contextlib.contextmanager
def _passing_on(children: "list[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Passes requests to end on to the children, which may have work to save; yields the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield came
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: "list[subprocess.Popen[bytes]]", notes: Path) -> None:
    """Returns when all have ended, or a while after one failed."""
    deadline = None
    while any(child.poll() is None for child in children):
        failed = (notes / FAILURE).exists() or any(child.returncode for child in children)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _raise_failure(children: "list[subprocess.Popen[bytes]]", notes: Path, asked: list[int]) -> None:
    """Raises what ended the group, if it failed.

    A reason that was understood comes first: NCCL's watchdog aborts the others then. A defect comes after a signal: of
    one that was killed the others say only that they lost it. Beside an abort it may be the reason, and is shown.
    """
    path = notes / FAILURE
    failure = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kind": None, "problems": []}
    match failure["kind"]:
        case "UserError":
            raise UserError(failure["problems"])
        case "KeyboardInterrupt":
            raise KeyboardInterrupt(*failure["problems"])
        case "Diverged":
            raise Diverged("\n".join(failure["problems"]))
        case "RunError":
            raise RunError("\n".join(failure["problems"]))
    for number, child in enumerate(children):
        if child.poll() is not None and -child.returncode in asked:
            raise KeyboardInterrupt
        if child.returncode is not None and child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            raise RunError(
                f"process {number} of {len(children)} was ended by {name}"
                + (", maybe for want of memory: lower training.batch_size" if name == "SIGKILL" else "")
                + "".join(f"\n{line}" for line in failure["problems"] if name == "SIGABRT")
                + _tail(notes, number)
            )
    if failure["problems"]:
        raise RunError("\n".join(failure["problems"]))
    for number, child in enumerate(children):
        if child.poll() != 0:
            how = "did not end" if child.returncode is None else f"ended with exit code {child.returncode}"
            raise RunError(f"process {number} of {len(children)} {how}{_tail(notes, number)}")


def _end(children: "list[subprocess.Popen[bytes]]") -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _log(notes: Path, number: int) -> Path:
    return notes / f"process-{number}.log"


def _tail(notes: Path, number: int) -> str:
    path = _log(notes, number)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if path.is_file() else []
    return "".join("\n" + line for line in lines)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Makes a process that `launch` started one of its group; any other it leaves as it is.

    An error is left for the process that waits, which reports the first of all; this one ends without a word.
    """
    if not started():
        yield
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch
        import torch.distributed as dist

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
        yield
        # Not in `finally`: after a failure the others may never come.
        dist.destroy_process_group()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        _leave_note(error)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def _leave_note(error: BaseException) -> None:
    problems: Sequence[Any]
    if isinstance(error, UserError):
        kind, problems = "UserError", error.problems
    elif isinstance(error, KeyboardInterrupt):
        kind, problems = "KeyboardInterrupt", list(map(str, error.args))
    elif isinstance(error, Diverged):
        kind, problems = "Diverged", [str(error)]
    elif isinstance(error, (RunError, OSError)):
        kind, problems = "RunError", [str(error)]
    else:
        lines = "".join(traceback.format_exception(error)).rstrip()
        kind, problems = "defect", [f"process {os.environ['RANK']}:\n{lines}"]
    folder = Path(os.environ[NOTES])
    own = folder / f"failure-{os.environ['RANK']}.json"
    own.write_text(json.dumps({"kind": kind, "problems": problems}), encoding="utf-8")
    try:
        os.link(own, folder / FAILURE)
    except FileExistsError:
        pass  # another one failed first
    except OSError:  # a file system without links
        own.replace(folder / FAILURE)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
