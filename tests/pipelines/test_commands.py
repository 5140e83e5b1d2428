"""Commands whose lines come at once, and of which nothing is left when the process that asked for them is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import CommandFailed, ended_together, stream

needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(what: Any, seconds: float = 60) -> Any:
    """Calls `what` until it answers with something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what():
            return answer
        time.sleep(0.05)
    pytest.fail(f"waited {seconds} s in vain")


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_lines_are_handed_on_as_they_come(tmp_path: Path) -> None:
    go = tmp_path / "go"
    program = (
        f"import os, time\nprint('first')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint('second')"
    )
    text = stream(python(program), tmp_path, lambda line: go.touch())  # which hangs if `first` comes with the end
    assert text == "first\nsecond"


def test_of_a_progress_bar_the_last_state_is_shown(tmp_path: Path) -> None:
    seen: list[str] = []
    program = r"print('\r'.join(f'{i} %' for i in range(0, 101)), flush=True)"
    stream(python(program), tmp_path, seen.append, log=tmp_path / "logs/it.log")
    assert seen == ["100 %"]
    assert (tmp_path / "logs/it.log").read_text() == "100 %\n"


def test_what_a_line_does_to_a_terminal_is_shown_instead(tmp_path: Path) -> None:
    seen: list[str] = []
    stream(python(r"print('\x1b[2Jgone')"), tmp_path, seen.append)
    assert seen == [r"\x1b[2Jgone"]


def test_secrets_are_masked_where_people_look_and_not_in_the_answer(tmp_path: Path) -> None:
    """A variable may call an ordinary word secret, and an answer is read by a program."""
    seen: list[str] = []
    environment = {**os.environ, "SOME_TOKEN": "molf-efficient"}
    said = stream(python("print('train@molf-efficient')"), tmp_path, seen.append, environment, tmp_path / "log")
    assert said == "train@molf-efficient"
    assert seen == ["train@***"] and (tmp_path / "log").read_text() == "train@***\n"
    with pytest.raises(CommandFailed) as failed:
        stream(
            python("import os; raise SystemExit('failed: ' + os.environ['SOME_TOKEN'])"),
            tmp_path,
            seen.append,
            environment,
        )
    assert "molf-efficient" not in str(failed.value)


def test_a_failed_command_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"exit code 3: error: no such thing"):
        stream(python("print('error: no such thing'); print('more'); raise SystemExit(3)"), tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("code", "lines", "may_pass", "memory"),
    [
        (255, ["ERROR: failed to reproduce 'train@x': failed to run: python x, exited with 2"], False, False),
        (255, ["failed: loss is nan", "ERROR: failed to run: python x, exited with 1"], False, False),
        (255, ["failed: out of memory: CUDA", "ERROR: failed to run: python x, exited with 1"], True, True),
        (255, ["ERROR: failed to run: python x, exited with -9"], True, False),
        (255, ["ERROR: failed to run: python x, exited with -15"], True, False),
        (137, [], True, False),
        (143, [], True, False),
        (2, ["error: 1 problem"], False, False),
        (255, ["failed: host b is gone", "ERROR: failed to run: python x, exited with 75"], True, False),
    ],
)
def test_only_a_kill_a_lost_host_and_want_of_memory_can_pass(
    code: int, lines: list[str], may_pass: bool, memory: bool
) -> None:
    error = CommandFailed(["dvc"], code, lines)
    assert (error.may_pass, error.out_of_memory) == (may_pass, memory)


def test_a_killed_command_has_the_code_that_a_shell_gives(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as failed:
        stream(python("import os; os.kill(os.getpid(), 9)"), tmp_path, lambda line: None)
    assert failed.value.code == 137


def test_a_command_does_not_inherit_that_the_guard_is_deaf_to_ctrl_c(tmp_path: Path) -> None:
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert stream(python(program), tmp_path, lambda line: None) == "True"


@needs_proc
def test_an_error_while_reading_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    pids: list[int] = []

    def cancel(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(python(PARENT), tmp_path, cancel)
    until(lambda: not alive(pids[0]), 10)


@needs_proc
def test_a_command_that_ends_leaves_nothing_running(tmp_path: Path) -> None:
    text = stream(python(PARENT.replace("time.sleep(600)\n", "")), tmp_path, lambda line: None)
    assert not alive(int(text))


@needs_proc
def test_commands_of_other_threads_end_with_the_block(tmp_path: Path) -> None:
    pids: list[int] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            stream(python(PARENT), tmp_path, lambda line: pids.append(int(line)))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    with pytest.raises(RuntimeError, match="cancelled"), ended_together():
        thread.start()
        until(lambda: pids)
        raise RuntimeError("cancelled")
    thread.join(30)
    assert not thread.is_alive() and isinstance(raised[0], KeyboardInterrupt)
    assert not alive(pids[0])
    with ended_together():  # and the next run's are not refused
        assert stream(python("print(1)"), tmp_path, lambda line: None) == "1"


@needs_proc
def test_after_a_kill_of_the_asking_process_the_command_may_save_its_work_and_ends(tmp_path: Path) -> None:
    """A training writes its checkpoint at SIGTERM, of which it gets exactly one."""
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    program = f"""
import os, pathlib, signal, sys, time
def stop(number, frame):
    with open({str(saved)!r}, "a") as file:
        file.write("saved ")
    time.sleep(0.5)
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(ready)!r}).write_text(str(os.getpid()))
time.sleep(600)
"""
    asking = f"""
from pathlib import Path
from pipelines.commands import stream
stream([{sys.executable!r}, "-c", {program!r}], Path({str(tmp_path)!r}), print)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    with subprocess.Popen([sys.executable, "-c", asking], env=environment, start_new_session=True) as process:
        pid = int(until(lambda: ready.exists() and ready.read_text()))
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not alive(pid), 40)
    assert saved.read_text() == "saved "


def test_no_line_shows_a_secret(tmp_path: Path) -> None:
    secret = "correct-horse-7f3a9c"
    shown: list[str] = []
    command = [sys.executable, "-c", "import os; print('error:', dict(os.environ)); raise SystemExit(3)"]
    environment = {**os.environ, "HF_TOKEN": secret}
    with pytest.raises(CommandFailed, match=r"'HF_TOKEN': '\*\*\*'") as raised:
        stream(command, tmp_path, shown.append, environment, tmp_path / "log")
    logged = (tmp_path / "log").read_text()
    assert "'HF_TOKEN': '***'" in logged and logged == "\n".join([*shown, ""])
    assert secret not in logged + str(raised.value)
