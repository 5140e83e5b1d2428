"""Projects whose comparison has been written, once for all tests that only look at them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from molf.paths import read_json, write_json, write_parquet
from molf.stages import compare
from tests.report import fake
from tests.report.hostile import HOSTILE, spoil


def compared(root: Path) -> Path:
    """Runs the stage in a project, without tracking; returns the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("molf.tracking.log_comparison", lambda *_: None)
        compare.run()
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, compared. Only to be read."""
    root = tmp_path_factory.mktemp("made")
    fake.write_tree(root, fake.raw_params())
    return compared(root)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task whose every text that may come from data, models or machines is hostile, compared. Only to be read."""
    root = tmp_path_factory.mktemp("hostile")
    raw = fake.raw_params(("sql",))
    raw["tasks"]["sql"]["license"] = HOSTILE
    fake.write_tree(root, raw)
    for path in root.glob("results/*/*/*/*/train/run.json"):
        run = read_json(path)
        run["hardware"]["name"] = run["versions"][HOSTILE] = run["git_commit"] = run["model"]["name"] = HOSTILE
        run["data"] = {**spoil(run["data"]), "noticed": spoil(run["data"]["reasons"])}
        write_json(path, run)
    for path in root.glob("results/*/*/*/*/train/summary.json"):
        write_json(path, {**read_json(path), "warnings": [HOSTILE], "energy_source": HOSTILE})
    for path in root.glob("results/*/*/*/*/train/routing.parquet"):
        spoil_columns(path, ("module",), lambda text: text.replace("up_proj", f"up_{HOSTILE.replace('.', '')}"))
    for path in root.glob("results/*/*/*/*/evaluation/metrics.json"):
        metrics = read_json(path)
        metrics["left_out"], metrics["metrics"][HOSTILE] = {HOSTILE: 1}, 1.0
        write_json(path, metrics)
    for path in root.glob("results/*/*/*/*/evaluation/predictions.parquet"):
        spoil_columns(path, ("example_id", "prompt", "gold", "prediction"), lambda text: f"{text} {HOSTILE}")
    for path in root.glob("results/*/*/*/*/evaluation/weights.parquet"):
        spoil_columns(path, ("type",), lambda text: text.replace("up_proj", f"up_{HOSTILE}"))
    return compared(root)


def spoil_columns(path: Path, columns: tuple[str, ...], spoiled: Callable[[str], str]) -> None:
    """Rewrites a Parquet file with texts of some columns made hostile."""
    frame = pd.read_parquet(path)
    write_parquet(path, frame.assign(**{name: frame[name].astype(str).map(spoiled) for name in columns}))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A project with results that no test has compared yet; the stage draws nothing and logs nothing in it."""
    fake.write_tree(tmp_path, fake.raw_params())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("molf.tracking.log_comparison", lambda *_: None)
        patch.setattr("molf.report.figures.draw", lambda *_: [])
        yield tmp_path
