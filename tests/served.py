"""`molf ui` while a test looks at its page. It is not a test."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def molf_ui(root: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Starts it, yields the address that it prints, ends it as Ctrl-C does and sees that nothing of it is left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "molf.cli", "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=root, env=dict(environment), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "MLflow's page is starting ...\n"
        said = process.stdout.readline()
        started = children(process.pid)  # read once the server answers: before, it may not have been started yet
        found = re.match(rf"MLflow: (http://127\.0\.0\.1:{port}/\S*) ", said)
        assert found, said
        yield found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert started and not any(alive(group) for group in started)
    finally:
        process.terminate()  # not killed, for then its server would live on
        process.wait(timeout=60)
        process.stdout.close()


def children(parent: int) -> list[int]:
    """Processes that one has started; `molf ui`'s is the first of a session of its own."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(number) for number in text.split()]


def alive(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
