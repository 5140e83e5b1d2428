"""Cells on other machines: two clones with homes of their own as workers, in network namespaces where that may be.

They share with the coordinator what docs/orchestration.md lists and nothing else: Prefect's server, a git server, and
a DVC remote over S3's protocol.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from molf.paths import own_tools
from pipelines.exchange import Traffic
from pipelines.guard import descendants
from pipelines.tasks import NotSetUp, Slots
from tests.conftest import QUIET, ROOT
from tests.pipelines.conftest import free_port
from tests.pipelines.test_commands import alive, until
from tests.pipelines.toy import Toy

BUCKET, POOL = "molf", "machines"
SPACES = ("molf-test-1", "molf-test-2")


def test_a_cell_that_takes_more_gpus_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    Slots(tmp_path, ("0", "3"), 1).check(2)
    Slots(tmp_path, (), 1).check(4)  # processes without GPUs share the processor
    with pytest.raises(NotSetUp, match=r"training.processes: a cell takes 4 GPUs, this machine has 2 \(0, 3\)"):
        Slots(tmp_path, ("0", "3"), 1).check(4)


# --- acceptance ----------------------------------------------------------------------------------------------------


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Net:
    """Where servers listen, and how a machine's processes are started."""

    address: str
    prefixes: tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """Two network namespaces that reach one address of this machine and nothing else; or the loopback address."""
    made: list[str] = []
    try:
        try:
            for number, name in enumerate(SPACES, 1):
                _ip("netns", "add", name)
                made.append(name)
                outer, inner = f"molf-t{number}", f"molf-i{number}"
                _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
                _ip("address", "add", f"10.213.{number}.1/30", "dev", outer)
                _ip("link", "set", outer, "up")
                within = ("-n", name)
                _ip(*within, "address", "add", f"10.213.{number}.2/30", "dev", inner)
                _ip(*within, "link", "set", inner, "up")
                _ip(*within, "link", "set", "lo", "up")
                if number > 1:
                    _ip(*within, "route", "add", "10.213.1.1/32", "via", f"10.213.{number}.1")
        except (OSError, subprocess.CalledProcessError):  # not root, or no such kernel
            yield Net("127.0.0.1", ([], []))
        else:
            first, second = (["ip", "netns", "exec", name] for name in SPACES)
            yield Net("10.213.1.1", (first, second))
    finally:
        for number, name in enumerate(made, 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "delete", f"molf-t{number}")
            _ip("netns", "delete", name)


class Forward(socketserver.ThreadingTCPServer):
    """Hands connections on to a port of the loopback address: of Prefect's server, which listens nowhere else."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, address: str, port: int) -> None:
        def hand_on(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(65536):
                    target.sendall(piece)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", port)) as inner:
                    back = threading.Thread(target=hand_on, args=(inner, self.request), daemon=True)
                    back.start()
                    hand_on(self.request, inner)
                    back.join()

        super().__init__((address, 0), Handler)


class Remote:
    """A server of S3's protocol that notes what goes through it."""

    def __init__(self, address: str, application: Callable[..., Any]) -> None:
        from werkzeug.serving import make_server

        self.seen: list[tuple[str, str, int]] = []  # method, path, bytes of the body that went in or came out

        def noting(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            sent = int(environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0)
            chunks = list(application(environ, start))
            self.seen.append((method, path, sent if method == "PUT" else sum(map(len, chunks))))
            return chunks

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = make_server(address, 0, noting, threaded=True)
        self.address = f"http://{address}:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, part: str) -> list[str]:
        """Objects that were stored under an address with this part."""
        return [path for method, path, _ in self.seen if method == "PUT" and part in path]


@pytest.fixture(scope="module")
def shared(net: Net, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Shared"]:
    """The servers that all machines reach."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    folder = tmp_path_factory.mktemp("shared")
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, f"127.0.0.1,{net.address}")
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        remote = Remote(net.address, moto.DomainDispatcherApplication(moto.create_backend_app))
        stack.callback(remote.server.shutdown)
        boto3.client("s3", endpoint_url=remote.address).create_bucket(Bucket=BUCKET)
        forward = Forward(net.address, int(prefect_server.rsplit(":", 1)[1].split("/")[0]))
        threading.Thread(target=forward.serve_forever, daemon=True).start()
        stack.callback(forward.shutdown)
        port = free_port()
        daemon = subprocess.Popen(
            ["git", "daemon", "--export-all", "--enable=receive-pack", "--reuseaddr", f"--base-path={folder}"]
            + [f"--listen={net.address}", f"--port={port}", str(folder)],
            start_new_session=True,
        )
        stack.callback(daemon.wait)
        stack.callback(os.killpg, daemon.pid, signal.SIGKILL)
        api = f"http://{net.address}:{forward.server_address[1]}/api"
        yield Shared(net, api, remote, folder, f"git://{net.address}:{port}")


@dataclass
class Shared:
    net: Net
    api: str
    remote: Remote
    folder: Path  # of git repositories
    git: str


@dataclass
class Machine:
    """A worker's machine: a clone, a home, an address of its own."""

    shared: Shared
    number: int
    root: Path
    worker: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> Path:
        return self.root / "worker.log"

    @property
    def notes(self) -> Path:
        return self.root / "notes"

    @property
    def environment(self) -> dict[str, str]:
        found = {**own_tools(), **QUIET}
        found |= {"HOME": str(self.root / "home"), "PREFECT_HOME": str(self.root / "prefect"), "TOY": str(self.notes)}
        found |= {"MOLF_CHECKOUT": str(self.root / "clone"), "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        found |= {"PREFECT_API_URL": self.shared.api, "PREFECT_WORKER_QUERY_SECONDS": "1"}
        return {name: value for name, value in found.items() if not name.startswith(("MLFLOW_TRACKING", "XDG_"))}

    def start(self) -> None:
        """Makes the clone if it lacks, and starts a worker that runs one cell at a time."""
        prefix = self.shared.net.prefixes[self.number]
        if not (self.root / "clone").exists():
            for name in ("home", "notes"):
                (self.root / name).mkdir(parents=True)
            clone = [*prefix, "git", "clone", "--quiet", f"{self.shared.git}/origin", str(self.root / "clone")]
            subprocess.run(clone, check=True, env=self.environment)
        command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", POOL]
        with self.log.open("ab") as output:
            self.worker = subprocess.Popen(
                [*prefix, *command, "--name", f"machine-{self.number}", "--limit", "1"],
                cwd=self.root / "home",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Ends all processes at once, as when the power fails."""
        if self.worker is None:
            return
        for pid in [self.worker.pid, *descendants(self.worker.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.worker.wait()
        self.worker = None

    def tell(self, stage: str, **order: Any) -> None:
        (self.notes / stage).write_text(json.dumps(order))

    def forget(self) -> None:
        """Forgets what ran here."""
        (self.notes / "ran.log").unlink(missing_ok=True)

    def ran(self) -> list[str]:
        """Stages that ran here, in their order."""
        path = self.notes / "ran.log"
        return [json.loads(line)["stage"] for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Team:
    toy: Toy
    machines: tuple[Machine, Machine]
    shared: Shared

    def start(self, *arguments: str) -> "Coordinator":
        return Coordinator(self, self.toy.start(*arguments, PREFECT_API_URL=self.shared.api))

    def total(self) -> list[str]:
        return sorted(stage for machine in self.machines for stage in machine.ran())


class Coordinator:
    """A flow run in a process of its own, and what it says."""

    def __init__(self, team: Team, process: "subprocess.Popen[str]") -> None:
        self.team, self.process, self.lines = team, process, list[str]()
        self.reading = threading.Thread(target=lambda: self.lines.extend(process.stdout or ()), daemon=True)
        self.reading.start()

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def until(self, what: Callable[[], Any]) -> Any:
        """Waits until something is so while the flow runs."""

        def so() -> Any:
            answer = what()
            assert answer or self.process.poll() is None, self.said
            return answer

        try:
            return until(so, 120)
        except BaseException:
            print(self.said, *(machine.log.read_text() for machine in self.team.machines), sep="\n---\n")
            raise

    def busy(self, stage: str, but: Machine | None = None) -> Machine:
        """Waits until a machine is at a stage; returns that machine."""
        machines = [machine for machine in self.team.machines if machine is not but]
        found: Machine = self.until(lambda: next((m for m in machines if stage in m.ran()), None))
        return found

    def end(self, code: int = 0) -> str:
        """Waits for its end; returns what it said."""
        self.process.wait(400)
        self.reading.join()
        assert self.process.returncode == code, self.said
        return self.said

    def kill(self) -> None:
        self.process.kill()
        self.end(-signal.SIGKILL)


@pytest.fixture(scope="module")
def team(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    toy = Toy(folder)
    toy.edit({"flow.pool": POOL, "flow.lost_after": 20, "flow.retries": 1})
    config = toy.root / ".dvc/config"
    remote = f"url = s3://{BUCKET}/dvc\n    endpointurl = {shared.remote.address}\n"
    config.write_text(f"{config.read_text()}    remote = cloud\n['remote \"cloud\"']\n    {remote}")
    toy.commit("a remote")
    subprocess.run(
        ["git", "init", "--quiet", "--bare", "--initial-branch", "main", str(shared.folder / "origin")], check=True
    )
    toy.git("remote", "add", "origin", f"{shared.git}/origin")
    until(lambda: subprocess.run(["git", "ls-remote", "origin"], cwd=toy.root, capture_output=True).returncode == 0)
    toy.git("push", "--quiet", "origin", "main")
    machines = (Machine(shared, 0, folder / "one"), Machine(shared, 1, folder / "two"))
    try:
        for machine in machines:
            machine.start()
        yield Team(toy, machines, shared)
    finally:
        for machine in machines:
            machine.kill()


@pytest.mark.acceptance
def test_two_machines_run_the_cells_and_a_killed_coordinator_goes_on(team: Team, tmp_path: Path) -> None:
    toy, training, baseline = team.toy, "train@tiny-fact-fft-0", "baseline@tiny-fact"
    both, go = tmp_path / "both", tmp_path / "go"
    for machine in team.machines:
        machine.tell(training, until=str(go))
        machine.tell(baseline, until=str(both))
    flow = team.start("--methods", "fft")
    try:
        first, other = flow.busy(training), flow.busy(baseline)
        assert first is not other, "a worker of one cell at a time ran two"
        both.touch()
        flow.until(lambda: team.shared.remote.put("/runs/"))
    finally:
        flow.kill()

    again = team.start("--methods", "fft", "--push")
    again.until(lambda: "tiny.fact.fft.0 runs since an earlier run that was killed" in again.said)
    go.touch()
    said = again.end()
    assert "1 of them are in the remote already" in said and "2 evaluations compared" in said
    evaluation = "evaluate@tiny-fact-fft-0"
    assert (first.ran(), other.ran()) == ([training, evaluation], [baseline]), "each stage of a cell ran exactly once"
    here = {line["stage"] for line in toy.ran()}
    assert here == {"prepare@fact", "base@tiny", "compare"}, "the coordinator ran a cell"
    (run,) = (path for path in (toy.root / ".molf/flow/runs").iterdir() if (path / "reports/comparison.json").exists())
    assert (run / "results/tiny/fact/fft/seed-0/evaluation/made.txt").exists()
    assert not list((run / "weights").rglob("made.txt")), "weights came here"
    assert len(team.shared.remote.put("/runs/")) == 3 + len(here), "entries of single stages, and those of --push"


@pytest.mark.acceptance
def test_the_cell_of_a_dead_machine_goes_to_another_and_a_cancelled_coordinator_cancels_it(
    team: Team, tmp_path: Path
) -> None:
    toy, training, evaluation = team.toy, "train@tiny-fact-fft-0", "evaluate@tiny-fact-fft-0"
    go = tmp_path / "go"
    toy.edit({"training.epochs": 7})
    for machine in team.machines:
        machine.forget()
        machine.tell(training, until=str(go), mark="anew")  # or its evaluation would be found
        machine.tell(evaluation, until=str(tmp_path / "never"))
    flow = team.start("--methods", "fft")
    try:
        first = flow.busy(training)
        first.kill()
        other = flow.busy(training, but=first)
        assert "tiny.fact.fft.0 is given out again: no sign of life for 20 s" in flow.said
        go.touch()
        flow.busy(evaluation, but=first)
        pid = int(flow.until(lambda: (other.notes / f"{evaluation}.pid").read_text()))
        assert alive(pid)
    finally:
        flow.process.send_signal(signal.SIGINT)
    assert "interrupted" in flow.end(128 + signal.SIGINT)
    until(lambda: not alive(pid))
    states = flow_runs(team.shared.api, f"run:{re.findall('run ([0-9]+-[0-9]+-[0-9a-f]+) in', flow.said)[0]}")
    assert sorted(run["state_type"] for run in states if run["name"] == "tiny.fact.fft.0") == ["CANCELLED", "CRASHED"]
    assert other.ran().count(training) == 1 and "baseline@tiny-fact" not in first.ran()


@pytest.mark.acceptance
def test_of_two_runs_of_one_cell_the_one_that_came_furthest_is_taken_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine is given up for lost, but only its network was."""
    toy = Toy(tmp_path / "toy", methods=["fft"])
    monkeypatch.chdir(toy.root)
    config = toy.root / ".dvc/config"
    config.write_text(f"{config.read_text()}    remote = disk\n['remote \"disk\"']\n    url = {tmp_path / 'remote'}\n")
    stages = ["train@tiny-fact-fft-0", "evaluate@tiny-fact-fft-0"]
    lock, load = toy.root / "dvc.lock", YAML(typ="safe").load

    def repro(*names: str, mark: str = "") -> None:
        command = ["dvc", "repro", "--quiet", "--single-item", *names]
        subprocess.run(command, cwd=toy.root, env={**toy.environment, "TOY_MARK": mark}, check=True)

    repro("prepare@fact", "base@tiny")
    before = lock.read_text()
    runs: dict[str, str] = {}
    for mark in ("one", "two"):
        lock.write_text(before)
        shutil.rmtree(toy.root / ".dvc/cache/runs")
        repro(*stages, mark=mark)
        traffic = Traffic()
        traffic.put(stages[0])
        (name,) = {path.name for path in (tmp_path / "remote/runs").glob("*/*/*")} - set(runs)
        runs[name] = lock.read_text()
    assert Traffic().chain(stages, []).keys() == {stages[0]}
    taken = runs[max(runs)]  # which comes second where both have trained only
    lock.write_text(taken)
    Traffic().put(stages[1])
    lock.write_text(before)
    traffic = Traffic()
    traffic.write(traffic.chain(stages, []))
    assert load(lock.read_text())["stages"] == load(taken)["stages"]


def flow_runs(api: str, tag: str) -> list[dict[str, Any]]:
    """Of a coordinator, as soon as none is alive."""
    body = json.dumps({"flow_runs": {"tags": {"all_": [tag]}}}).encode()

    def ended() -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{api}/flow_runs/filter", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            runs: list[dict[str, Any]] = json.load(answer)
        return runs if all(run["state_type"] in ("CANCELLED", "CRASHED", "COMPLETED") for run in runs) else []

    found: list[dict[str, Any]] = until(ended)
    return found
