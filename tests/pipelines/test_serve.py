"""The deployments: what prefect.yaml says, a server with all of them for real, and a worker that a schedule wakes."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema
from ruamel.yaml import YAML

from pipelines import deployments, form, watch
from pipelines.flow import compare_methods
from pipelines.guard import descendants
from pipelines.server import NoServer, answers, guarded, server, taken
from tests.conftest import ROOT
from tests.pipelines.conftest import free_port
from tests.pipelines.test_commands import alive, needs_proc, until
from tests.pipelines.toy import Toy


def test_prefect_yaml_names_what_is_there_and_is_served_as_it_is() -> None:
    pin = re.search(r"^prefect==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin and YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["prefect-version"] == pin[1]
    found = {name: deployments.made(said) for name, said in deployments.read().items()}
    assert {name: made.flow_name for name, made in found.items()} == {
        "nightly": "compare-methods",
        "on-demand": "compare-methods",
        "hourly": "watch-data",
    }
    for name, said in deployments.read().items():
        made = found[name]
        assert made.entrypoint == said["entrypoint"] and made.tags == said["tags"]
        assert made.parameters == said.get("parameters", {})
        crons = [schedule.schedule.cron for schedule in made.schedules or []]  # type: ignore[union-attr]
        assert crons == [schedule["cron"] for schedule in said.get("schedules", [])]
        if "concurrency_limit" in said:
            assert made.concurrency_limit == said["concurrency_limit"]["limit"]
            assert made.concurrency_options and made.concurrency_options.collision_strategy == "CANCEL_NEW"


def test_what_prefect_yaml_says_and_serve_would_leave_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prefect.yaml").write_text("deployments: [{name: nightly, triggers: []}]\n")
    monkeypatch.setattr(deployments, "FILE", tmp_path / "prefect.yaml")
    with pytest.raises(ValueError, match="nightly has triggers"):
        deployments.read()


def test_the_form_offers_the_blocks_and_presets_and_tells_what_each_field_is() -> None:
    schema = parameter_schema(compare_methods).model_dump()
    fields = schema["properties"]
    methods = fields["methods"]["items"]["enum"]
    assert methods[:4] == ["fft", "lora", "molf", "molf-e"] and {"dora", "pissa", "molf-random"} <= set(methods)
    assert fields["models"]["type"] == "array" and {"tiny", "gemma3-270m"} <= set(fields["models"]["items"]["enum"])
    assert {"type": "string", "enum": ["tiny", "gemma", "paper", "rivals"]} in fields["preset"]["anyOf"]
    assert fields["seeds"]["items"]["type"] == "integer" and fields["push"]["type"] == "boolean"
    assert all(field["description"].strip() for field in fields.values())
    assert not schema["required"]
    # What Prefect's page sends of a form that nobody touched: each field's default, which its own schema must take.
    jsonschema.validate({name: field["default"] for name, field in fields.items()}, schema)


def test_choices_are_those_of_the_checkout_and_survive_a_params_yaml_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("tasks: {mine: {}}\n")
    assert form.choices("tasks", tmp_path)[0] == "mine"
    (tmp_path / "params.yaml").write_text("tasks: {")
    assert form.choices("tasks", tmp_path) == ["sql", "med", "fact"]


# --- acceptance ----------------------------------------------------------------------------------------------------


EAGER = {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_WORKER_QUERY_SECONDS": "1"}  # instead of 10


def call(api: str, path: str, body: Any = None) -> Any:
    """Asks Prefect's API; without a body by GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def ended(api: str, run: str) -> Any:
    """A flow run that has ended; None while it has not."""
    found = call(api, f"flow_runs/{run}")
    return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None


def log(api: str, run: str) -> str:
    """All lines of a flow run, of which Prefect gives 200 at once."""
    lines: list[str] = []
    while True:
        asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "offset": len(lines)}
        page = call(api, "logs/filter", asked)
        lines += [line["message"] for line in page]
        if not page:
            return "\n".join(lines)


@pytest.fixture
def watched(tmp_path: Path) -> Toy:
    """A toy project of one cell whose rows are a file."""
    toy = Toy(tmp_path, methods=["fft"])
    (toy.root / "rows.jsonl").write_text('{"row": 1}\n')
    toy.edit({"tasks.fact.source": {"kind": "file", "path": "rows.jsonl"}})
    toy.commit("rows")
    return toy


@contextmanager
def serving(toy: Toy, *arguments: str, **environment: str) -> Iterator["tuple[subprocess.Popen[str], Path]"]:
    """`make serve` on a toy project, once its deployments are served; yields it and the file of what it prints."""
    said = toy.notes.parent / "serve.log"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.serve", *arguments],
            cwd=ROOT,
            env={**toy.environment, **EAGER, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        until(lambda: "watch-data/hourly" in said.read_text() or process.poll() is not None, 240)
        assert process.poll() is None, said.read_text()
        yield process, said
    finally:
        process.kill()  # the guards end the rest
        process.wait()


@pytest.mark.acceptance
def test_a_port_is_not_given_twice(prefect_server: str) -> None:
    port = int(prefect_server.split(":")[2].split("/")[0])
    assert taken(port)
    with pytest.raises(NoServer, match="already answers.*PREFECT_API_URL"), server(port):
        pass


@needs_proc
@pytest.mark.acceptance
def test_served_from_one_machine_the_form_starts_a_comparison_and_the_end_leaves_nothing(watched: Toy) -> None:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    watched.tell("train@tiny-fact-lora-3", sleep=600)
    with serving(watched, "--port", str(port)) as (process, said):
        again = subprocess.run(
            [sys.executable, "-m", "pipelines.serve", "--port", str(port)],
            cwd=ROOT,
            env=watched.environment,
            capture_output=True,
            text=True,
        )
        assert again.returncode == 1 and f"already answers on port {port}" in again.stderr

        deployment = call(api, "deployments/name/compare-methods/on-demand")
        asked = {"parameters": {"methods": ["lora"], "seeds": [3]}}
        run = call(api, f"deployments/{deployment['id']}/create_flow_run", asked)
        training = watched.notes / "train@tiny-fact-lora-3.pid"
        until(lambda: training.exists() or ended(api, run["id"]), 240)
        assert training.exists(), log(api, run["id"])

        below = descendants(process.pid)
        assert int(training.read_text()) in below
        process.terminate()
        assert process.wait(120) == 0, said.read_text()
        assert not [pid for pid in below if alive(pid)]
        assert not answers(api) and not taken(port)


@needs_proc
@pytest.mark.acceptance
def test_ctrl_c_ends_what_serves_on_a_server_of_others_and_not_the_server(watched: Toy, prefect_server: str) -> None:
    with serving(watched, PREFECT_API_URL=prefect_server) as (process, said):
        below = descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(90) == 0, said.read_text()
        assert below and not [pid for pid in below if alive(pid)]
    assert answers(prefect_server)


@needs_proc
@pytest.mark.acceptance
def test_a_worker_runs_what_a_schedule_a_minute_away_starts(
    watched: Toy, prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `make deploy` and `make worker`'s commands; the worker is started where no code of the project lies."""
    yaml = YAML()
    said = yaml.load((ROOT / "prefect.yaml").read_text())
    nightly = next(one for one in said["deployments"] if one["name"] == "nightly")
    nightly["schedules"][0]["cron"] = "* * * * *"
    with (tmp_path / "prefect.yaml").open("w") as file:
        yaml.dump(said, file)
    environment = {**watched.environment, **EAGER, "PREFECT_API_URL": prefect_server}
    command = ["prefect", "--no-prompt", "worker", "start", "--pool", "molf", "--type", "process"]
    with (tmp_path / "worker.log").open("wb") as output, guarded(command, environment, tmp_path, output) as worker:
        until(lambda: call(prefect_server, "work_pools/filter", {}), 120)
        command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        deployment = call(prefect_server, "deployments/name/compare-methods/nightly")
        asked = {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "COMPLETED", "FAILED", "CRASHED"]}}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        first = until(lambda: call(prefect_server, "flow_runs/filter", asked), 150)[0]
        paused = json.dumps({"paused": True}).encode()
        urllib.request.urlopen(
            urllib.request.Request(
                f"{prefect_server}/deployments/{deployment['id']}",
                paused,
                {"Content-Type": "application/json"},
                method="PATCH",
            )
        )
        run = until(lambda: ended(prefect_server, first["id"]), 240)
        assert run["state_type"] == "COMPLETED", log(prefect_server, run["id"])
        assert run["auto_scheduled"] and run["work_pool_name"] == "molf"
        below = descendants(worker.pid)
    assert below and not [pid for pid in below if alive(pid)]
    until(lambda: "compare is made" in log(prefect_server, run["id"]), 30)
    branch = watched.git("branch", "--list", "molf/*").split()[-1]
    assert watched.git("log", "-1", "--format=%s", branch).startswith("Comparison")
    monkeypatch.setattr(watch, "HOME", watched.root)
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        assert watch.watch_data().startswith("nothing changed: 1 sources")
