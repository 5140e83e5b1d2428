"""`molf estimate`: steps, shapes, times and the table of the grid's needs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from molf import forecast
from molf.cli import run
from molf.config import check_params, read_yaml
from molf.estimate import Shape
from molf.forecast import Forecast, Lengths, Need, Probe
from molf.paths import Cell

ROOT = Path(__file__).parents[1]
PARAMS = check_params(read_yaml(ROOT / "params.yaml"), "params.yaml")


def test_steps_shapes_and_times_follow_the_budget_and_the_lengths() -> None:
    training = PARAMS.training.model_copy(update={"batch_size": 4, "gradient_accumulation": 2, "epochs": 3})
    lengths = Lengths([10, 20, 30] * 7, [2, 5, 3] * 7)
    assert forecast.largest(training, lengths, 64) == Shape(4, 30, 6)
    assert forecast.largest(training, None, 64) == Shape(4, 256, 66)
    # 9 steps of 8 examples of 20 tokens each.
    assert forecast.duration(training, lengths, Probe(tokens_per_second=100, start=7)) == pytest.approx(
        7 + 9 * 160 / 100
    )


def test_what_does_not_fit_and_what_is_not_known_is_said() -> None:
    cells = [Cell("m", "t", method, 0) for method in ("fft", "lora")]
    needs = [Need(cells[0], process=int(9e9), kept=int(2e9), passing=int(5e9), seconds=90), Need(cells[1])]
    found = Forecast(needs, int(5e8), int(1e9), int(8e9), int(4e9), cuda=False, unknown=["lora: why"], run_first=["x"])
    text = forecast.table(found)
    assert "m/t/fft/seed-0 needs 9.00 GB of memory, 8.00 GB are free; lower training.batch_size" in text
    assert "the grid needs 8.00 GB of disk, 4.00 GB are free" in text
    assert "not known: lora: why" in text and "first: dvc repro x" in text
    assert forecast.totals(found) == {"memory": 9e9, "disk": 3e9, "passing": 5e9, "seconds": None}
    assert json.loads(json.dumps(forecast.plain(found)))["cells"][0]["seconds"] == 90


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
