"""Several processes that train one cell: started on this host, or on several, joined in a group, ended together.

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
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from molf.errors import Diverged, RunError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

STARTED = "MOLF_STARTED"  # set in a process that was started here
FAILURE = "molf/failure"  # of the group's store: the reason of the process that failed first
GRACE = 10.0  # seconds that the others have to end by themselves after one failed
# One that died is noticed by the process that started it, not by a timeout, so that a long checkpoint is no failure.
TIMEOUT = timedelta(hours=4)


def started() -> bool:
    """Whether this process is one of a group."""
    return STARTED in os.environ


def launch(module: str, arguments: Sequence[str], processes: int, threads: int | None) -> None:
    """Runs `python -m MODULE ARGUMENTS` as a group of processes until all have ended; on several hosts if so asked.

    When one fails the others are ended; when this process is killed, however, they end themselves; SIGINT and SIGTERM
    are passed on to each. The first writes to this one's output; the others' is shown if one of them dies.

    Args:
        module: Its main runs inside `joined()`.
        arguments: Of each.
        processes: One a GPU where there are GPUs.
        threads: CPU threads of each; None shares a host's cores out.

    Raises:
        UserError: There are fewer GPUs than processes, or the hosts are unlike; or that of the process that failed
            first.
        RunError: That of the process that failed first, or one was killed, or a host did not come or is gone.
        KeyboardInterrupt: They were interrupted.
    """
    import torch
    from torch.distributed import TCPStore

    from molf import hosts

    group = hosts.asked()
    share = group.share(processes) if group else processes
    if torch.cuda.is_available() and share > torch.cuda.device_count():
        asked_for = f"training.processes: {processes}" + (f" on {group.hosts} hosts" if group else "")
        raise UserError(
            f"{asked_for}, but there are {torch.cuda.device_count()} GPUs here, and each process needs one; lower it "
            f"to {torch.cuda.device_count() * (group.hosts if group else 1)}, or choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    with contextlib.ExitStack() as stack:
        address, guests = "127.0.0.1", list[hosts.Guest]()
        if group:
            address, guests = stack.enter_context(hosts.gathered(group, share, [module, *arguments]))
        # Its port is the system's choice, taken before any of them looks for it. Of a socket of its own the store would
        # take all interfaces, whatever host it is told.
        listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listening.getsockname()[1]
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        environment = shared(processes, share, (address, port), threads)
        if group:
            environment |= hosts.network(address)
        elif sys.platform == "linux":  # gloo would listen where the machine's name leads
            environment.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        parts: list[Part] = [*guests]
        asked = stack.enter_context(passing_on(parts))
        for number, guest in enumerate(guests, 1):
            guest.start(range(number * share, (number + 1) * share), processes, (address, port), threads)
        parts.insert(0, stack.enter_context(Here(module, arguments, range(share), environment)))
        _watch(parts, store)
        _raise_failure(parts, store, asked)


def shared(world: int, share: int, store: tuple[str, int], threads: int | None) -> dict[str, str]:
    """Variables of the environment of all of a group's processes on a host.

    Args:
        world: Processes of the group.
        share: Those of a host.
        store: Address and port where they find each other.
        threads: CPU threads of each; None shares the host's cores out.
    """
    found: dict[str, object] = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": share,
        "MASTER_ADDR": store[0],
        "MASTER_PORT": store[1],
        "TORCHELASTIC_USE_AGENT_STORE": True,  # torch's own name for "the store is there already"
        "OMP_NUM_THREADS": threads or max(1, _cores() // share),
        STARTED: 1,
    }
    return {key: str(value) for key, value in found.items()}


class Part(Protocol):
    """The processes of a group on one host; `numbers` are theirs in the group, `where` names another host than this."""

    numbers: range
    where: str

    def codes(self) -> list[int | None]:
        """Exit codes, -n of what signal n ended, None of what runs; to be asked often."""

    def signal(self, number: int) -> None:
        """Sends each that runs a signal."""

    def tail(self, number: int) -> str:
        """The last lines of a process, each after a line break."""


class Here:
    """Those on this host, which end with the `with` block.

    Args:
        module: What each runs.
        arguments: Of each.
        numbers: In the group; number 0 writes to this process's output.
        environment: Beside this process's own; None removes a variable.
        folder: Where they run; None: here.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        numbers: range,
        environment: Mapping[str, str | None],
        folder: Path | None = None,
    ) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        self.numbers, self.where, self.folder = numbers, "", folder
        self.environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Here":
        self._logs = tempfile.TemporaryDirectory(prefix="molf-")
        try:
            for place, number in enumerate(self.numbers):
                with contextlib.ExitStack() as stack:
                    output = None if number == 0 else stack.enter_context(self._log(number).open("wb"))
                    self._children.append(
                        subprocess.Popen(
                            self.command,
                            env={**self.environment, "RANK": str(number), "LOCAL_RANK": str(place)},
                            cwd=self.folder,
                            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
                            stdout=output,
                            stderr=output,
                            start_new_session=True,  # so that a terminal's interrupt comes once, from here
                        )
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for child in self._children:
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        self._logs.cleanup()

    def codes(self) -> list[int | None]:
        return [child.poll() for child in self._children]

    def signal(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def tail(self, number: int) -> str:
        path = self._log(number)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if path.is_file() else []
        return "".join("\n" + line for line in lines)

    def _log(self, number: int) -> Path:
        return Path(self._logs.name) / f"process-{number}.log"


@contextlib.contextmanager
def passing_on(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Passes requests to end on to all processes, which may have work to save; yields the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for part in parts:
            part.signal(number)

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield came
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(parts: Sequence[Part], store: "Store") -> None:
    """Returns when all have ended, or a while after one failed."""
    deadline = None
    while None in (codes := [code for part in parts for code in part.codes()]):
        if deadline is None and (any(codes) or store.check([FAILURE])):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _raise_failure(parts: Sequence[Part], store: "Store", asked: list[int]) -> None:
    """Raises what ended the group, if it failed.

    A reason that was understood comes first: NCCL's watchdog aborts the others then. A defect comes after a signal: of
    one that was killed the others say only that they lost it. Beside an abort it may be the reason, and is shown.
    """
    failure = json.loads(store.get(FAILURE)) if store.check([FAILURE]) else {"kind": None, "problems": []}
    match failure["kind"]:
        case "UserError":
            raise UserError(failure["problems"])
        case "KeyboardInterrupt":
            raise KeyboardInterrupt(*failure["problems"])
        case "Diverged":
            raise Diverged("\n".join(failure["problems"]))
        case "RunError":
            raise RunError("\n".join(failure["problems"]))
    count = sum(len(part.numbers) for part in parts)
    each = [
        (f"process {number} of {count}{part.where}", code, part.tail(number))
        for part in parts
        for number, code in zip(part.numbers, part.codes(), strict=True)
    ]
    for process, code, tail in each:
        if code is not None and -code in asked:
            raise KeyboardInterrupt
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            raise RunError(
                f"{process} was ended by {name}"
                + (", maybe for want of memory: lower training.batch_size" if name == "SIGKILL" else "")
                + "".join(f"\n{line}" for line in failure["problems"] if name == "SIGABRT")
                + tail
            )
    if failure["problems"]:
        raise RunError("\n".join(failure["problems"]))
    for process, code, tail in each:
        if code != 0:
            how = "did not end" if code is None else f"ended with exit code {code}"
            raise RunError(f"{process} {how}{tail}")


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
    own_store().compare_set(FAILURE, "", json.dumps({"kind": kind, "problems": problems}))  # the first one stays


def own_store() -> "Store":
    """A new connection of a process that was started here to its group's store: the group's may be what failed."""
    from torch.distributed import TCPStore

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=GRACE))


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
