"""Runs a program without a network and notes every connection beyond loopback that it tries. It is not a test.

The network is a namespace of its own without routes; the tries are read from strace, which sees those of children's
children, of programs that are not Python's, and datagrams as well as connections.
"""

import ipaddress
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

# With --seccomp-bpf no other system call stops the program; -s 0 leaves out what is sent, which could look like an
# address.
STRACE = "strace -f -qq -s 0 --seccomp-bpf -e signal=none -e trace=connect,sendto,sendmsg,sendmmsg".split()
# Brings the loopback interface up (SIOCSIFFLAGS; up and running), then becomes the program.
LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))
os.execvp(sys.argv[1], sys.argv[1:])
"""
ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"')
RESOLVER = re.compile(r'sun_path="([^"]*resolve[^"]*)"')  # systemd's: asks name servers for others
NAMES = 53  # port of name servers: on loopback they ask others
# What tells libraries that nobody's habits are to be learnt here: with one of them set a test would show nothing.
ELSEWHERE = re.compile(
    r"CI(_.*)?|PYTEST_.*|GITHUB_.*|GITLAB_.*|BUILDKITE.*|JENKINS_.*|TRAVIS.*|CIRCLECI|DRONE|CODEBUILD_.*|TEAMCITY_.*|TF_BUILD"
    r"|.*TELEMETRY.*|.*ANALYTICS.*|DO_NOT_TRACK|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE|PREFECT_.*|DVC_.*"
    r"|MLFLOW_.*|AWS_.*|(?i:.*_proxy)"
)


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        code: Its exit code.
        said: What it printed, errors included.
        tried: Addresses beyond loopback that it or its children tried, each once.
    """

    code: int
    said: str
    tried: list[str]


def bare(home: Path, *, root: Path, **more: str) -> dict[str, str]:
    """The environment of a user who set nothing up: no setting keeps a library from reporting but the project's own.

    Args:
        home: Folder for what programs keep of a user; empty, so that each starts for the first time.
        root: Whose packages are imported.
        more: Further variables.
    """
    kept = {key: value for key, value in os.environ.items() if not ELSEWHERE.fullmatch(key)}
    kept.pop("XDG_CONFIG_HOME", None)
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    path = os.pathsep.join(map(str, (root / "src", root)))
    return {**kept, "HOME": str(home), "PYTHONPATH": path, "TERM": "xterm", **more}


def run(command: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float = 300) -> Outcome:
    """Runs a program on a terminal, in a network of its own that ends at loopback."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        inner = [sys.executable, "-c", LOOPBACK, *command]
        code, said = _on_terminal([*cut(), *STRACE, "-o", str(trace), *inner], cwd, environment, seconds)
        with trace.open(encoding="utf-8", errors="replace") as lines:
            return Outcome(code, said, list(dict.fromkeys(beyond_loopback(lines))))


def beyond_loopback(trace: Iterable[str]) -> Iterator[str]:
    """The addresses of strace's lines that lie beyond loopback; name servers do wherever they are."""
    for line in trace:
        for port, text in ADDRESS.findall(line):
            address = ipaddress.ip_address(text)
            inner = getattr(address, "ipv4_mapped", None) or address
            if int(port) == NAMES or not (inner.is_loopback or inner.is_unspecified):
                yield f"{address} port {port}"
        yield from RESOLVER.findall(line)


@cache
def cut() -> tuple[str, ...]:
    """The command that gives a program a network of its own."""
    return ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")


@cache
def lacking() -> str:
    """Why no program can be watched here; empty if one can."""
    for tool in ("unshare", "strace"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    done = subprocess.run([*cut(), *STRACE, "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"`{' '.join(cut())} strace` is not allowed here: {done.stderr.strip()}" if done.returncode else ""


def _on_terminal(command: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Runs a command whose standard streams are a terminal; what outlives the time is killed with its namespace."""
    master, slave = pty.openpty()
    said = bytearray()

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # the last process that held the terminal is gone
                return
            if not chunk:
                return
            said.extend(chunk)

    process = subprocess.Popen(
        command, cwd=cwd, env=dict(environment), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=seconds)
        reader.join(timeout=20)
    finally:
        if process.poll() is None:
            process.terminate()  # strace ends what it traces
            process.wait()
        os.close(master)
    return code, said.decode(errors="replace").replace("\r\n", "\n")
