"""`molf estimate`: steps, shapes, times and the table of the grid's needs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import estimate, forecast, sharding
from molf.cli import run
from molf.config import Params, check_params, read_yaml
from molf.estimate import Memory, Shape
from molf.forecast import Forecast, Lengths, Need, StepTime
from molf.paths import CHECKPOINTS, Cell

ROOT = Path(__file__).parents[1]
PARAMS = check_params(read_yaml(ROOT / "params.yaml"), "params.yaml")
MEMORY = Memory(
    {
        "loading": {"weights": 4000},
        "forward and backward": {"weights": 4000, "AdamW moments": 8000, "gradients": 4000, "activations": 2000},
        "optimizer step": {"weights": 4000, "AdamW moments": 8000, "gradients": 4000},
        "saving": {"weights": 4000, "AdamW moments": 8000, "file's content": 4000},
    },
    trained=1000,
    parameters=1000,
    saved=4000,
    checkpoint=12000,
    modules=28,
    largest_layer=1000,
)


def test_steps_shapes_and_times_follow_the_budget_and_the_lengths() -> None:
    training = PARAMS.training.model_copy(update={"batch_size": 4, "gradient_accumulation": 2, "epochs": 3})
    lengths = Lengths([10, 20, 30] * 7, [2, 5, 3] * 7)
    assert forecast.largest(training, lengths, 64) == Shape(4, 30, 6)
    assert forecast.largest(training, None, 64) == Shape(4, 256, 66)
    # 9 steps of 8 examples of 20 tokens each.
    assert forecast.duration(training, lengths, StepTime(tokens_per_second=100, start=7)) == pytest.approx(
        7 + 9 * 160 / 100
    )


@pytest.mark.parametrize(("share", "expected"), [(1.0, "fsdp"), (1.2, "ddp")])
def test_the_forecast_shards_a_cell_where_its_training_does(
    share: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training leaves a part of the memory free, and decides 8-bit moments by themselves."""
    whole = estimate.per_process(MEMORY, 2, "ddp")
    monkeypatch.setattr(sharding, "memory_of", lambda processes: int(share * whole))
    cell = Cell("tiny", "sql", "fft", 0)
    for moments, sharded in (("float32", expected), ("8bit", "ddp")):
        params = changed({"processes": 2, "sharding": "auto", "moments": moments})
        found = forecast.need(cell, params, MEMORY, None, imports=10)
        assert (found.sharding, found.processes) == (sharded, 2)
        assert found.process == 10 + estimate.per_process(MEMORY, 2, sharded)
    assert forecast.need(cell, PARAMS, MEMORY, None, imports=10).sharding is None


def test_the_routing_record_is_of_the_experts_that_there_are() -> None:
    params = changed({"keep": "none", "max_steps": 10})
    kept = {
        method: forecast.need(Cell("tiny", "sql", method, 0), params, MEMORY, None, imports=0).kept
        for method in params.grid.methods
    }
    # molf: the full weight and one LoRA expert; molf-e: two LoRA experts.
    assert kept == {"fft": 0, "lora": 0, **dict.fromkeys(("molf", "molf-e"), 10 * 28 * 2 * forecast.BYTES_PER_CHOICE)}


def changed(training: dict[str, Any]) -> Params:
    """params.yaml with other keys of `training`."""
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= training
    return check_params(data, "params.yaml")


def test_what_does_not_fit_and_what_is_not_known_is_said() -> None:
    cells = [Cell("m", "t", method, 0) for method in ("fft", "lora")]
    needs = [Need(cells[0], process=int(9e9), kept=int(2e9), passing=int(5e9), seconds=90), Need(cells[1])]
    found = Forecast(needs, int(5e8), int(1e9), int(8e9), int(4e9), cuda=False, unknown=["lora: why"], run_first=["x"])
    text = forecast.table(found)
    assert "m/t/fft/seed-0 needs 9.00 GB of memory, 8.00 GB are free; lower training.batch_size" in text
    assert "the grid has 7.00 GB to write at most, 4.00 GB of disk are free" in text  # the base is there
    assert "not known: lora: why" in text and "first: dvc repro x" in text
    assert forecast.totals(found) == {
        **{"memory": 9e9, "disk": 3e9, "passing": 5e9, "to_write": 7e9},
        **{"seconds": None, "sweep_seconds": 0},
    }
    assert json.loads(json.dumps(forecast.plain(found)))["cells"][0]["seconds"] == 90


def test_a_sweep_is_counted_once_for_all_seeds_of_a_method() -> None:
    cells = [Cell("m", "t", method, seed) for method in ("fft", "lora") for seed in (0, 1)]
    needs = [Need(cell, seconds=60, trial_seconds=30 if cell.method == "fft" else 50) for cell in cells]
    found = Forecast(needs, 0, 0, None, int(4e9), cuda=False, trials=6)
    assert forecast.totals(found)["sweep_seconds"] == 3 * (30 + 50) and forecast.totals(found)["seconds"] == 240
    assert "before them the sweeps of grid.tune: 6 trainings, 4 min" in forecast.table(found)
    assert forecast.plain(found)["trials"] == 6
    needs[2].trial_seconds = needs[3].trial_seconds = None  # of lora nothing is known
    assert "6 trainings, ?" in forecast.table(found)


def test_without_base_and_data_it_says_memory_and_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    assert run(["estimate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["cells"]) == 12 and all(cell["process_bytes"] > told["import_bytes"] for cell in told["cells"])
    assert told["run_first"] == ["base@tiny", "prepare@sql", "prepare@med", "prepare@fact"]
    assert run(["estimate", "--no-probe"]) == 0
    assert "next: dvc repro base@tiny prepare@sql prepare@med prepare@fact && molf estimate" in capsys.readouterr().out
    assert run(["estimate", "--probe", "0"]) == 2


def test_what_lies_on_the_disk_already_is_not_to_be_written_again() -> None:
    cells = [Cell("m", "t", method, 0) for method in ("fft", "lora")]
    needs = [Need(cell, kept=int(4e9), passing=int(12e9), there=int(4e9), passing_there=int(9e9)) for cell in cells]
    found = Forecast(needs, 0, int(1e9), None, int(4e9), cuda=False)
    assert forecast.totals(found)["to_write"] == 3e9 and forecast.misfits(found) == []
    needs[1].there = 0  # now this one's 4 GB are to be written too
    assert ["has 7.00 GB to write" in text for text in forecast.misfits(found)] == [True]


def test_the_forecast_looks_at_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = PARAMS.cells()[0]
    for folder, size in ((cell.weights, 5), (cell.results / "train", 3), (CHECKPOINTS / cell.name / "step-1", 7)):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * size)
    first, second, *_ = forecast.forecast(PARAMS, None).needs
    assert (first.cell, first.there, first.passing_there) == (cell, 8, 7)
    assert (second.there, second.passing_there) == (0, 0)


def test_a_task_that_trains_in_another_precision_needs_another_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_yaml(ROOT / "params.yaml")
    data["grid"] |= {"tasks": ["med", "fact"], "methods": ["fft"], "seeds": [0]}
    data["tasks"]["med"]["training"] = {"max_length": 64}
    data["tasks"]["fact"]["training"] = {"max_length": 64, "dtype": "bfloat16"}
    data["evaluation"]["max_new_tokens"] |= {"med": 4, "fact": 4}
    monkeypatch.chdir(tmp_path)
    whole, half = forecast.forecast(check_params(data, "params.yaml"), None).needs
    assert whole.memory is not None and half.memory is not None
    assert half.memory.parts["weights"] < 0.51 * whole.memory.parts["weights"]
    assert half.memory.saved < 0.51 * whole.memory.saved


def test_lengths_are_none_until_base_and_data_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert forecast.task_lengths("m", "t", 32) is None
    from molf import tiny

    tokenizer = tiny.train_tokenizer(["a"], 300)
    tokenizer.save_pretrained("models/m")
    tiny.architecture(1, 32, 2, 300).save_pretrained("models/m")
    Path("data/prepared/t").mkdir(parents=True)
    rows = {"example_id": ["0", "1"], "prompt": ["abc", "a" * 40], "completion": ["de", "f"]}
    pd.DataFrame(rows).to_parquet("data/prepared/t/train.parquet")
    assert forecast.task_lengths("m", "t", 32) == Lengths([1 + 3 + 2 + 1], [3])
