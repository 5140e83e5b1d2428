"""Nothing phones home: with the network cut the pipeline works, and no connection beyond loopback is even tried."""

import subprocess
import sys
from pathlib import Path

import pytest

from molf.paths import PRIVATE
from tests import sealed
from tests.conftest import ROOT, SMALL, Project
from tests.pipelines.toy import Toy
from tests.planted import MARK, PLANTED, leaks

watched = pytest.mark.skipif(bool(sealed.lacking()), reason=sealed.lacking())

TRIES = {
    "a connection": ("socket.socket().connect(('192.0.2.1', 443))", ["192.0.2.1 port 443"]),
    "one over IPv6": ("socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))", ["2001:db8::1 port 80"]),
    "a mapped address": (
        "socket.socket(socket.AF_INET6).connect(('::ffff:192.0.2.1', 80))",
        ["::ffff:192.0.2.1 port 80", "::ffff:c000:201 port 80"],
    ),
    "a datagram": (
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.2', 123))",
        ["192.0.2.2 port 123"],
    ),
    "a message": (
        "socket.socket(type=socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, ('192.0.2.3', 123))",
        ["192.0.2.3 port 123"],
    ),
    "a child's child": (
        "subprocess.run(['sh', '-c', '\"$0\" -c \"$1\"; :', sys.executable, "
        "'import socket; socket.socket().connect((\"192.0.2.4\", 80))'], stderr=subprocess.DEVNULL)",
        ["192.0.2.4 port 80"],
    ),
    "a child that goes on alone": (
        "subprocess.Popen([sys.executable, '-c', 'import socket; socket.socket().connect((\"192.0.2.5\", 80))'], "
        "stderr=subprocess.DEVNULL, start_new_session=True)",
        ["192.0.2.5 port 80"],
    ),
}
IMPORTS = "import contextlib, os, socket, subprocess, sys\n"


def tried(body: str, tmp_path: Path) -> list[str]:
    code = f"{IMPORTS}with contextlib.suppress(OSError):\n    {body}\nprint('done', os.isatty(1))"
    outcome = sealed.run([sys.executable, "-c", code], tmp_path, sealed.bare(tmp_path, root=tmp_path))
    assert (outcome.code, outcome.said) == (0, "done True\n"), outcome.said
    return outcome.tried


@watched
@pytest.mark.parametrize("name", TRIES)
def test_what_is_tried_is_seen(name: str, tmp_path: Path) -> None:
    body, expected = TRIES[name]
    found = tried(body, tmp_path)
    assert len(found) == 1 and found[0] in expected


@watched
def test_asking_for_a_host_is_seen(tmp_path: Path) -> None:
    found = tried("socket.getaddrinfo('home.invalid', 443)", tmp_path)
    assert found and all(address.endswith(" port 53") or "resolve" in address for address in found)


@watched
def test_loopback_is_free_and_nothing_else_works(tmp_path: Path) -> None:
    body = (
        "a = socket.create_server(('127.0.0.1', 0)); b = socket.create_server(('::1', 0), family=socket.AF_INET6); "
        "socket.create_connection(a.getsockname()).sendall(b'inet_addr(\"192.0.2.9\")'); "
        "socket.create_connection(b.getsockname()[:2]); socket.getaddrinfo('localhost', 80); "
        "print('connected'); socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9)); print('routed')"
    )
    code = f"{IMPORTS}{body}"
    outcome = sealed.run([sys.executable, "-c", code], tmp_path, sealed.bare(tmp_path, root=tmp_path))
    assert outcome.said.startswith("connected\n") and "Network is unreachable" in outcome.said
    assert outcome.code == 1 and outcome.tried == ["192.0.2.1 port 9"]


def test_a_bare_environment_keeps_no_library_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PRIVATE, "CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "https_proxy", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "1")
    environment = sealed.bare(tmp_path, root=tmp_path, AWS_REGION="r")
    assert not any(sealed.ELSEWHERE.fullmatch(name) for name in environment if name != "AWS_REGION")
    assert environment["HOME"] == str(tmp_path) and environment["AWS_REGION"] == "r"


# --- acceptance ----------------------------------------------------------------------------------------------------


# MLflow's page, and Prefect's server as a person types it, both until they answer.
SERVERS = """
import os, pathlib, subprocess, time, urllib.request
from tests.served import molf_ui

command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", "4200"]
with subprocess.Popen(command, stdin=subprocess.DEVNULL) as prefect:
    with molf_ui(pathlib.Path.cwd(), os.environ) as page:
        for address in (page.partition("/#")[0], "http://127.0.0.1:4200/api/health", "http://127.0.0.1:4200"):
            while prefect.poll() is None:
                try:
                    urllib.request.urlopen(address).read()
                    break
                except OSError:
                    time.sleep(0.2)
    assert prefect.poll() is None
    prefect.terminate()
"""


@watched
@pytest.mark.acceptance
def test_the_pipeline_and_the_servers_without_a_network(tmp_path: Path) -> None:
    """One story: a run with secrets in its environment, the servers' start beside it, and what all left on disk."""
    project, home = Project(tmp_path / "project"), tmp_path / "home"
    home.mkdir()
    # One cell, and as little of all else as may be: whether the numbers mean anything does not matter.
    less = {"models.tiny.steps": 1, "training.threads": 1, "general.rows": 20, "evaluation.weights": None}
    project.edit({**SMALL, **less, "grid.methods": ["lora"], "compare.bootstrap": 100})
    project.run("git", "remote", "add", "origin", f"https://me:{MARK}-git@127.0.0.1:9/molf.git")
    project.run("dvc", "remote", "add", "--local", "-d", "far", f"https://me:{MARK}-dvc@127.0.0.1:9/molf")
    environment = sealed.bare(home, root=project.root, **PLANTED)
    ran = sealed.run(["molf", "run"], project.root, environment)
    assert ran.code == 0 and "lora" in ran.said, ran.said
    assert ran.tried == []
    assert (project.root / "mlflow.db").is_file() and (project.root / "reports/report.html").is_file()

    seen = sealed.run([sys.executable, "-c", SERVERS], project.root, environment)
    assert seen.code == 0, seen.said
    assert seen.tried == []

    project.commit("what the run left")
    assert MARK not in ran.said + seen.said
    assert leaks(tmp_path) == ["project/.dvc/config.local", "project/.git/config"], "only where it was put"


def test_a_leak_is_found_wherever_it_is(tmp_path: Path) -> None:
    import sqlite3

    import pandas as pd

    (tmp_path / "text").write_text(f"a {MARK} b")
    pd.DataFrame({"said": [f"a {MARK} b"] * 50}).to_parquet(tmp_path / "rows.parquet", compression="zstd")
    with sqlite3.connect(tmp_path / "store.db") as store:
        store.execute("create table t (x)")
        store.execute("insert into t values (?)", (f"a {MARK} b",))
    (tmp_path / "clean").write_text("nothing")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "gone").write_text(f"a {MARK} b")
    for command in ("git init -q", "git add gone", "git rm -q --cached gone"):
        subprocess.run(command.split(), cwd=repository, check=True)
    (repository / "gone").unlink()
    assert leaks(tmp_path) == ["repository: git's objects", "rows.parquet", "store.db", "text"]


# Prefect's own server for as long as the flow runs; a Secret block is there before it begins.
FLOW = """
import runpy, sys
import pipelines
from prefect.blocks.system import Secret

if len(sys.argv) > 1:
    Secret(value=sys.argv.pop()).save("molf-env-from-a-block")
runpy.run_module("pipelines.flow", run_name="__main__")
"""


@watched
@pytest.mark.acceptance
def test_a_flow_without_a_network_and_a_stage_that_prints_its_environment(tmp_path: Path) -> None:
    toy, home = Toy(tmp_path, methods=["fft"]), tmp_path / "home"
    home.mkdir()
    script = toy.root / "stage.py"
    tell = 'if "train@" in name and "-fft-" in name:\n    print(dict(os.environ), flush=True)\n    sys.exit(3)\n'
    first = "name, *rest = sys.argv[1:]\n"
    assert first in script.read_text()
    script.write_text(script.read_text().replace(first, first + tell))
    (toy.root / ".env").write_text(f"HF_TOKEN={MARK}")  # git ignores it, and so no commit of the flow may have it
    toy.commit("a stage that tells too much")
    environment = sealed.bare(
        home,
        root=ROOT,
        **PLANTED,
        MOLF_CHECKOUT=str(toy.root),
        TOY=str(toy.notes),
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
    )
    command = [sys.executable, "-c", FLOW, f"{MARK}-block"]
    ran = sealed.run(command, toy.root, environment)
    assert ran.code == 1 and "1 of 2 cells lack" in ran.said, ran.said
    assert "'FROM_A_BLOCK': '***'" in ran.said and "'HF_TOKEN': '***'" in ran.said, ran.said
    assert ran.tried == []
    assert MARK not in ran.said
    assert next(home.rglob("prefect.db")).stat().st_size
    assert leaks(tmp_path) == ["project/.env"], "only where it was put"
