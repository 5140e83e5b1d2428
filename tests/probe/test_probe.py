"""`molf probe`: its table, its file, its heat map, and its forecasts held against a comparison."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molf import models
from molf.cli import run
from molf.paths import read_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained project's files, to be changed."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(models, "quiet", lambda: None)  # which is for good
    return tmp_path / "project"


def test_it_forecasts_and_is_held_against_what_was_measured(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "--batches", "5", "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "tiny/fact: gradients of 14 modules over 16 of 20 rows" in text
    assert "forecast: " in text and "halvings of the rows" in text and "next: make run" in text
    starts = {line.split(" ")[0] for line in text.splitlines()}
    assert {"layer", "0", "1", "type", "q_proj", "down_proj"} <= starts
    found = read_json(project / "reports/probe/tiny/fact.json")
    assert found["ranks"] == [2, 3, 5] and len(found["modules"]) == 14 and found["batches"] == 4
    for module in found["modules"]:
        assert 0 < module["energy"]["2"] < module["energy"]["3"] < module["energy"]["5"] <= 1
        assert 1 <= module["stable_rank"] <= min(module["shape"]) and 1 <= module["effective_rank"] <= 32
        assert 0 <= module["noise_share"] <= 1 and set(module["error"]) == {"2", "3", "5", "full"}
    for method, experts in (("molf", ["full", "lora_r3"]), ("molf-e", ["lora_r2", "lora_r5"])):
        choices = found["choices"][method]
        assert choices["experts"] == experts and choices["steps"] == 2 and len(choices["share_by_module"]) == 14
    assert {of["method"] for of in found["forecast"]["methods"]} == {"fft", "lora", "molf", "molf-e"}
    assert found["data_hash"] == read_json(project / "data/prepared/fact/summary.json")["data_hash"]
    assert (project / "reports/probe/tiny/fact.png").read_bytes().startswith(b"\x89PNG")

    assert run(["probe", "--check"]) == 0
    text = capsys.readouterr().out
    assert "reports: tiny/fact" in text and "of 1 forecasts hit" in text
    assert run(["probe", "--check", "reports", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["of"] == 1 and told["forecasts"][0]["methods"]
    assert run(["publish", "published"]) == 0
    assert (project / "published/probe/tiny/fact.json").is_file()
    assert run(["probe", "--check", "published"]) == 0


def test_the_probe_changes_neither_model_nor_routing_of_a_training(project: Path) -> None:
    """Its first steps are the training's own: the same winners as a cell's record has."""
    import pandas as pd

    assert run(["probe", "--steps", "3"]) == 0
    found = read_json(project / "reports/probe/tiny/fact.json")["choices"]["molf"]
    record = pd.read_parquet(project / "results/tiny/fact/molf/seed-0/train/routing.parquet")
    counted = record[record["counted"]]
    first = counted[counted["step"].isin(sorted(counted["step"].unique())[:3])]
    expected = first[first["expert"] == "full"].groupby("module")["won"].mean()
    assert {name: of["full"] for name, of in found["share_by_module"].items()} == pytest.approx(expected.to_dict())


def test_what_must_run_before_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "quiet", lambda: None)
    assert run(["probe", "--task", "sql"]) == 2
    assert "dvc repro base@tiny prepare@sql && molf probe" in capsys.readouterr().err
    assert run(["probe", "--task", "poems"]) == 2 and "the grid has sql, med, fact" in capsys.readouterr().err
    assert run(["probe", "--batches", "3"]) == 2 and "--batches 3: at least 4" in capsys.readouterr().err
    assert run(["probe", "--check"]) == 2 and "no forecast lies beside" in capsys.readouterr().err


def test_less_is_looked_at_when_less_is_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", "--every", "2", "--steps", "0", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {module["layer"] for module in found["modules"]} == {0} and found["choices"] == {}


def test_libraries_do_not_speak_between(project: Path) -> None:
    """A process of its own, since a library speaks when it is imported first."""
    words = "from molf.cli import run; raise SystemExit(run(['probe', '--every', '2', '--steps', '0']))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert "forecast: " in done.stdout and done.stderr == ""
