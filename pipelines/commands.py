"""Commands of the pipeline as children that never outlive this process, their lines handed on as they come."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from molf.errors import PASSING, plain
from molf.secrets import concealed

GUARD = Path(__file__).with_name("guard.py")
_DVC_SAYS = re.compile(r"failed to run: .*, exited with (-?\d+)")
_OUT_OF_MEMORY = re.compile(r"\bout of memory\b", re.IGNORECASE)  # as `molf.memory` says it

_running: set["subprocess.Popen[bytes]"] = set()
_ending = threading.Event()


class CommandFailed(RuntimeError):
    """A command of the pipeline ended with another exit code than 0.

    Args:
        command: Program and arguments.
        code: Its exit code.
        lines: What it printed.
    """

    def __init__(self, command: Sequence[str], code: int, lines: Sequence[str]) -> None:
        self.code, self.lines = code, list(lines)
        super().__init__(f"`{' '.join(command)}` ended with exit code {code}: {self.reason}")

    @property
    def reason(self) -> str:
        """What it said of its failure; of DVC's commands what the stage said, for DVC's own say only that it did."""
        said = [line for line in self.lines if line.strip()]
        telling = [line.strip() for line in said if re.match(r"(error|failed|interrupted|  - )", line)]
        return " ".join(telling[-3:] or said[-1:] or ["it printed nothing"])

    @property
    def stage_code(self) -> int:
        """The exit code of the stage that DVC ran, -n if signal n ended it; the command's own if there was none."""
        found = [int(match[1]) for line in self.lines if (match := _DVC_SAYS.search(line))]
        return found[-1] if found else self.code

    @property
    def out_of_memory(self) -> bool:
        """Whether it said that memory ran out."""
        return any(_OUT_OF_MEMORY.search(line) for line in self.lines)

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it, which is also what Linux does when memory runs out."""
        return self.stage_code in (-9, 137)

    @property
    def may_pass(self) -> bool:
        """Whether the same command can succeed at another try: it was killed, lost a host, or memory ran out."""
        return self.out_of_memory or self.stage_code < 0 or self.stage_code > 128 or self.stage_code == PASSING


def stream(
    command: Sequence[str],
    cwd: Path,
    show: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    held: Sequence[int] = (),
) -> str:
    """Runs a command and hands on each line that it prints as soon as it is there.

    The command and all that it starts end with this process, however that ends: nothing trains on unseen.

    Args:
        command: Program and arguments.
        cwd: Folder in which it runs.
        show: Takes one line, errors included and secrets masked; of one that a progress bar rewrote, its last state.
        environment: All of it; None: this process' own.
        log: File to which these lines are added as well.
        held: File descriptors that stay open until the last process of the command has ended: locks.

    Returns:
        All lines, nothing masked: an answer for a program, not to be shown.

    Raises:
        CommandFailed: The command did not exit with 0.
        KeyboardInterrupt: The block of `ended_together` was left.
    """
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(log.open("a", encoding="utf-8"))
        for line in _lines(command, cwd, environment, held):
            lines.append(line)
            masked = concealed(line, environment)
            if log is not None:
                print(masked, file=file, flush=True)
            if masked:
                show(masked)
    return "\n".join(lines)


def _lines(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None, held: Sequence[int]
) -> Iterator[str]:
    """Runs a command under the guard and yields its lines."""
    check_ending()
    guarded = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), *command],
        cwd=cwd,
        env={**(os.environ if environment is None else environment), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=held,
    )
    _running.add(guarded)
    if _ending.is_set():  # between the look above and now, so that nobody has closed it
        guarded.stdin.close()  # type: ignore[union-attr]
    assert guarded.stdin is not None and guarded.stdout is not None
    said = []
    try:
        for raw in guarded.stdout:
            line = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
            said.append(plain(line))
            yield said[-1]
        code = guarded.wait()
    finally:
        with contextlib.suppress(OSError):
            guarded.stdin.close()  # at which the guard ends what still runs
        guarded.wait()
        guarded.stdout.close()
        _running.discard(guarded)
    check_ending()
    if code:
        raise CommandFailed(command, code, [concealed(line, environment) for line in said])


def check_ending() -> None:
    """To be called where a thread waits.

    Raises:
        KeyboardInterrupt: The block of `ended_together` was left.
    """
    if _ending.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Ends every command that any thread runs when its `with` block is left by an interrupt or any other error.

    At a cancellation Prefect raises in the main thread, while the commands run in others.
    """
    _ending.clear()
    try:
        yield
    except BaseException:
        _ending.set()
        for guarded in list(_running):
            with contextlib.suppress(OSError):
                assert guarded.stdin is not None
                guarded.stdin.close()
        raise
