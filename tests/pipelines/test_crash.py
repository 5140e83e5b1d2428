"""Flow runs that are cancelled or killed, their worker or server with them: nothing runs on or is done twice."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molf.paths import read_json
from pipelines import checkout, locks
from pipelines.graph import Job
from pipelines.guard import descendants
from pipelines.server import answers, server
from tests.conftest import SMALL, Project
from tests.pipelines.conftest import free_port
from tests.pipelines.test_commands import alive, needs_proc, until
from tests.pipelines.toy import Toy

ENDED = 45.0  # seconds in which the guard has ended all
DONE = 240.0  # seconds for a flow run on a busy machine


# --- a cell's worktree after a kill -----------------------------------------------------------------------------------


JOB = Job("tiny.fact.fft.0", ("tiny", "fact", "fft", 0), (("grid", "methods", "fft"),), ("train@tiny-fact-fft-0",))


def test_a_cell_gets_a_sound_worktree_whatever_a_kill_left_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    commit = toy.git("rev-parse", "HEAD")
    tree = checkout.cell_worktree(toy.root, commit, JOB).root
    kept = tree / ".molf/checkpoints/tiny/fact/fft/seed-0/step-00000003"
    kept.mkdir(parents=True)
    (Path(checkout.git(tree, "rev-parse", "--absolute-git-dir")) / "index.lock").touch()
    (tree / ".dvc/tmp").mkdir(exist_ok=True)
    (tree / ".dvc/tmp/rwlock").write_text('{"write": {')
    (tree / "stage.py").write_text("half of i")
    checkout.cell_worktree(toy.root, commit, JOB)
    assert kept.is_dir()
    assert not (tree / ".dvc/tmp/rwlock").exists() and "half of i" not in (tree / "stage.py").read_text()
    assert checkout.git(tree, "status", "--porcelain") == ""

    # Killed while git made it: locked, and its checkpoint was put aside.
    (tree / ".molf").rename(tree.with_name(f".{JOB.key}"))
    toy.git("worktree", "lock", str(tree))
    shutil.rmtree(tree)
    checkout.cell_worktree(toy.root, commit, JOB)
    assert kept.is_dir() and (tree / "stage.py").is_file()
    assert toy.git("worktree", "list").count("tiny.fact.fft.0") == 1


def test_a_lock_is_free_or_not(tmp_path: Path) -> None:
    with locks.free(tmp_path / "it") as first, locks.free(tmp_path / "it") as second:
        assert (first, second) == (True, False)
    with locks.free(tmp_path / "it") as again:
        assert again


# --- acceptance -------------------------------------------------------------------------------------------------------


def ask(api: str, path: str, body: Any = None) -> Any:
    """Asks Prefect's API: by POST with a body, by GET without."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def newest(api: str) -> dict[str, Any]:
    """The flow run that began last."""
    runs: list[dict[str, Any]] = ask(api, "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    return runs[0]


def state(api: str, run: str) -> str:
    return str(ask(api, f"flow_runs/{run}")["state_type"])


def cancel(api: str, run: str) -> None:
    """What the button in Prefect's page and `prefect flow-run cancel` do."""
    assert ask(api, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})["status"] == "ACCEPT"


def sleeper(toy: Toy, stage: str) -> int:
    """Waits until a stage sleeps; its process."""
    path = toy.notes / f"{stage}.pid"
    pid = int(until(lambda: path.exists() and path.read_text(), DONE))
    path.unlink()
    return pid


def stages(toy: Toy) -> list[str]:
    """What ran since the last look, without the names' part that all share."""
    return [str(line["stage"]).replace("tiny-fact-", "") for line in toy.ran()]


def all_gone(toy: Toy, *pids: int) -> None:
    """Waits until no process of a cell is left, those given among them."""
    cells = str(toy.root / ".molf/flow/cells")
    until(lambda: not any(map(alive, pids)) and not any(_folder(name).startswith(cells) for name in _pids()), ENDED)


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _folder(pid: str) -> str:
    """Where a process works; empty if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


@needs_proc
@pytest.mark.acceptance
def test_after_a_kill_of_the_flow_its_cells_end_and_the_next_run_goes_on(tmp_path: Path, prefect_server: str) -> None:
    toy = Toy(tmp_path, methods=["fft"])
    toy.tell("train@tiny-fact-fft-0", sleep=600)
    with toy.start(PREFECT_API_URL=prefect_server) as flow:
        pid = sleeper(toy, "train@tiny-fact-fft-0")
        killed = newest(prefect_server)["id"]
        flow.kill()
    all_gone(toy, pid)
    assert stages(toy)[-2:] == ["baseline@tiny-fact", "train@fft-0"]
    assert state(prefect_server, killed) == "RUNNING"  # it could tell nobody

    said = toy.flow(PREFECT_API_URL=prefect_server)
    assert stages(toy) == ["train@fft-0", "evaluate@fft-0", "compare"]
    assert f"flow run {killed} was killed: set to Crashed" in said
    assert state(prefect_server, killed) == "CRASHED"
    unended = {"flow_runs": {"id": {"any_": [killed]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    assert ask(prefect_server, "task_runs/filter", unended) == []
    assert len(toy.git("branch", "--list", "molf/*").split()) == 2  # the last run's, and the plus sign before it
    assert toy.git("worktree", "list").count(".molf/flow/") == 1


class Pool:
    """A work pool with a deployment of the flow, and one worker at a time, all on a toy."""

    def __init__(self, toy: Toy, api: str) -> None:
        from prefect.flows import EntrypointType
        from prefect.settings import PREFECT_API_URL, temporary_settings

        from pipelines.flow import compare_methods

        self.toy, self.api = toy, api
        self.worker: subprocess.Popen[bytes] | None = None
        ask(api, "work_pools/", {"name": "crash", "type": "process"})
        with temporary_settings({PREFECT_API_URL: api}):
            deployment: Any = compare_methods.to_deployment(
                "crash", work_pool_name="crash", entrypoint_type=EntrypointType.MODULE_PATH
            )
            self.deployment = deployment.apply()

    def work(self) -> "subprocess.Popen[bytes]":
        """A worker; the one before, if it lives."""
        if self.worker is None or self.worker.poll() is not None:
            environment = {
                **self.toy.environment,
                "PREFECT_API_URL": self.api,
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PREFECT_CLI_PROMPT": "false",
            }
            with (self.toy.notes / "worker.log").open("ab") as log:
                self.worker = subprocess.Popen(
                    [Path(sys.executable).with_name("prefect"), "worker", "start", "--pool", "crash"],
                    cwd=self.toy.root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        return self.worker

    def run(self, **parameters: Any) -> str:
        """Asks for a flow run; returns its id."""
        self.work()
        return str(ask(self.api, f"deployments/{self.deployment}/create_flow_run", {"parameters": parameters})["id"])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Pool]:
    found = Pool(Toy(tmp_path_factory.mktemp("pool")), prefect_server)
    yield found
    if found.worker is not None and found.worker.poll() is None:
        os.killpg(found.worker.pid, signal.SIGTERM)
        try:
            found.worker.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(found.worker.pid, signal.SIGKILL)


@needs_proc
@pytest.mark.acceptance
def test_a_flow_run_outlives_its_worker(pool: Pool) -> None:
    pool.toy.ran()
    pool.toy.tell("train@tiny-fact-fft-1", sleep=5)
    run = pool.run(methods=["fft"], seeds=[1])
    sleeper(pool.toy, "train@tiny-fact-fft-1")
    pool.work().kill()
    pool.work().wait()
    until(lambda: state(pool.api, run) != "RUNNING", DONE)
    assert state(pool.api, run) == "COMPLETED"
    assert stages(pool.toy)[-3:] == ["train@fft-1", "evaluate@fft-1", "compare"]


@needs_proc
@pytest.mark.acceptance
def test_a_cancelled_run_leaves_no_process_and_the_next_one_repeats_nothing(pool: Pool) -> None:
    """By the worker that is started again, if the test before has killed one."""
    pool.toy.ran()
    pool.toy.tell("train@tiny-fact-fft-2", sleep=600)
    run = pool.run(methods=["fft"], seeds=[2])
    pid = sleeper(pool.toy, "train@tiny-fact-fft-2")
    cancel(pool.api, run)
    all_gone(pool.toy, pid)
    until(lambda: state(pool.api, run) == "CANCELLED", ENDED)
    assert stages(pool.toy)[-1] == "train@fft-2"
    assert (pool.toy.root / ".molf/flow/cells/tiny.fact.fft.2").is_dir()  # where a checkpoint would lie

    pool.toy.tell("evaluate@tiny-fact-fft-2", sleep=600)
    with pool.toy.start("--methods", "fft", "--seeds", "2", PREFECT_API_URL=pool.api) as flow:
        sleeper(pool.toy, "evaluate@tiny-fact-fft-2")
        flow.terminate()  # the rest of a run is other tests' matter
        flow.communicate(timeout=DONE)
    assert stages(pool.toy) == ["train@fft-2", "evaluate@fft-2"]


@needs_proc
@pytest.mark.acceptance
def test_a_flow_run_outlives_its_server(tmp_path: Path) -> None:
    toy, port = Toy(tmp_path, methods=["fft"]), free_port()
    toy.tell("train@tiny-fact-fft-0", sleep=3)
    home = {"PREFECT_HOME": str(tmp_path / "server")}
    with contextlib.ExitStack() as stack, (tmp_path / "server.log").open("wb") as log:
        api = stack.enter_context(server(port, home, log))
        flow = stack.enter_context(toy.start(PREFECT_API_URL=api))
        sleeper(toy, "train@tiny-fact-fft-0")
        run = newest(api)["id"]
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                if str(port).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
        seen: list[str] = []

        def went_on() -> bool:  # cells do not wait for the server
            seen.extend(stages(toy))
            return "evaluate@fft-0" in seen

        until(went_on, DONE)
        until(lambda: not answers(api), ENDED)
        stack.enter_context(server(port, home, log))
        said, _ = flow.communicate(timeout=DONE)
        assert flow.returncode == 0, said
        assert state(api, run) == "COMPLETED"
    seen += stages(toy)
    assert sorted(seen) == sorted(set(seen)) and seen[-1] == "compare"


@needs_proc
@pytest.mark.acceptance
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_word_on_how_to_go_on(
    tmp_path: Path, prefect_server: str, number: signal.Signals
) -> None:
    toy, own = Toy(tmp_path, methods=["fft"]), number == signal.SIGINT
    toy.tell("prepare@fact", sleep=600)
    with toy.start(**({} if own else {"PREFECT_API_URL": prefect_server})) as flow:
        pid = sleeper(toy, "prepare@fact")
        below = descendants(flow.pid)
        for process in (flow.pid, *below):  # as a terminal does with Ctrl-C
            if process == flow.pid or (own and os.getpgid(process) == os.getpgid(flow.pid)):
                os.kill(process, number)
        said, _ = flow.communicate(timeout=DONE)
    assert flow.returncode == 128 + number, said
    assert "the next run goes on from the checkpoints" in said and "Traceback" not in said, said
    assert "Finished in state Crashed" in said
    assert pid in below and not any(map(alive, below))  # a server of its own is among them
    if not own:
        assert newest(prefect_server)["state_type"] == "CRASHED"


@pytest.mark.acceptance
def test_a_server_that_does_not_answer_is_told_in_a_sentence(tmp_path: Path) -> None:
    said = Toy(tmp_path).flow(code=1, PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")
    assert "does not answer" in said and "unset PREFECT_API_URL" in said and "Traceback" not in said


TRAINED = "tiny/fact/fft/seed-0"


@needs_proc
@pytest.mark.acceptance
def test_a_cancelled_training_goes_on_from_its_checkpoint(project: Project, prefect_server: str) -> None:
    """Started by hand, without a worker that would end it."""
    project.edit({**SMALL, "grid.methods": ["fft"], "training.epochs": 60, "checkpoint.steps": 5})
    cell = project.root / ".molf/flow/cells/tiny.fact.fft.0"
    summary = cell / "results" / TRAINED / "train/summary.json"

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.flow"],
            cwd=project.root,
            env={**project.environment, "PREFECT_API_URL": prefect_server},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with start() as flow:
        until(lambda: flow.poll() is not None or list(cell.glob(f".molf/checkpoints/{TRAINED}/step-*")), DONE)
        assert flow.poll() is None, flow.communicate()[0]
        (training,) = (
            pid
            for pid in descendants(flow.pid)
            if b"\0molf.stages.train\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(training, signal.SIGSTOP)  # so that it is not at its end before the cancellation comes to it
        cancel(prefect_server, newest(prefect_server)["id"])
        until(lambda: _awaits(training, signal.SIGTERM), ENDED)
        os.kill(training, signal.SIGCONT)
        said, _ = flow.communicate(timeout=DONE)
    assert flow.returncode == 1 and "cancelled; the next run goes on from the checkpoints" in said, said
    assert not alive(training)
    assert newest(prefect_server)["state_type"] == "CANCELLED"
    (left,) = cell.glob(f".molf/checkpoints/{TRAINED}/step-*")
    step = int(left.name.removeprefix("step-"))
    assert not summary.exists()

    with start() as flow:
        until(lambda: flow.poll() is not None or summary.exists(), DONE)
        assert flow.poll() is None, flow.communicate()[0]
        found = read_json(summary)
        flow.terminate()  # the rest of a run is other tests' matter
        flow.communicate(timeout=DONE)
    assert found["resumed_at_steps"] == [step] and 0 < step < found["steps"]


def _awaits(pid: int, number: int) -> bool:
    """Whether a signal was sent to a process that is stopped."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) & 1 << number - 1)
