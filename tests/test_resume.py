"""A training that is killed, stopped or fails goes on as if nothing had happened."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from molf import checkpoint, machine, meter
from molf.batches import SeededOrder
from molf.checkpoint import Checkpoints, part
from molf.config import check_params, read_yaml
from molf.errors import Interrupted, RunError
from molf.methods.sample import completion_loss
from molf.models import autocast, folder_hash
from molf.optim import AdamW
from molf.resume import (
    Keeper,
    Wish,
    identity,
    join,
    optimizer_tensor,
    random_state,
    restore_random_state,
    split,
)
from molf.training import Outcome, train
from tests.conftest import ROOT, Project, frame

WALL = ["tokens_per_second", "seconds", "peak_memory_bytes"]  # columns of the history that no two runs share
KILLS = 3


@dataclass(frozen=True)
class Job:
    """A cell, small enough to be trained in a second."""

    base: Path
    folder: Path
    method: str
    dropout: float = 0.0
    accumulation: int = 1
    every: int | None = 3  # steps between checkpoints
    steps: int = 30
    hardware: str = "a"
    slow: bool = False  # whether its disk is, so that a write can be met in its middle

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def heard(self) -> list[int]:
        """Steps that were made, in all processes."""
        path = self.folder / "heard"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


class Ear:
    """A listener that writes each step into a file as soon as it is made; a checkpoint's rows come all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, rows: list[dict[str, float]]) -> None:
        if len(rows) == 1:
            with self.path.open("a") as file:
                file.write(f"{int(rows[0]['step'])}\n")


def run(job: Job, listener: Any = None) -> Outcome:
    """Trains a cell in this process, from its last checkpoint on."""
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "threads": 1, "max_steps": job.steps, "epochs": 99}
    data["training"]["gradient_accumulation"] = job.accumulation
    data["methods"]["molf-e"]["r"], data["methods"]["molf"]["r"] = [2, 4], [4]
    block = data["methods"][job.method]
    if "lora_dropout" in block:
        block["lora_dropout"] = job.dropout
    params = check_params(data, "test")
    config = {"method": block, "training": data["training"]}
    checkpoints = Checkpoints(job.checkpoints, identity(config, "data", "model", "code", {}, autocast=False), keep=1)
    keeper = Keeper(checkpoints, job.every, None, job.hardware)
    with keeper.explaining():
        return train(
            job.base,
            frame().assign(example_id=[f"row-{i}" for i in range(24)]),
            params.methods[job.method],
            params.training,
            3,
            job.weights,
            job.folder / "scratch",
            listener or Ear(job.folder / "heard"),
            keeper,
        )


def child(job: Job) -> None:
    """`run` in a process of its own, its results in files."""
    os.chdir(job.folder)
    if job.slow:
        sync = checkpoint._sync

        def slowly(descriptor: int) -> None:
            sync(descriptor)
            time.sleep(0.02)

        checkpoint._sync = slowly
    try:
        outcome = run(job)
    except Interrupted as stop:
        (job.folder / "said").write_text(str(stop))
        raise SystemExit(1) from None
    outcome.history.to_parquet(job.folder / "history.parquet")
    if outcome.routing is not None:
        outcome.routing.to_parquet(job.folder / "routing.parquet")
    (job.folder / "summary.json").write_text(json.dumps(outcome.summary))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Job], BaseProcess]]:
    """Starts `child` in a new process, forked off a server that has imported everything and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    started: list[BaseProcess] = []

    def begin(job: Job) -> BaseProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=child, args=(job,))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def until(condition: Callable[[], bool], process: BaseProcess) -> bool:
    """Waits for a condition; False if the process ended before."""
    while not condition():
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    return True


def whole(job: Job, start: Callable[[Job], BaseProcess]) -> None:
    process = start(job)
    process.join()
    assert process.exitcode == 0


CASES: dict[str, dict[str, Any]] = {
    "fft": {"method": "fft", "accumulation": 2},
    "lora": {"method": "lora", "dropout": 0.1},
    "molf": {"method": "molf"},
    "molf dense": {"method": "molf", "dropout": 0.2, "accumulation": 2},
    "molf-e": {"method": "molf-e", "dropout": 0.1},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_a_training_killed_at_any_moment_ends_as_if_it_had_not_been(
    case: str, base: Path, tmp_path: Path, start: Callable[[Job], BaseProcess]
) -> None:
    once, often = (Job(base, tmp_path / name, **CASES[case]) for name in ("once", "often"))
    whole(once, start)
    draw = random.Random(case)
    torn = False
    for kill in range(KILLS):
        # Some steps and a moment after the start, at least one checkpoint later; or in the middle of one's write.
        made = len(often.heard) + draw.randrange(4, 9)
        process = start(replace(often, slow=bool(kill % 2)))
        if kill % 2:
            alive = until(lambda: bool(list(often.checkpoints.glob(".step-*.tmp"))), process)
        else:
            alive = until(lambda made=made: len(often.heard) >= made, process)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.02))
        assert alive, f"the training ended before kill {kill}"
        process.kill()
        process.join()
        torn |= bool(list(often.checkpoints.glob(".step-*.tmp")))
    assert torn, "no write was torn"
    whole(often, start)
    assert folder_hash(often.weights) == folder_hash(once.weights)
    first, second = (pd.read_parquet(job.folder / "history.parquet") for job in (once, often))
    pd.testing.assert_frame_equal(first.drop(columns=WALL), second.drop(columns=WALL))
    assert second["seconds"].is_monotonic_increasing
    if CASES[case]["method"].startswith("molf"):
        routes = [pd.read_parquet(job.folder / "routing.parquet") for job in (once, often)]
        pd.testing.assert_frame_equal(routes[0], routes[1])
    summaries = [json.loads((job.folder / "summary.json").read_text()) for job in (once, often)]
    assert summaries[0]["order_hash"] == summaries[1]["order_hash"]
    assert summaries[0]["final_loss"] == summaries[1]["final_loss"]
    assert summaries[0]["resumed_at_steps"] == []
    resumed = summaries[1]["resumed_at_steps"]
    assert resumed == sorted(resumed) and all(step % 3 == 0 for step in resumed)
    # A step that was done before the checkpoint is not done again.
    assert max(often.heard) == 30 and len(resumed) >= 2
    assert not list((often.folder / "scratch").rglob("*.pt")) and not list(often.folder.rglob("*.pth"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    number: int, base: Path, tmp_path: Path, start: Callable[[Job], BaseProcess]
) -> None:
    job = Job(base, tmp_path / "cell", "molf", every=None, steps=60)
    process = start(job)
    assert until(lambda: len(job.heard) >= 5, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1
    [step] = [int(path.name.removeprefix("step-")) for path in job.checkpoints.glob("step-*")]
    said = (job.folder / "said").read_text()
    assert said.startswith(f"after step {step} of 60; `dvc repro` or `molf run` goes on from {job.checkpoints}")
    assert 5 <= step == job.heard[-1] < 60
    whole(job, start)
    assert json.loads((job.folder / "summary.json").read_text())["resumed_at_steps"] == [step]
    once = Job(base, tmp_path / "once", "molf", every=None, steps=60)
    whole(once, start)
    assert folder_hash(once.weights) == folder_hash(job.weights)


def twice() -> None:
    """Asks itself to stop two times."""
    with Wish() as wish:
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.made
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(0)  # never reached


def test_a_second_ctrl_c_ends_at_once() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=twice)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGINT


def test_signals_are_as_before_after_a_training() -> None:
    before = [signal.getsignal(number) for number in Wish.SIGNALS]
    with Wish() as wish:
        assert [signal.getsignal(number) for number in Wish.SIGNALS] != before
    assert [signal.getsignal(number) for number in Wish.SIGNALS] == before and not wish.made


def failing(calls: int, fail: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`completion_loss`, but for the call of that number."""
    made = []

    def loss(*arguments: Any) -> torch.Tensor:
        made.append(1)
        value = completion_loss(*arguments)
        return fail(value) if len(made) == calls else value

    return loss


def no_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
    return loss


class Stopper:
    """A listener that presses Ctrl-C once it hears of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, rows: list[dict[str, float]]) -> None:
        if rows[-1]["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("heard", [9, 10])
def test_a_training_stopped_in_its_last_step_has_nothing_left_to_do(heard: int, base: Path, tmp_path: Path) -> None:
    """During the last step, and after it."""
    job, once = (Job(base, tmp_path / name, "molf", every=None, steps=10) for name in ("cell", "once"))
    for folder in (job.folder, once.folder):
        folder.mkdir()
    with pytest.raises(Interrupted, match="after step 10 of 10"):
        run(job, Stopper(heard))
    assert not job.weights.exists()
    stopped, whole = run(job), run(once)
    assert job.heard == []
    pd.testing.assert_frame_equal(stopped.history.drop(columns=WALL), whole.history.drop(columns=WALL))
    assert stopped.routing is not None and whole.routing is not None
    pd.testing.assert_frame_equal(stopped.routing, whole.routing)
    assert stopped.summary["order_hash"] == whole.summary["order_hash"]
    assert folder_hash(job.weights) == folder_hash(once.weights)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to SIGINT, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("every", "begin"), [(4, "from {}/step-00000008"), (None, "from the start, since there is no")]
)
def test_ctrl_c_after_the_last_step_says_how_to_go_on(
    every: int | None, begin: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(base, tmp_path / "cell", "lora", every=every, steps=10)
    job.folder.mkdir()

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("molf.methods.lora.save", stop)
        with pytest.raises(Interrupted, match="^after step 10 of 10; .* goes on " + begin.format(job.checkpoints)):
            run(job)
    assert run(job).summary["resumed_at_steps"] == ([8] if every else [])


def test_every_machine_that_a_training_ran_on_is_kept(base: Path, tmp_path: Path) -> None:
    job = Job(base, tmp_path / "cell", "lora", every=None, steps=9)
    job.folder.mkdir()
    for number, hardware in enumerate("aab", start=1):
        with pytest.raises(Interrupted):
            run(replace(job, hardware=hardware), Stopper(2 * number))
        [state] = job.checkpoints.glob("step-*/state.json")
        assert json.loads(state.read_text())["hardware"] == sorted(set("aab"[:number]))
    [warning] = run(job).summary["warnings"]
    assert warning.startswith("time and memory are of 2 machines")
    once = replace(job, folder=tmp_path / "once")
    once.folder.mkdir()
    assert run(once).summary["warnings"] == []


def test_the_energy_of_a_resumed_training_is_that_of_all_its_stretches(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of one kilowatt: its joules are the training's milliseconds, those of checkpoints' writing left out."""
    counter = meter.Counter(lambda: int(1e6 * time.monotonic()), 1e-3)
    monkeypatch.setattr(meter, "here", lambda: meter.Meter(meter.Device([counter], "a kilowatt")))
    job = Job(base, tmp_path / "cell", "lora", steps=12)
    job.folder.mkdir()
    with pytest.raises(Interrupted):
        run(job, Stopper(5))
    time.sleep(1)
    summary = run(job).summary
    assert summary["energy_joules"] == pytest.approx(1000 * summary["train_seconds"], rel=0.3, abs=100)
    assert summary["energy_source"] == "a kilowatt"
    assert summary["other_load"] is None or summary["other_load"] >= 0
    assert summary["contended"] in (True, False, None)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_of_no_number_is_not_made_and_names_its_rows(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 11 of 2 micro-batches of 4 rows: the fourth of the 24 rows' fourth epoch, its rows 16 to 23."""
    job = Job(base, tmp_path / "cell", "fft", accumulation=2, steps=14)
    fail = no_gradient if kind == "gradient" else lambda loss: loss * float("nan")
    monkeypatch.setattr("molf.training.completion_loss", failing(22, fail))
    job.folder.mkdir()
    with pytest.raises(RunError) as caught:
        run(job)
    said = str(caught.value)
    numbers = (
        r"step 11: loss nan, gradient norm nan" if kind == "loss" else r"step 11: loss \d\.\d+, gradient norm (nan|inf)"
    )
    assert re.match(numbers, said)
    rows = [f"row-{index}" for index in SeededOrder(24, 3).indices(3)[8:16]]
    assert f"Its rows: {', '.join(rows[4:] if kind == 'loss' else rows)}. " in said
    assert job.heard == list(range(1, 11))
    assert [path.name for path in job.checkpoints.iterdir()] == ["step-00000009"]
    monkeypatch.undo()
    outcome = run(job)
    assert outcome.summary["resumed_at_steps"] == [9]
    once = Job(base, tmp_path / "once", "fft", accumulation=2, steps=14)
    once.folder.mkdir()
    run(once)
    assert folder_hash(once.weights) == folder_hash(job.weights)


def test_a_full_disk_costs_a_checkpoint_and_no_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(base, tmp_path / "cell", "molf-e", every=4, steps=10)
    job.folder.mkdir()
    sync = checkpoint._sync

    def full(descriptor: int) -> None:
        if list(job.checkpoints.glob(".step-00000008.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(checkpoint, "_sync", full)
    outcome = run(job)
    assert len(outcome.history) == 10
    said = capsys.readouterr().err
    assert "warning: no checkpoint of step 8 could be written ([Errno 28] No space left on device)" in said
    assert f"the last good one is {job.checkpoints / 'step-00000004'}" in said
    assert [path.name for path in job.checkpoints.iterdir()] == ["step-00000004"]


def test_what_does_not_determine_a_training_is_not_in_its_identity() -> None:
    budget = {"epochs": 1, "threads": 2, "processes": 2, "sharding": "ddp", "keep": "all"}
    rest: tuple[Any, ...] = ("d", "m", "c", {"torch": "2"}, False)
    one = identity({"method": {}, "training": budget, "seed": 0}, *rest)
    changed = budget | {"threads": 1, "processes": 1, "sharding": "fsdp", "keep": "none"}
    assert one == identity({"method": {}, "training": changed, "seed": 0}, *rest)
    assert one["training"] == {"epochs": 1}
    assert identity({"method": {}, "training": {"epochs": 2}}, *rest)["training"] == {"epochs": 2}


def test_a_training_begun_in_bfloat16_on_a_gpu_does_not_go_on_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def store(dtype: str, cuda: bool) -> Checkpoints:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        computes = autocast(dtype)
        monkeypatch.undo()
        config = {"training": {"dtype": dtype}}
        return Checkpoints(tmp_path / dtype, identity(config, "d", "m", "c", {}, computes), keep=1)

    for dtype in ("auto", "float32"):
        store(dtype, cuda=True).save(1, {}, {}, {}, {})
        found = store(dtype, cuda=False).latest()
        assert (found is None) == (dtype == "auto")
    assert "another training (autocast: True there, False here)" in capsys.readouterr().err


def test_torchao_is_a_version_of_8_bit_trainings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name == "torchao" and name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed.get(name, "1")

    monkeypatch.setattr(metadata, "version", version)
    plain, eight = machine.versions(), machine.versions("8bit")
    assert "torchao" not in plain and eight == plain | {"torchao": None}
    installed["torchao"] = "0.18"
    assert machine.versions() == plain and machine.versions("8bit") == plain | {"torchao": "0.18"}
    installed["bitsandbytes"] = "0.50"
    assert machine.versions() == plain and machine.versions(base_bits=4) == plain | {"bitsandbytes": "0.50"}


def test_plain_data_and_tensors_come_back_as_they_were() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {
        "state": {0: {"step": 3, "m": torch.ones(2)}, 10: {"m": torch.zeros(1)}},
        "betas": (0.9, 0.999),
        "x": [None],
    }
    plain = json.loads(json.dumps(split(value, "o", tensors)))
    assert sorted(tensors) == ["o.state.0.m", "o.state.10.m"]
    back = join(plain, tensors.__getitem__)
    assert back["betas"] == (0.9, 0.999) and back["x"] == [None] and list(back["state"]) == [0, 10]
    assert back["state"][0]["step"] == 3 and torch.equal(back["state"][0]["m"], torch.ones(2))
    with pytest.raises(TypeError, match=r"o\.state\.1 is a set"):
        split({"state": [0, {1}]}, "o", {})


def test_random_numbers_go_on() -> None:
    state = random_state()
    draws = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)]
    restore_random_state(state)
    assert [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)] == draws


def test_8_bit_moments_go_on(tmp_path: Path) -> None:
    pytest.importorskip("torchao")

    def steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor, first: int, last: int) -> None:
        for step in range(first, last):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()

    def make(start: torch.Tensor) -> tuple[AdamW, torch.Tensor]:
        weight = torch.nn.Parameter(start.clone())
        return AdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.1}], moments="8bit"), weight

    start = torch.randn(64, 128).bfloat16()
    optimizer, weight = make(start)
    steps(optimizer, weight, 0, 3)
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(split(optimizer.state_dict(), "optimizer", tensors)))
    assert tensors["optimizer.state.0.exp_avg"].dtype == torch.uint8
    checkpoint.write_tensors(tmp_path / "x", {name: part(tensor) for name, tensor in tensors.items()})
    files = checkpoint.TensorFiles([tmp_path / "x"])
    again, resumed = make(weight.detach())
    again.load_state_dict(join(plain, lambda name: optimizer_tensor(again, files, name)))
    steps(optimizer, weight, 3, 5)
    steps(again, resumed, 3, 5)
    assert torch.equal(weight, resumed)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_dvc_repro_goes_on_after_kill_and_after_ctrl_c(project: Project) -> None:
    """`kill -9` of all of `dvc repro`, and Ctrl-C in its terminal, which reaches DVC and the stage alike."""
    project.edit(
        {
            "grid.methods": ["molf"],
            "training.keep": "none",
            "tasks.fact.training": {"epochs": 40},
            "checkpoint": {"minutes": None, "steps": 10, "keep": 1},
        }
    )
    stage, cell = "train@tiny-fact-molf-0", "tiny/fact/molf/seed-0"
    weights, results = project.root / "weights" / cell, project.root / "results" / cell / "train"
    folder = project.root / ".molf/checkpoints" / cell
    project.run("dvc", "repro", stage, "general")
    expected = folder_hash(weights)
    history = pd.read_parquet(results / "history.parquet").drop(columns=WALL)
    routing = pd.read_parquet(results / "routing.parquet")
    # It stays until the evaluation, since DVC may be killed before it has the training's outputs.
    assert [path.name for path in folder.iterdir()] == ["step-00000110"]
    shutil.rmtree(folder)
    # Forced and without DVC's run cache, which would bring back what was just made.
    again = ["dvc", "repro", "--force", "--no-run-cache", "--single-item", stage]

    def begin() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            again,
            cwd=project.root,
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        before = {path.name for path in folder.glob("step-*")}
        while not {path.name for path in folder.glob("step-*")} - before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        return process

    killed = begin()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    stopped = begin()
    os.killpg(stopped.pid, signal.SIGINT)
    said = stopped.communicate()[0]
    assert stopped.returncode != 0
    assert "resumed after step" in said
    assert "interrupted: after step" in said and "`dvc repro` or `molf run` goes on from .molf/checkpoints" in said
    assert "Traceback" not in said
    said = project.run(*again)
    assert "resumed after step" in said
    assert folder_hash(weights) == expected
    pd.testing.assert_frame_equal(pd.read_parquet(results / "history.parquet").drop(columns=WALL), history)
    pd.testing.assert_frame_equal(pd.read_parquet(results / "routing.parquet"), routing)
    summary = json.loads((results / "summary.json").read_text())
    assert len(summary["resumed_at_steps"]) == 2
    runs = project.run("python", "-c", RUNS)
    assert runs.split() == ["FINISHED"], runs
    # An evaluation may be killed when it has written all and before DVC has it; then it is made once more.
    scratch = project.root / ".molf/weights" / cell
    for _ in range(2):
        project.run("dvc", "repro", "--force", "--single-item", stage.replace("train", "evaluate"))
        assert folder.exists() and scratch.exists()
    project.run("dvc", "repro")
    assert not folder.exists() and not scratch.exists()


RUNS = """
import mlflow
mlflow.set_tracking_uri("sqlite:///mlflow.db")
found = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`molf.kind` = 'cell'", output_format="list")
print(*(run.info.status for run in found))
"""
