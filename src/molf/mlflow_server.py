"""MLflow's page: its server is started, waited for, and ended with all that it started."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molf.errors import RunError, UserError
from molf.mlflow_store import folder_of, uri_of
from molf.paths import own_tools

HOST = "127.0.0.1"
POLL = 0.2  # seconds between two looks whether the server answers
GRACE = 10.0  # seconds that it has to end by itself
# One process serves one reader. MLflow's default, four and eight more that wait for jobs of its GenAI part, imports
# MLflow twelve times: nearly a minute on two cores before the first answer.
ARGUMENTS = ["--host", HOST, "--workers", "1", "--uvicorn-opts", "--log-level warning"]
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def serve(root: Path, port: int, page: str) -> None:
    """Serves the page until interrupted; says where it is once it answers.

    Args:
        root: Project folder.
        port: On this machine's own address.
        page: What follows the address: the view to open.

    Raises:
        UserError: MLFLOW_TRACKING_URI names a server, which has a page of its own; or the port is taken.
        RunError: The server ended by itself.
    """
    store = server_store(root)
    artifacts = ["--artifacts-destination", str(folder_of(store, root) / "mlartifacts")]
    command = ["mlflow", "server", *artifacts, *ARGUMENTS, "--port", str(port)]
    _free(port)
    print("MLflow's page is starting ...", flush=True)
    with _interruptible():
        # In a session of its own: whoever ends it ends all its processes, whatever a terminal sends them.
        # What it says goes to the errors: this program's own output is where the page is.
        # The store's address is no argument: every user of the machine can read those, and it may hold a password.
        environment = {**own_tools(), **ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": store}
        server = subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(POLL)
            if server.poll() is None:
                print(f"MLflow: http://{HOST}:{port}/{page} (Ctrl-C ends it)", flush=True)
            code = server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _end(server)
    raise RunError(f"MLflow's server ended by itself, with exit code {code}; what it printed above says why")


def server_store(root: Path) -> str:
    """Address of the store whose page is served.

    Raises:
        UserError: MLFLOW_TRACKING_URI names a server, which has a page of its own.
    """
    uri = uri_of(root)
    if uri.startswith(("http://", "https://")):
        raise UserError(f"MLFLOW_TRACKING_URI is {uri}: open that address instead")
    return uri


def _free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: an old connection is none
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; choose another, such as {port + 1}") from error


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end this process as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # of SIGINT too: a shell's background job ignores it
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and all that it started; those that do not end in time are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:  # all are gone
            break
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and _any_left(server):
            time.sleep(POLL / 4)
    server.wait()


def _any_left(server: "subprocess.Popen[bytes]") -> bool:
    server.poll()  # or its own remains would count
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True
