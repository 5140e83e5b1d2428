"""Several processes do what one does, and end together."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from molf import collective, machine, processes, sharding
from molf.batches import SeededOrder
from molf.config import Training, read_yaml
from molf.errors import RunError, UserError
from molf.estimate import Shape
from molf.models import INFO
from molf.paths import write_json, write_parquet
from molf.training import Outcome
from tests.cells import CELLS, params, run_cell
from tests.conftest import QUIET, ROOT, frame

# name of a cell, folder, budget of two processes
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (name, f"{name}-{way}", {"sharding": way})
        for name in CELLS
        for way in ("ddp", "fsdp")
        if way not in params(name).methods[CELLS[name][0]].unfit()
    ),
    ("molf-effective", "halved", {"sharding": "ddp", "batch_size": 8, "gradient_accumulation": 1}),
]


@pytest.fixture(scope="session")
def bases(base: Path, tied_base: Path) -> dict[str, str]:
    return {"base": str(base), "tied": str(tied_base)}


def whole(outcome: Outcome | None) -> Outcome:
    assert outcome is not None
    return outcome


@pytest.fixture(scope="session")
def alone(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """Every cell, trained by this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: (whole(run_cell(name, bases, folder / name)), folder / name / "weights") for name in CELLS}


@pytest.fixture(scope="session")
def together(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell, trained by two processes: from the start, from a checkpoint of one, and up to one of their own."""
    folder = tmp_path_factory.mktemp("together")
    cells: list[dict[str, Any]] = [{"name": name, "folder": own, "budget": budget} for name, own, budget in RUNS]
    assert run_cell("molf-effective", bases, folder / "first", folder / "by-one", stop=5) is None
    for way in ("ddp", "fsdp"):
        shutil.copytree(folder / "by-one", folder / f"by-one-{way}")
        cells.append({"name": "molf-effective", "folder": f"resumed-{way}", "budget": {"sharding": way}})
        cells[-1]["checkpoints"] = str(folder / f"by-one-{way}")
    for name in ("molf-effective", "lora"):
        cells.append({"name": name, "folder": f"stopped-{name}", "budget": {"sharding": "fsdp"}, "stop": 5})
        cells[-1]["checkpoints"] = str(folder / f"by-two-{name}")
    for cell in cells:
        cell["budget"]["processes"] = 2
    cells = [{"checkpoints": None, "stop": 0, **cell} for cell in cells]
    (folder / "cells.json").write_text(json.dumps({"bases": bases, "cells": cells}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        processes.launch("tests.group", ["cells", str(folder)], 2, threads=1)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("name", "own", "budget"), RUNS)
def test_two_processes_train_what_one_trains(
    name: str, own: str, budget: dict[str, Any], alone: dict[str, tuple[Outcome, Path]], together: Path
) -> None:
    outcome, folder = alone[name]
    summary = json.loads((together / own / "summary.json").read_text())
    assert (summary["processes"], summary["sharding"]) == (2, budget["sharding"])
    history = pd.read_parquet(together / own / "history.parquet")
    for column in ("step", "tokens", "learning_rate"):
        assert history[column].tolist() == outcome.history[column].tolist()
    for column in ("loss", "grad_norm"):
        assert history[column].tolist() == pytest.approx(outcome.history[column].tolist(), rel=1e-5)
    assert summary["order_hash"] == outcome.summary["order_hash"]
    assert summary["trained_parameters"] == outcome.summary["trained_parameters"]
    if outcome.routing is not None:
        routing = pd.read_parquet(together / own / "routing.parquet")
        assert routing["won"].tolist() == outcome.routing["won"].tolist()
        assert routing["score"].tolist() == pytest.approx(outcome.routing["score"].tolist(), rel=1e-3)
        counted = outcome.routing[outcome.routing["counted"]]
        assert set(counted.groupby("expert")["won"].any()) == {True}, "one expert won everything: nothing is shown"
    require_close(folder, together / own / "weights")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_go_on_from_the_checkpoint_of_one(
    way: str, alone: dict[str, tuple[Outcome, Path]], together: Path
) -> None:
    outcome, folder = alone["molf-effective"]
    own = together / f"resumed-{way}"
    summary = json.loads((own / "summary.json").read_text())
    assert (summary["resumed_at_steps"], summary["sharding"], summary["steps"]) == ([4], way, 9)
    assert outcome.routing is not None
    assert pd.read_parquet(own / "routing.parquet")["won"].tolist() == outcome.routing["won"].tolist()
    require_close(folder, own / "weights")


@pytest.mark.parametrize("name", ["molf-effective", "lora"])
def test_one_process_goes_on_from_the_shards_of_two(
    name: str, alone: dict[str, tuple[Outcome, Path]], together: Path, bases: dict[str, str], tmp_path: Path
) -> None:
    checkpoints = together / f"by-two-{name}"
    [shards] = checkpoints.glob("step-*")
    sizes = [(shards / f"rank-{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.6 * max(sizes), "one process wrote what both should"
    resumed = whole(run_cell(name, bases, tmp_path, checkpoints))
    outcome, folder = alone[name]
    assert resumed.summary["resumed_at_steps"] == [4]
    assert resumed.history["loss"].tolist() == pytest.approx(outcome.history["loss"].tolist(), rel=1e-5)
    if outcome.routing is not None and resumed.routing is not None:
        assert resumed.routing["won"].tolist() == outcome.routing["won"].tolist()
    require_close(folder, tmp_path / "weights")


def require_close(one: Path, two: Path) -> None:
    """Equal weights, within what float32 rounds."""
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-5, atol=2e-6)


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_what_processes_tell_each_other_is_plain_data_and_stays_on_this_machine(tmp_path: Path, path: None) -> None:
    processes.launch("tests.group", ["talk", str(tmp_path)], 2, threads=1)
    for rank in (0, 1):
        everyones, empty, first = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert [value["text"] for value in everyones] == ["", "äää"]
        assert [(value["rank"], value["pair"]) for value in everyones] == [(0, [1, None]), (1, [1, None])]
        assert all(math.isnan(value["nan"]) for value in everyones)
        assert (empty, first) == ([[], []], {"path": "x", "rank": 0})
        if sys.platform == "linux":
            addresses = json.loads((tmp_path / f"open-{rank}.json").read_text())
            assert addresses and set(addresses) == {"0100007F"}  # 127.0.0.1


def test_one_process_is_told_what_several_would_be() -> None:
    assert collective.gathered({"pair": (1, 2)}) == [{"pair": [1, 2]}]
    assert collective.agreed(lambda: (1, None)) == [1, None]
    for exchange in (collective.gathered, lambda value: collective.agreed(lambda: value)):
        with pytest.raises(TypeError, match="not JSON serializable"):
            exchange(Path("x"))


def test_no_source_unpickles() -> None:
    """torch's exchange of objects unpickles what arrives on a socket."""
    words = re.compile(r"\w+_object(_list)?\(|torch\.load\(|\bpickle\.|import pickle")
    for path in (ROOT / "src").rglob("*.py"):
        assert not words.search(path.read_text()), path


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("user", UserError, "^first problem\nsecond problem$"),
        ("run", RunError, "^the loss is no number$"),
        ("defect", RunError, r"process 1:\nTraceback [\s\S]*ValueError: a defect of ours$"),
        ("aborted-run", RunError, "^the loss is no number$"),
        (
            "aborted-defect",
            RunError,
            r"^process 0 of 2 was ended by SIGABRT\nprocess 1:\n[\s\S]*ValueError: a defect of ours$",
        ),
        ("killed", RunError, "process 1 of 2 was ended by SIGKILL, maybe for want of memory"),
    ],
)
def test_a_failure_of_one_ends_all_with_its_own_message(
    case: str, error: type[Exception], message: str, tmp_path: Path, path: None
) -> None:
    with pytest.raises(error, match=message):
        processes.launch("tests.group", [case, str(tmp_path)], 2, threads=1)


def test_a_loss_of_no_number_in_one_process_stops_all_and_names_its_rows(
    bases: dict[str, str], tmp_path: Path, path: None
) -> None:
    cell = {"name": "fft", "folder": "cell", "checkpoints": None, "stop": 0}
    cells = [cell | {"budget": {"processes": 2, "sharding": "ddp"}}]
    (tmp_path / "cells.json").write_text(json.dumps({"bases": bases, "cells": cells}))
    # Steps of eight rows, of which the second process has the last four.
    rows = ", ".join(map(str, SeededOrder(18, seed=3).indices(0)[12:16]))
    with pytest.raises(
        RunError, match=f"^step 2: loss nan, gradient norm nan; the step was not made. Its rows: {rows}. "
    ):
        processes.launch("tests.group", ["nan", str(tmp_path)], 2, threads=1)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_all_end_with_the_process_that_started_them(ending: signal.Signals, tmp_path: Path, path: None) -> None:
    parent = subprocess.Popen([sys.executable, "-m", "tests.group", "wait", str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2 or not all(file.read_text() for file in tmp_path.glob("*.pid")):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(ending)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode == (-ending if ending == signal.SIGKILL else 1)
    assert ending == signal.SIGKILL or said.decode().splitlines()[-1].startswith("interrupted")
    while any(alive(int(file.read_text())) for file in tmp_path.glob("*.pid")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_there_must_be_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="training.processes: 2, but there are 1 GPUs here"):
        processes.launch("tests.group", [], 2, threads=1)


def test_auto_shards_where_a_process_cannot_hold_the_cell(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = params("molf-dense", processes=2, sharding="auto")

    def choice(memory: int, **changes: Any) -> str | None:
        monkeypatch.setattr(sharding, "memory_of", lambda processes: memory)
        training = Training.model_validate(chosen.training.model_dump() | changes)
        return sharding.choose(base, chosen.methods["molf"], training, Shape(4, 32, 8))

    assert (choice(10**12), choice(10**6)) == ("ddp", "fsdp")
    assert choice(10**6, moments="8bit") == "ddp"
    assert choice(10**12, sharding="fsdp") == "fsdp"
    assert choice(10**6, processes=1) is None


def test_autocast_alone_decides_the_precision_of_shards_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of FSDP's own would make norms and embeddings bfloat16, which they are not under DDP."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sharding.plugin().mixed_precision_policy is None


def test_processes_share_this_machines_memory() -> None:
    one, four = sharding.memory_of(1), sharding.memory_of(4)
    assert one > 10**8
    assert four == (one if torch.cuda.is_available() else one // 4)


def test_the_stage_trains_with_two_processes_stops_and_goes_on(tied_base: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, tied_base)
    said = stage.run(1, interrupt=True, max_length=32, epochs=20)
    assert re.search(r"interrupted: after step \d+ of 60; .* goes on from ", said)
    assert "Traceback" not in said
    said = stage.run(0, max_length=32, epochs=20, sharding="fsdp", threads=2)
    train = tmp_path / "results/tiny/fact/molf/seed-0/train"
    summary, run = (json.loads((train / name).read_text()) for name in ("summary.json", "run.json"))
    assert (summary["processes"], summary["sharding"], summary["steps"]) == (2, "fsdp", 60)
    assert f"resumed after step {summary['resumed_at_steps'][0]} " in said
    assert (run["hardware"]["threads"], run["hardware"]["processes"]) == (2, 2)
    # It began with one thread in each, so that its cost is neither's.
    assert run["hardware"]["fingerprint"] not in {machine.hardware(n, 2)["fingerprint"] for n in (1, 2)}
    assert any(warning.startswith("time and memory are of 2 machines") for warning in summary["warnings"])
    assert summary["peak_memory_bytes"] < summary["peak_memory_bytes_of_all"] <= 2 * summary["peak_memory_bytes"]
    assert weights(tmp_path / "weights/tiny/fact/molf/seed-0")


class Stage:
    """A folder with what the train stage needs, and no more."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        shutil.copytree(model, root / "models/tiny")
        write_json(root / "models/tiny" / INFO, {"name": "tiny", "kind": "tiny", "generated": True})
        rows = frame(24)
        rows["example_id"] = [f"row {i}" for i in range(24)]
        write_parquet(root / "data/prepared/fact/train.parquet", rows)
        write_json(root / "data/prepared/fact/summary.json", {"data_hash": "x", "generated": True, "source": "here"})

    def ask(self, steps: int | None, **budget: Any) -> None:
        """Writes params.yaml, with a checkpoint every so many steps."""
        data = read_yaml(ROOT / "params.yaml")
        data["training"] |= {"processes": 2, "threads": 1, "epochs": 1, "sharding": "ddp"} | budget
        data["checkpoint"]["steps"] = steps
        data["tasks"]["fact"]["training"] = {}
        data["methods"]["molf"]["r"] = [4]
        (self.root / "params.yaml").write_text(json.dumps(data))

    def run(self, code: int, interrupt: bool = False, **budget: Any) -> str:
        """Runs the stage with two processes, and returns what it said.

        Args:
            code: The exit code that it must have.
            interrupt: Whether it gets a SIGINT once it wrote a checkpoint.
            budget: Changes of `training`.
        """
        self.ask(1 if interrupt else None, **budget)
        stage = subprocess.Popen(
            [sys.executable, "-m", "molf.stages.train", "tiny", "fact", "molf", "0"],
            cwd=self.root,
            env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while interrupt and stage.poll() is None:
            if list(self.root.glob(".molf/checkpoints/**/step-*/state.json")):
                stage.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        said, _ = stage.communicate()
        assert stage.returncode == code, said
        return said
