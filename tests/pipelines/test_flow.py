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

from pipelines import graph
from pipelines.flow import ROOT
from pipelines.serve import nightly
from tests.conftest import Project


def until(what: Any, seconds: float) -> Any:
    """Calls `what` until it answers with something true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what():
            return answer
        time.sleep(0.5)
    pytest.fail(f"waited {seconds} s in vain")


DOT = """strict digraph {
"compare";
"prepare@t" -> "train@m-t-fft-0";
"base@m" -> "train@m-t-fft-0";
"prepare@t" -> "baseline@m-t";
"base@m" -> "baseline@m-t";
"train@m-t-fft-0" -> "evaluate@m-t-fft-0";
"base@m" -> "evaluate@m-t-fft-0";
"evaluate@m-t-fft-0" -> "compare";
"baseline@m-t" -> "compare";
}"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the shipped dvc.yaml and a grid of one cell."""
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text("grid: {models: [m], tasks: [t], methods: [fft], seeds: [0]}\n")
    return tmp_path


def test_stages_are_sorted_by_what_of_them_is_a_cells(small: Path) -> None:
    found = graph.read(small, DOT)
    assert set(found.before) == {"prepare@t", "base@m"} and found.after == ("compare",)
    assert {job.key: job.stages for job in found.jobs} == {
        "m.t": ("baseline@m-t",),
        "m.t.fft.0": ("train@m-t-fft-0", "evaluate@m-t-fft-0"),
    }
    assert found.needs["compare"] >= {"prepare@t", "train@m-t-fft-0"}
    job = next(job for job in found.jobs if job.key == "m.t.fft.0")
    assert job.narrowed == (
        ("grid", "models", "m"),
        ("grid", "tasks", "t"),
        ("grid", "methods", "fft"),
        ("grid", "seeds", 0),
    )


def test_names_with_hyphens_do_not_confuse_cells(small: Path) -> None:
    (small / "params.yaml").write_text("grid: {models: [m, m-t], tasks: [t, t-t], methods: [molf-e], seeds: [0]}\n")
    names = ["m-t-molf-e-0", "m-t-t-molf-e-0", "m-t-t-t-molf-e-0"]
    dot = "".join(f'"train@{name}";\n' for name in names)
    # `m` with `t-t` and `m-t` with `t` are one name for DVC itself, which refuses such a grid.
    assert len(graph.read(small, dot).jobs) == 3


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
