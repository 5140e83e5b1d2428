"""Prefect's server on this machine's loopback address, for as long as a program runs and not a process longer."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from molf.paths import own_tools
from pipelines.commands import GUARD

HOST = "127.0.0.1"
STARTUP = 180.0  # seconds; a first start makes the database


class NoServer(RuntimeError):
    """Prefect's server did not start."""


def address(port: int) -> str:
    """Of a server's API, as PREFECT_API_URL has it."""
    return f"http://{HOST}:{port}/api"


def answers(api: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            return bool(answer.read().strip() == b"true")
    except (urllib.error.URLError, OSError):
        return False


def taken(port: int) -> bool:
    """Whether another program listens on a port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return True
    return False


@contextlib.contextmanager
def server(port: int, environment: Mapping[str, str] | None = None, output: IO[bytes] | None = None) -> Iterator[str]:
    """Runs Prefect's server until the `with` block is left, by which all of its processes have ended.

    They end with this process too if that is killed.

    Args:
        port: On the loopback address.
        environment: Variables beside this process' own, such as PREFECT_HOME.
        output: File for what it prints; None: this process' own.

    Yields:
        The API's address, once it answers.

    Raises:
        NoServer: The port is taken, or the server ended or did not answer in time.
    """
    api = address(port)
    if taken(port):
        raise NoServer(
            f"Prefect's server already answers on port {port}: PREFECT_API_URL={api} uses it, --port N starts another"
            if answers(api)
            else f"port {port} is taken by another program; choose one with --port N"
        )
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = [prefect, "server", "start", "--host", HOST, "--port", str(port)]
    with guarded(
        command, {"PREFECT_CLI_PROMPT": "false", "PREFECT_API_URL": api, **(environment or {})}, output=output
    ) as process:
        end = time.monotonic() + STARTUP
        while not answers(api):
            if process.poll() is not None:
                raise NoServer(f"Prefect's server ended with exit code {process.returncode}; it says why above")
            if time.monotonic() > end:
                raise NoServer(f"Prefect's server does not answer on port {port} after {STARTUP:.0f} s")
            time.sleep(0.2)
        yield api


@contextlib.contextmanager
def guarded(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a command until the `with` block is left: then by SIGTERM and at last SIGKILL, with all that it started.

    All of it ends with this process too if that is killed. A terminal's Ctrl-C reaches this process alone.

    Args:
        command: Program and arguments.
        environment: Variables beside this process' own.
        cwd: Folder in which it runs; None: this process' own.
        output: File for what it prints; None: this process' own.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), *command],
        cwd=cwd,
        env={**own_tools(), **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()  # at which the guard ends the command and all below it
        process.wait()
