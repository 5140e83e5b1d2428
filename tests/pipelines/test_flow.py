"""The flow's parts, and the flow and a served schedule for real."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines.flow import ROOT, StageFailed, order, stream
from pipelines.serve import nightly
from tests.conftest import Project


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(what: Any, seconds: float) -> Any:
    """Calls `what` until it answers with something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what():
            return answer
        time.sleep(0.5)
    pytest.fail(f"waited {seconds} s in vain")


def test_lines_are_handed_on_as_they_come() -> None:
    program = "import time\nfor i in range(2):\n    print('line', i)\n    time.sleep(1)"
    times: list[float] = []
    text = stream([sys.executable, "-c", program], lambda line: times.append(time.monotonic()))
    assert text == "line 0\nline 1"
    assert times[1] - times[0] > 0.5


def test_a_failed_command_is_named_with_its_last_line() -> None:
    with pytest.raises(StageFailed, match=r"exit code 3; last line: error: no such thing"):
        stream([sys.executable, "-c", "print('error: no such thing'); raise SystemExit(3)"], lambda line: None)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
def test_an_interrupted_flow_leaves_no_process_behind() -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)\n"
        "time.sleep(600)"
    )
    pids: list[int] = []

    def cancel(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream([sys.executable, "-c", program], cancel)
    until(lambda: not alive(pids[0]), 10)


def test_stages_come_after_what_they_need() -> None:
    edges = [f'"{name}" -> "train@m-t-fft-0";' for name in ("prepare@t", "base@m")]
    dot = "\n".join(["strict digraph {", '"compare";', *edges, '"train@m-t-fft-0" -> "compare";', "}"])
    names = order(dot)
    assert set(names[:2]) == {"base@m", "prepare@t"} and names[2:] == ["train@m-t-fft-0", "compare"]


def test_prefect_yaml_names_what_is_there() -> None:
    deployment = nightly()
    path, function = deployment["entrypoint"].split(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == "compare-methods"
    pin = re.search(r"^prefect==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin and YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["prefect-version"] == pin[1]


def test_the_nightly_schedule_is_one_that_prefect_takes() -> None:
    from prefect.schedules import Cron

    schedule = nightly()["schedules"][0]
    assert Cron(schedule["cron"], timezone=schedule["timezone"]).cron == schedule["cron"]


# --- acceptance ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Not Artifact.get: Prefect 3.8.8's sends nulls that its own server refuses.
READ_ARTIFACT = """
from prefect.client.orchestration import get_client
asked = {"artifacts": {"key": {"any_": ["comparison"]}}}
with get_client(sync_client=True) as client:
    print(client.request("POST", "/artifacts/filter", json=asked).json()[0]["data"])
"""


@pytest.fixture
def one_cell(project: Project) -> Project:
    project.edit({"grid.methods": ["molf"]})
    return project


@pytest.mark.acceptance
def test_the_flow_brings_a_grid_of_one_cell_up_to_date(one_cell: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server set up: Prefect's own, in a folder that was empty."""
    monkeypatch.setenv("PREFECT_HOME", str(one_cell.root.parent / "prefect"))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    said = one_cell.run(sys.executable, "-m", "pipelines.flow")
    assert "Running stage 'train@tiny-fact-molf-0'" in said
    assert "tiny/fact/molf/seed-0: score" in said, "the stages' lines are not streamed"
    assert "next: open reports/report.html" in said
    assert one_cell.repro("compare") == []
    assert "Completed" in said
    markdown = one_cell.run(sys.executable, "-c", READ_ARTIFACT)
    assert "| molf " in markdown and "tiny" in markdown

    again = one_cell.run(sys.executable, "-m", "pipelines.flow")
    assert "Running stage" not in again

    one_cell.edit({"methods.molf.top_k": 9})
    failed = one_cell.run(sys.executable, "-m", "pipelines.flow", code=1)
    assert "methods.molf: top_k is 9" in failed and "exit code 2" in failed


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_served_deployment_fires(one_cell: Project, tmp_path: Path) -> None:
    """A server, a deployment with a schedule of every minute, and the run that it starts."""
    port, log = free_port(), tmp_path / "serve.log"
    environment = {**one_cell.environment, "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "pipelines.serve", "--cron", "* * * * *", "--port", str(port)]
    with log.open("wb") as file:
        served = subprocess.Popen(
            command, cwd=one_cell.root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        completed = until(lambda: _completed(port) or (served.poll() is not None and log.read_text()), 600)
        assert isinstance(completed, list), f"serve ended: {completed}"
        assert completed[0]["name"] == "compare-methods" and completed[0]["auto_scheduled"]
        assert (one_cell.root / "reports/comparison.json").is_file()
        os.kill(served.pid, signal.SIGTERM)
        served.wait(timeout=60)
        with pytest.raises((urllib.error.URLError, OSError)):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5)
    finally:
        if served.poll() is None:
            os.killpg(served.pid, signal.SIGKILL)


def _completed(port: int) -> list[dict[str, Any]]:
    """Flow runs that ended well, asked of the server itself."""
    import json

    body = json.dumps({"flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/flow_runs/filter", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            runs: list[dict[str, Any]] = json.load(answer)
    except (urllib.error.URLError, OSError):
        return []
    assert all(run["state_type"] == "COMPLETED" for run in runs), runs
    return runs
