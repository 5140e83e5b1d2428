"""compose.yaml's servers as plain processes: MLflow and Prefect on a real PostgreSQL, artifacts over S3's protocol."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from molf import tracking
from molf.config import Params, check_params
from molf.mlflow_cells import history_rows
from molf.mlflow_store import Store
from molf.paths import Cell, own_tools, read_json
from tests.conftest import QUIET, ROOT
from tests.pipelines.conftest import free_port
from tests.report import fake

pytestmark = pytest.mark.acceptance

SEEDS = (0, 1, 2, 3)
METHODS = ("lora", "molf")  # 8 cells below 2 parents, which 4 machines each want to make
PASSWORDS = {"MLFLOW_DB_PASSWORD": "one0secret", "PREFECT_DB_PASSWORD": "another0secret"}
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
WAIT = 240  # seconds that a server has to answer


def postgres_programs() -> Path | None:
    """The folder of initdb: on the PATH, or where Debian puts it, the newest."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=None)


@pytest.fixture(scope="module")
def database() -> Iterator[int]:
    """The port of a PostgreSQL with the databases that compose.yaml's has; passwords are asked for."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL: neither initdb on the PATH nor /usr/lib/postgresql; Debian's package is postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to others
    plain: dict[str, Any] = {}  # PostgreSQL refuses to run as root
    if os.geteuid() == 0:
        plain = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
    (folder / "password").write_text("admin0secret")
    shutil.chown(folder / "password", folder.owner())
    port, data = free_port(), folder / "data"
    made = ["initdb", "--auth=scram-sha-256", "--username=postgres", f"--pwfile={folder / 'password'}", "--no-sync"]
    subprocess.run([programs / made[0], *made[1:], data], check=True, cwd=folder, stdout=subprocess.DEVNULL, **plain)
    settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder}
    settings |= {"fsync": "off", "shared_buffers": "32MB"}
    command = [
        str(programs / "postgres"),
        "-D",
        str(data),
        *(word for k, v in settings.items() for word in ("-c", f"{k}={v}")),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **plain)
    try:
        ready = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
        wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, server, folder / "log")
        access = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGPASSWORD": "admin0secret"}
        path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        script = ROOT / "container/databases.sh"
        subprocess.run(["sh", script], check=True, env={**os.environ, **access, **path, **PASSWORDS})
        yield port
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown: clients are sent away
        server.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables by which clients find a server that speaks S3's protocol, with compose.yaml's buckets."""
    pytest.importorskip("moto.server")
    port = free_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    assert set(variables) - {"NO_PROXY"} == set(SERVICES["buckets"]["environment"])
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, f"{variables['AWS_ENDPOINT_URL']}/moto-api/", variables, tmp_path_factory.mktemp("s3")):
        made = [sys.executable, str(ROOT / "container/buckets.py"), *SERVICES["buckets"]["command"]]
        subprocess.run(made, check=True, env={**os.environ, **variables})
        yield variables


class serving:
    """A server in a process group of its own, until the end of the block."""

    def __init__(self, command: list[str], health: str, variables: dict[str, str], folder: Path) -> None:
        self.command, self.health, self.folder = command, health, folder
        self.environment = {**own_tools(), **QUIET, "NO_PROXY": "127.0.0.1", "HOME": str(folder), **variables}

    def __enter__(self) -> None:
        log = self.folder / "log"
        with log.open("w") as file:
            options: dict[str, Any] = {"stdout": file, "stderr": file, "start_new_session": True}
            self.process = subprocess.Popen(self.command, env=self.environment, cwd=self.folder, **options)
        try:
            wait_for(self.answers, self.process, log)
        except BaseException:
            self.__exit__()
            raise

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        self.process.wait()


def wait_for(ready: Any, server: "subprocess.Popen[Any]", log: Path) -> None:
    """Returns once a server is ready."""
    end = time.monotonic() + WAIT
    while not ready():
        assert server.poll() is None, f"it ended by itself: {log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"no answer: {log.read_text()[-3000:]}"
        time.sleep(0.1)


def command_of(service: str, port: int) -> list[str]:
    """What compose.yaml has the service run, on the loopback and another port."""
    words = [*SERVICES[service]["entrypoint"], *SERVICES[service]["command"]]
    inside = next(word.removeprefix("--port=") for word in words if word.startswith("--port="))
    found = [word.replace("0.0.0.0", "127.0.0.1").replace(f"--port={inside}", f"--port={port}") for word in words]
    return [word.replace(f"127.0.0.1:{inside}", f"127.0.0.1:{port}") for word in found]


def address_of(service: str, key: str, port: int) -> str:
    """The service's database as compose.yaml names it, at its place here."""
    value: str = SERVICES[service]["environment"][key]
    name = f"{service.upper()}_DB_PASSWORD"
    before, _, rest = value.partition("${" + name)
    return before + PASSWORDS[name] + rest.partition("}")[2].replace("@database:5432/", f"@127.0.0.1:{port}/")


@pytest.fixture(scope="module")
def store_uri(database: int) -> str:
    return address_of("mlflow", "MLFLOW_BACKEND_STORE_URI", database)


@pytest.fixture(scope="module")
def mlflow(store_uri: str, bucket: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of MLflow's server, started as compose.yaml says."""
    port = free_port()
    own = {"MLFLOW_BACKEND_STORE_URI": store_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    assert set(own) <= set(SERVICES["mlflow"]["environment"])
    uri = f"http://127.0.0.1:{port}"
    folder = tmp_path_factory.mktemp("mlflow")
    with serving(command_of("mlflow", port), f"{uri}/health", {**bucket, **own}, folder):
        yield uri


def raw_params() -> dict[str, Any]:
    raw = fake.raw_params(tasks=("sql",), seeds=SEEDS)
    raw["grid"]["methods"] = list(METHODS)
    return raw


class Told(NamedTuple):
    """What a machine is told."""

    root: Path
    cell: Cell
    uri: str
    together: Barrier


def machine(told: Told) -> None:
    """One of the machines: a project of its own, in which one cell is trained, while all others do the same."""
    os.environ.update(QUIET, MLFLOW_TRACKING_URI=told.uri, NO_PROXY="127.0.0.1")
    params = check_params(raw_params(), "params.yaml")
    fake.write_cell(told.root, params, told.cell)
    results = told.root / told.cell.results
    told.together.wait(WAIT)
    with tracking.live_run(read_json(results / "train/run.json"), "molf", told.root) as run:
        run.log(history_rows(results / "train")[:5])
        run.finish(results)
    tracking.log_evaluation(results, "molf", told.root)


@pytest.fixture(scope="module")
def logged(mlflow: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, str]:
    """MLflow after eight machines, which share no lock, have each logged a cell at the same time."""
    root = tmp_path_factory.mktemp("machines")
    params = check_params(raw_params(), "params.yaml")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "molf.report.figures", "tests.test_mlflow_postgres"])
    together = context.Barrier(len(params.cells()))
    machines = [
        context.Process(target=machine, args=(Told(root / str(i), cell, mlflow, together),))
        for i, cell in enumerate(params.cells())
    ]
    for started in machines:
        started.start()
    for started in machines:
        started.join(WAIT)
    assert [started.exitcode for started in machines] == [0] * len(params.grid.seeds) * len(params.grid.methods)
    return params, mlflow


@pytest.fixture
def store(logged: tuple[Params, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A client of the server, as a teammate has it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", logged[1])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return Store("molf", tmp_path)


def test_eight_machines_make_each_run_once_below_its_parent(logged: tuple[Params, str], store: Store) -> None:
    runs = list(store.client.search_runs([store.experiment_id]))
    parents = {run.info.run_name: run.info.run_id for run in runs if run.data.tags["molf.kind"] == "method"}
    cells = {run.info.run_name: run for run in runs if run.data.tags["molf.kind"] == "cell"}
    assert sorted(parents) == sorted(f"tiny/sql/{method}" for method in METHODS)
    assert sorted(cells) == sorted(cell.name for cell in logged[0].cells())
    assert len(runs) == len(parents) + len(cells)
    for name, run in cells.items():
        assert run.data.tags["mlflow.parentRunId"] == parents[name.rpartition("/")[0]], name
        assert run.info.status == "FINISHED"
    assert all(run.info.status == "FINISHED" for run in runs)


def test_metrics_and_artifacts_come_back_as_they_were(
    logged: tuple[Params, str], store: Store, bucket: dict[str, str], tmp_path: Path
) -> None:
    import boto3

    for cell in logged[0].cells():
        run = store.find(kind="cell", cell=cell.name)
        assert run is not None
        points = store.client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, fake.STEPS + 1)), cell.name
        assert run.data.metrics["test/primary"] == pytest.approx((fake.RIGHT[cell.method] - cell.seed) / 39)
        copy = store.client.download_artifacts(run.info.run_id, "train/run.json", str(tmp_path))
        assert json.loads(Path(copy).read_text())["fingerprint"] == run.data.tags["molf.fingerprint"]
    credentials = {key.lower().removesuffix("_url"): value for key, value in bucket.items()}
    client = boto3.client(
        "s3",
        endpoint_url=bucket["AWS_ENDPOINT_URL"],
        region_name=bucket["AWS_DEFAULT_REGION"],
        aws_access_key_id=credentials["aws_access_key_id"],
        aws_secret_access_key=credentials["aws_secret_access_key"],
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    assert sum(key.endswith("train/run.json") for key in keys) == len(logged[0].cells())


def test_two_that_made_the_same_parent_settle_on_one(logged: tuple[Params, str], store: Store) -> None:
    cell = logged[0].cells()[0]
    first = store.parent(cell)
    children = {run.info.run_id for run in below(store, first.info.run_id)}
    assert len(children) == len(SEEDS)
    tags = {key: value for key, value in first.data.tags.items() if key.startswith("molf.")}
    other = store.client.create_run(store.experiment_id, tags=tags, run_name="the same")
    lost = next(iter(children))
    store.client.set_tag(lost, "mlflow.parentRunId", other.info.run_id)
    assert store.parent(cell).info.run_id == first.info.run_id
    assert {run.info.run_id for run in below(store, first.info.run_id)} == children
    assert store.client.get_run(other.info.run_id).info.lifecycle_stage == "deleted"


def below(store: Store, parent: str) -> list[Any]:
    return list(store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"))


def test_the_server_answers_to_its_names_in_compose_alone(mlflow: str) -> None:
    def status(host: str) -> int:
        request = urllib.request.Request(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1")
        request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    asked = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert status(asked) == 200
    assert status("evil.example:5000") == 403


def test_a_wrong_password_is_not_shown(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri.replace(PASSWORDS["MLFLOW_DB_PASSWORD"], "wrong0secret"))
    assert tracking.initialise(tmp_path, "molf") is False
    printed = capsys.readouterr()
    assert "password authentication failed" in printed.err
    assert "0secret" not in printed.err + printed.out


def test_prefects_server_has_the_other_database(database: int, tmp_path: Path) -> None:
    port = free_port()
    key = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
    variables = {key: address_of("prefect", key, database), "PREFECT_HOME": str(tmp_path)}
    with serving(command_of("prefect", port), f"http://127.0.0.1:{port}/api/health", variables, tmp_path):
        url = f"http://127.0.0.1:{port}/api/work_pools/"
        request = urllib.request.Request(url, json.dumps({"name": "molf", "type": "process"}).encode())
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=30).close()
    import psycopg2

    connection = psycopg2.connect(variables[key].replace("postgresql+asyncpg", "postgresql"))
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT name FROM work_pool")
        assert cursor.fetchall() == [("molf",)]
    finally:
        connection.close()
