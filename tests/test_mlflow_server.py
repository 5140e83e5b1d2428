"""`molf ui`: says where the page is once it answers, and leaves nothing behind."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from molf import mlflow_server
from molf.errors import RunError, UserError

# In place of `mlflow`: answers after a second, beside a child of its own that would live on.
SERVER = """#!{python}
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

child = subprocess.Popen(["sleep", "600"])
Path("child").write_text(str(child.pid))
Path("arguments").write_text(" ".join(sys.argv[1:]))
Path("store").write_text(os.environ["MLFLOW_BACKEND_STORE_URI"])
{then}
time.sleep(1)


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `mlflow` is `SERVER`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # Popen looks for the program in this process's PATH.
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(mlflow_server, "own_tools", lambda: dict(os.environ))
    write(tmp_path)
    return tmp_path


def write(root: Path, then: str = "") -> None:
    path = root / "bin/mlflow"
    path.parent.mkdir(exist_ok=True)
    path.write_text(SERVER.format(python=sys.executable, then=then))
    path.chmod(0o755)


def gone(root: Path) -> bool:
    """Whether the server's child has ended; what is left of it waits to be buried by whoever inherited it."""
    status = Path(f"/proc/{(root / 'child').read_text()}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_says_where_it_is_when_it_answers_and_ends_whole(
    root: Path, port: int, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    began, before = time.monotonic(), signal.getsignal(number)
    # As the system delivers it: to the thread that waits.
    interrupt = threading.Timer(3, signal.pthread_kill, [threading.main_thread().ident, number])
    interrupt.start()
    mlflow_server.serve(root, port, "#/experiments/1")
    interrupt.join()
    assert time.monotonic() - began < 10
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "MLflow's page is starting ...",
        f"MLflow: http://127.0.0.1:{port}/#/experiments/1 (Ctrl-C ends it)",
    ]
    assert gone(root) and signal.getsignal(number) == before
    arguments = (root / "arguments").read_text()
    assert "--workers 1" in arguments and "sqlite" not in arguments, "all users of a machine can read arguments"
    assert (root / "store").read_text() == f"sqlite:///{root}/mlflow.db"


def test_a_server_that_ends_by_itself_is_a_failed_run(
    root: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "sys.exit(3)")
    with pytest.raises(RunError, match="exit code 3"):
        mlflow_server.serve(root, port, "")
    assert "http" not in capsys.readouterr().out and gone(root)


def test_a_taken_port_is_said_before_anything_starts(root: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*choose another"):
            mlflow_server.serve(root, port, "")
    assert not (root / "arguments").exists()
