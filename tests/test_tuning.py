"""Sweeps: how rates are chosen, from what, and that neither a trial nor the choice sees a test row."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch.distributed import HashStore

from molf import processes, tracking, training, tuning
from molf.cli import run
from molf.config import Params, cell_config, check_params, chosen_factor, load_params, read_yaml
from molf.errors import Diverged, UserError
from molf.paths import CHECKPOINTS, RATES, Cell, Trial, read_json, write_json
from molf.stages import sweep as sweep_stage
from tests.conftest import ROOT
from tests.report.fake import write_trial
from tests.trained import run_stage


def params(tune: list[float], **blocks: Any) -> Params:
    """params.yaml with a sweep of sql's methods fft and molf."""
    data = deepcopy(read_yaml(ROOT / "params.yaml"))
    data["grid"] |= {"tasks": ["sql"], "methods": ["fft", "molf"], "tune": tune}
    return check_params({**data, **blocks}, "params.yaml")


def tried(factor: float, score: float | None, loss: float | None = 1.0) -> dict[str, Any]:
    return {"factor": factor, "score": score, "loss": loss, "diverged": "step 3: loss nan" if score is None else None}


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "factor"),
    [
        ([tried(0.3, 0.5), tried(1.0, 0.7), tried(3.0, 0.6)], 1.0),
        ([tried(0.3, 0.7, 1.2), tried(1.0, 0.7, 1.1), tried(3.0, 0.6, 0.1)], 1.0),  # a tie: by the loss
        ([tried(0.3, 0.7), tried(1.0, 0.7)], 0.3),  # another: the smaller rate
        ([tried(0.3, 0.0), tried(1.0, None, None)], 0.3),  # what diverged is worse than any score
        ([tried(0.3, None, None)], None),
    ],
)
def test_the_highest_score_wins_then_the_lower_loss_then_the_smaller_rate(
    trials: list[dict[str, Any]], factor: float | None
) -> None:
    for order in (trials, trials[::-1]):
        found = tuning.best(order)
        assert (found["factor"] if found else None) == factor


def test_a_choice_at_an_end_of_the_factors_is_named() -> None:
    trials = [tried(0.3, 0.5), tried(1.0, 0.7), tried(3.0, None)]
    assert [tuning.edge(trials, trial) for trial in trials] == ["lowest", None, "highest"]
    said = tuning.remarks({"edge": "lowest", "chosen": 0.3, "trials": trials})
    assert "is the lowest of its sweep (factor 0.3 of 0.3, 1, 3)" in said[0] and "widen grid.tune" in said[0]
    assert said[1] == "its training diverged at factor 3 of its sweep"
    assert not tuning.remarks({"edge": None, "chosen": 1.0, "trials": trials[:2]})


# --- the choice in params and cells --------------------------------------------------------------------------------


def test_all_rates_of_a_block_move_together_and_nothing_else() -> None:
    block = params([]).methods["molf"]
    moved = block.at_factor(0.3)
    assert moved.learning_rates() == {"learning_rate": 6e-5, "lora_learning_rate": 1.5e-4}
    assert moved.at_factor(10).model_dump(exclude={*moved.learning_rates()}) == block.model_dump(
        exclude={*block.learning_rates()}
    )
    assert block.at_factor(1) == block


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ([1.0], "tune holds 1.0 alone, which leaves nothing to choose; write two factors or more"),
        ([0.3, 1.0, 0.3], "tune repeats 0.3"),
        ([1, 1.0], "tune repeats 1, 1.0"),  # two names of one number
        ([0.3, 0], "0 is no factor of a learning rate; allowed: numbers from 0.0001 to 10000"),
        ([0.3, -1.0], "-1.0 is no factor"),
        ([0.3, float("inf")], "inf is no factor"),
        ([0.3, "3"], "'3' is no factor"),
        ([0.3, True], "True is no factor"),
    ],
)
def test_factors_that_make_no_sweep_are_refused(tune: list[Any], said: str) -> None:
    with pytest.raises(UserError, match="grid") as caught:
        params(tune)
    assert said in str(caught.value)


def test_check_says_what_a_sweep_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = read_yaml(ROOT / "params.yaml")
    data["grid"]["tune"] = [0.3, 1]
    Path("params.yaml").write_text(json.dumps(data))
    assert run(["check"]) == 0
    assert "tune: 0.3, 1 times each rate, 24 trainings judged on validation rows" in capsys.readouterr().out


def test_a_params_file_of_an_earlier_molf_is_told_what_to_write() -> None:
    data = read_yaml(ROOT / "params.yaml")
    del data["grid"]["tune"]
    with pytest.raises(UserError) as caught:
        check_params(data, "params.yaml")
    assert caught.value.problems == ["params.yaml: grid.tune: missing; write tune: [] for no sweep of learning rates"]


def test_a_cells_config_has_the_chosen_rates(tmp_path: Path) -> None:
    given, cell = params([0.3, 3]), Cell("tiny", "sql", "molf", 5)
    with pytest.raises(UserError, match="dvc repro choose"):
        cell_config(given, cell, tmp_path)
    for trial in given.trials():
        write_trial(tmp_path, given, trial, score=trial.factor / 10)
    write_json(tmp_path / RATES, tuning.choose(given, tmp_path))
    assert chosen_factor(given, cell, tmp_path) == 3.0
    config = cell_config(given, cell, tmp_path)
    assert config["method"]["learning_rate"] == 6e-4 and config["method"]["lora_learning_rate"] == 1.5e-3
    assert config["seed"] == 5
    assert cell_config(params([]), cell, tmp_path)["method"]["learning_rate"] == 2e-4
    assert chosen_factor(given, Cell("tiny", "sql", "lora", 0), tmp_path) == 1.0  # outside the grid


def test_what_lacks_or_diverged_everywhere_leaves_its_own_method_without_rates(tmp_path: Path) -> None:
    given = params([0.3, 1.0])
    for trial in given.trials():
        write_trial(tmp_path, given, trial, score=None if trial.method == "fft" else 0.5)
    found = tuning.choose(given, tmp_path)
    assert found["chosen"] == {"tiny": {"sql": {"fft": None, "molf": 0.3}}}
    assert "at every factor it diverged, at 0.3 so: step 3: loss nan" in found["sweeps"][0]["why"]
    write_json(tmp_path / RATES, found)
    with pytest.raises(UserError, match="tiny/sql/fft: its sweep chose no learning rate: at every factor"):
        cell_config(given, Cell("tiny", "sql", "fft", 0), tmp_path)

    shutil.rmtree(tmp_path / Trial("tiny", "sql", "molf", 1.0).results)
    found = tuning.choose(given, tmp_path)
    assert found["chosen"]["tiny"]["sql"]["molf"] is None
    assert "1 of 2 trials are not there; `dvc repro sweep@tiny-sql-molf-1.0 choose`" in found["sweeps"][1]["why"]


def test_trials_of_other_params_are_not_chosen_from(tmp_path: Path) -> None:
    given = params([0.3, 1.0])
    for trial in given.trials():
        write_trial(tmp_path, given, trial, score=0.5)
    other = params([0.3, 1.0], training={**given.training.model_dump(), "batch_size": 4})
    assert tuning.choose(other, tmp_path)["chosen"] == {"tiny": {"sql": {"fft": None, "molf": None}}}


def test_without_factors_every_rate_stands_as_it_is(tmp_path: Path) -> None:
    found = tuning.choose(params([]), tmp_path)
    assert found == {"chosen": {"tiny": {"sql": {"fft": 1.0, "molf": 1.0}}}, "factors": [], "sweeps": []}


# --- the stages ----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained project with a sweep in its grid and no row of the test split in any file."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(tracking, "Store", None)  # a trial has no run in MLflow
    data = read_yaml(Path("params.yaml"))
    data["grid"] |= {"methods": ["lora"], "tune": [0.5, 2]}
    Path("params.yaml").write_text(json.dumps(data))
    Path("data/prepared/fact/test.parquet").write_bytes(b"poison")
    Path("data/prepared/fact/summary.json").unlink()
    return tmp_path / "project"


def test_a_trial_trains_and_scores_on_validation_rows_of_facts(project: Path) -> None:
    """Facts are trained and scored on the same ones, so a sweep takes none that a cell is scored on."""
    rows = pd.read_parquet("data/prepared/fact/validation.parquet")
    Path("data/prepared/fact/train.parquet").write_bytes(b"poison")
    run_stage("sweep", "tiny", "fact", "lora", "2")
    found = read_json(Path("sweeps/tiny/fact/lora/factor-2/trial.json"))
    assert found["n"] == found["examples"] == len(rows) and list(found["data"]) == ["validation.parquet"]
    assert found["config"]["method"]["learning_rate"] == 2e-3 and found["config"]["seed"] == 0
    assert 0 <= found["score"] <= 1 and found["loss"] > 0 and found["diverged"] is None
    history = pd.read_parquet("sweeps/tiny/fact/lora/factor-2/history.parquet")
    assert len(history) == found["steps"] and history["learning_rate"].max() <= 2e-3
    assert not list(Path(".molf").rglob("*.safetensors")), "weights of a trial stay"

    run_stage("sweep", "tiny", "fact", "lora", "0.5")
    run_stage("choose")
    chosen = read_json(RATES)["chosen"]["tiny"]["fact"]["lora"]
    assert chosen in (0.5, 2.0)
    config = cell_config(load_params(), Cell("tiny", "fact", "lora", 0))
    assert config["method"]["learning_rate"] == chosen * 1e-3


def test_a_trial_of_other_tasks_trains_on_the_train_rows(project: Path) -> None:
    given = load_params()
    assert given.trial_rows("fact") == "validation" and params([]).trial_rows("sql") == "train"


def test_a_trial_that_diverges_is_a_result(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise Diverged("step 2: loss nan")

    monkeypatch.setattr(training, "train", diverge)
    run_stage("sweep", "tiny", "fact", "lora", "2")
    found = read_json(Path("sweeps/tiny/fact/lora/factor-2/trial.json"))
    assert found["diverged"] == "step 2: loss nan" and found["score"] is None


def test_of_several_processes_the_divergence_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setattr(processes, "own_store", lambda: store)
    processes._leave_note(Diverged("step 2: loss nan"))
    with pytest.raises(Diverged, match="step 2: loss nan"):
        processes._raise_failure([], store, [])


def test_an_interrupted_trial_keeps_its_checkpoint_until_another_begins(project: Path) -> None:
    run_stage("sweep", "tiny", "fact", "lora", "2")
    kept = CHECKPOINTS / "sweeps/tiny/fact/lora/factor-2"
    kept.mkdir(parents=True, exist_ok=True)
    sweep_stage.remove_leftovers(but=Trial("tiny", "fact", "lora", 2))
    assert kept.is_dir()
    sweep_stage.remove_leftovers(but=Trial("tiny", "fact", "lora", 0.5))
    assert not kept.exists()


def test_a_trial_outside_the_grid_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match=r"factor 7: not in the grid, whose tune is \[0.5, 2\]"):
        sweep_stage.find(load_params(), ["tiny", "fact", "lora"], "7")
