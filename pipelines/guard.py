"""Runs a command that must not outlive the process that asked for it: `python -I -S guard.py PROGRAM ARGUMENT ...`.

Its standard input is a pipe of which the asking process holds the other end and never writes to it. When that process
ends in any way, kill -9 included, the pipe closes, and the command with all that it started is ended: first by SIGTERM,
at which a training writes a checkpoint, then by SIGKILL. Imports nothing but the standard library, to start at once.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 30.0  # seconds between SIGTERM and SIGKILL
STRAYS = 2.0  # seconds that processes in sessions of their own have after that, whom nobody asked
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl: orphans below become children of this process


def descendants(parent: int) -> list[int]:
    """Processes below one, dead ones that nobody waited for left out; empty where there is no /proc."""
    below: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/stat", encoding="utf-8", errors="replace") as file:
                state, its_parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                below.setdefault(int(its_parent), []).append(int(name))
    found, new = [], [parent]
    while new:
        new = [child for pid in new for child in below.get(pid, [])]
        found += new
    return found


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Ends a command that leads a session, and all that descends from it, sessions of their own included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # each once: at a second one a training ends without a checkpoint
    if not (_gone(process, grace, its_session=True) and _gone(process, STRAYS)):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _gone(process, 5.0)


def _gone(process: subprocess.Popen[bytes], seconds: float, its_session: bool = False) -> bool:
    """Whether the command and all below it, or those in its session alone, end within a time."""
    until = time.monotonic() + seconds
    while True:
        process.poll()
        _reap()
        left = descendants(os.getpid())
        if its_session:
            left = [pid for pid in left if _session(pid) == process.pid]
        if process.returncode is not None and not left:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _reap() -> None:
    """Waits for orphans that became children here."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> int:
    """Returns the command's exit code; 128 + n if signal n ended it or if it was ended here."""
    for number in (signal.SIGINT, signal.SIGHUP):
        # A terminal's Ctrl-C is the asking process' to judge. Not SIG_IGN: the command would inherit it, and Prefect's
        # worker ends by a SIGINT to its own child.
        signal.signal(number, lambda number, frame: None)
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            if asked or select.select([0], [], [], 0.1)[0]:
                end(process)
                return 128 + signal.SIGTERM
        code = process.returncode
    finally:
        if descendants(os.getpid()):  # of a command that ended and left something running
            end(process, 0.0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
