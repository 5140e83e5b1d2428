"""The gate: what became of scores since a revision, and what cannot be told."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from molf import cli, gate
from molf.config import load_params
from molf.gate import Change, Scored, Version
from molf.paths import REPORTS, Cell, own_tools, read_json, write_json, write_parquet
from molf.report import comparison
from tests.conftest import QUIET
from tests.report import fake

EXAMPLES = 200


def version(name: str, hits: dict[int, np.ndarray], **changes: Any) -> Version:
    """A comparison of one method on one task, with each seed's right answers (0 and 1, NaN: left out)."""
    means = [float(np.nanmean(values)) for values in hits.values()]
    cells = {}
    for seed, values in hits.items():
        metrics = {"data_hash": "d", "evaluation": {"batch_size": 8}, "fingerprint": "e"}
        ids = [f"e{i}" for i in range(len(values))]
        predictions = pd.DataFrame({"example_id": ids, "execution_accuracy": values})
        cells[Cell("tiny", "sql", "fft", seed)] = Scored(metrics, predictions)
    mean = float(np.mean(means))
    method = {"method": "fft", "mean": mean, "low": mean - 0.06, "high": mean + 0.04, "train_seconds": 10.0}
    method |= {"peak_memory_bytes": 1e9, "per_seed": [{"seed": seed} for seed in hits]}
    group = {"model": "tiny", "task": "sql", "task_kind": "sql", "primary_name": "execution_accuracy"}
    made = {"hardware": {"fingerprint": "m"}, "config": {"seed": 0}, "model": {"hash": "b"}, "versions": {}}
    provenance = [{"cell": cell.name, **made, **changes} for cell in cells]
    groups = [{**group, "examples": EXAMPLES, "methods": [method]}]
    return Version(name, {"groups": groups, "cells": provenance}, cells)


def right(count: int, of: int = EXAMPLES) -> np.ndarray:
    return np.array([1.0] * count + [0.0] * (of - count))


def judged(then: Version, now: Version) -> dict[str, Any]:
    (row,) = gate.judge(then, now, confidence=0.95, resamples=400, seed=0)["rows"]
    return row


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (right(150), right(150), Change.SAME),
        (right(150), right(152), Change.NOISE),
        (right(150), right(120), Change.FELL),
        (right(120), right(150), Change.IMPROVED),
        # As many right, and not the same ones.
        (right(100), np.roll(right(100), 50), Change.NOISE),
    ],
)
def test_a_score_is_judged_on_the_same_examples(before: np.ndarray, now: np.ndarray, expected: Change) -> None:
    row = judged(version("a", {0: before}), version("b", {0: now}))
    assert row["change"] is expected and row["paired"] and row["interval"] == "examples only"
    assert row["difference"]["mean"] == pytest.approx(now.mean() - before.mean())
    assert (
        len(row["lost"]) == ((before == 1) & (now == 0)).sum() and len(row["won"]) == ((before == 0) & (now == 1)).sum()
    )
    result = gate.judge(version("a", {0: before}), version("b", {0: now}), 0.95, 400, 0)
    assert result["fell"] == (["tiny/sql/fft"] if expected is Change.FELL else [])


def test_only_seeds_of_both_are_paired() -> None:
    then = version("a", {0: right(150), 1: right(148), 2: right(151)})
    row = judged(then, version("b", {1: right(120), 2: right(121), 3: right(60), 4: right(60)}))
    assert row["seeds"] == [1, 2] and row["change"] is Change.FELL and row["interval"] == "exploratory"
    assert row["note"] == "on the seeds of both; then 0, 1, 2, now 1, 2, 3, 4"
    assert row["now"] == pytest.approx(120.5 / EXAMPLES)


def test_other_examples_are_compared_by_the_two_intervals() -> None:
    then, now = version("a", {0: right(150)}), version("b", {0: right(70, 100)})
    row = judged(then, now)
    assert not row["paired"] and row["interval"] == "unpaired" and "(other example ids)" in row["note"]
    # 0.70 - 0.75, the distances of bounds from means added in squares.
    assert row["difference"] == pytest.approx(
        {"mean": -0.05, "low": -0.05 - np.hypot(0.06, 0.04), "high": -0.05 + np.hypot(0.04, 0.06)}
    )
    assert row["change"] is Change.NOISE
    assert judged(then, version("b", {0: right(60, 100)}))["change"] is Change.FELL
    assert "(no seed is in both)" in judged(then, version("b", {1: right(150)}))["note"]
    changed = {cell: replace(one, metrics={**one.metrics, "data_hash": "x"}) for cell, one in then.cells.items()}
    assert "(the test rows changed)" in judged(replace(then, cells=changed), then)["note"]


def test_unpaired_scores_that_did_not_change_seldom_fall() -> None:
    rng = np.random.default_rng(0)
    fallen = 0
    for shares in rng.binomial(200, 0.7, size=(2000, 2)) / 200:
        half = 1.96 * np.sqrt(shares * (1 - shares) / 200)
        sides = [{"mean": mean, "low": mean - h, "high": mean + h} for mean, h in zip(shares, half, strict=True)]
        fallen += gate.unpaired(*sides)["change"] is Change.FELL
    assert 0.01 < fallen / 2000 < 0.04  # 0.025 in theory


def test_another_score_is_not_judged_and_what_else_changed_is_said() -> None:
    then = version("a", {0: right(150)}, config={"seed": 0, "r": 8}, code="x", versions={"torch": "2.1"})
    now = version("b", {0: right(120)}, config={"seed": 0, "r": 4}, code="y", versions={"torch": "2.2"})
    now.comparison["groups"][0]["methods"][0]["train_seconds"] = 15.0
    row = judged(then, now)
    assert row["changed"] == ["molf's code", "r was 8, is 4", "torch was 2.1, is 2.2"]
    text = gate.table({**gate.judge(then, now, 0.95, 400, 0), "notes": ["x\x1b[31m"]})
    for words in (
        "0.750 -> 0.600  -0.150 [",
        "]  fell",
        "30 right then are wrong now, 0 the reverse",
        "(+50%)",
        "\\x1b",
    ):
        assert words in text, text
    assert "not comparable" not in text
    elsewhere = version("c", {0: right(120)}, hardware={"fingerprint": "another"})
    elsewhere.comparison["groups"][0]["methods"][0]["train_seconds"] = 15.0
    assert "not comparable" in gate.table(gate.judge(then, elsewhere, 0.95, 400, 0))
    now.comparison["groups"][0]["primary_name"] = "accuracy"
    row = judged(then, now)
    assert row["change"] is Change.UNJUDGED and row["difference"] is None
    assert row["note"] == "the score was sql's execution_accuracy then"


# --- a project with git and DVC ---------------------------------------------------------------------------------------


class Folder:
    """A project whose results were compared, kept by DVC and committed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.raw = fake.raw_params(("sql",))
        fake.write_tree(root, self.raw)
        self.compare()
        stages = {
            "cells": {"cmd": "true", "outs": [str(path.relative_to(root)) for path in root.glob("results/*/*/*/*/*")]},
            "compare": {"cmd": "true", "metrics": ["reports/comparison.json"]},
        }
        (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
        self.sh("git init --quiet && git config user.name test && git config user.email test@localhost")
        self.sh("dvc init --quiet")
        self.commit()

    def sh(self, command: str) -> None:
        subprocess.run(
            command, shell=True, cwd=self.root, env={**own_tools(), **QUIET}, check=True, stdout=subprocess.DEVNULL
        )

    def compare(self) -> None:
        write_json(
            self.root / REPORTS / "comparison.json", comparison.build(load_params(self.root / "params.yaml"), self.root)
        )

    def commit(self) -> None:
        self.sh("dvc commit --quiet --force; git add --all; git commit --quiet --allow-empty -m version")

    def score(self, method: str, right: int) -> None:
        """Evaluates a method anew, with so many right answers."""
        folder = self.root / f"results/tiny/sql/{method}/seed-0/evaluation"
        predictions, metrics = pd.read_parquet(folder / "predictions.parquet"), read_json(folder / "metrics.json")
        hits = np.array([1.0] * right + [0.0] * (fake.EXAMPLES - right))
        hits[-1] = np.nan
        mean = float(np.nanmean(hits))
        write_parquet(folder / "predictions.parquet", predictions.assign(execution_accuracy=hits))
        metrics |= {"primary": mean, "metrics": {"execution_accuracy": mean}, "fingerprint": f"of-{right}"}
        write_json(folder / "metrics.json", metrics)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    made = Folder(tmp_path / "project")
    monkeypatch.chdir(made.root)
    return made


def test_the_gate_says_what_fell_since_a_revision(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, code: int) -> str:
        assert cli.run(["compare", *arguments]) == code
        return "".join(capsys.readouterr())

    out = said("--against", "HEAD", code=0)
    assert out.count("unchanged") == 5 and "which is exit code 0; 4 of 4 scores judged: 4 unchanged" in out

    folder.score("fft", 10)
    folder.score("lora", 21)
    folder.score("molf", 39)
    assert "is of another evaluation; `dvc repro compare` makes it anew" in said("--against", "HEAD", code=2)
    folder.compare()
    out = said("--against", "HEAD", code=1)
    assert "1 fell, 1 improved, 1 within noise, 1 unchanged" in out and "failed: tiny/sql/fft fell beyond" in out
    assert "20 right then are wrong now, 0 the reverse" in out

    # Methods of one side, and params that went on without the results.
    folder.raw["methods"]["lora"]["r"] = 4
    (folder.root / "params.yaml").write_text(json.dumps(folder.raw))
    shown = read_json(folder.root / REPORTS / "comparison.json")
    shown["groups"][0]["methods"][0]["method"] = "other"
    write_json(folder.root / REPORTS / "comparison.json", shown)
    result = json.loads(said("--against", "HEAD", "--json", code=0))
    assert (result["only_then"], result["only_now"]) == (["tiny/sql/fft"], ["tiny/sql/other"])
    assert "lora/seed-0 was trained with other params than params.yaml says: method.r was 8, is 4" in result["notes"][0]
    shown["groups"][0]["methods"] = shown["groups"][0]["methods"][:1]
    write_json(folder.root / REPORTS / "comparison.json", shown)
    assert "no model, task and method is both in HEAD" in said("--against", "HEAD", code=2)

    # What lies in no cache comes from the remote, or is said to lack.
    folder.sh("git checkout --quiet params.yaml && dvc checkout --quiet --force")
    folder.sh(f"dvc remote add --quiet --default team {tmp_path / 'remote'} && dvc push --quiet")
    shutil.rmtree(folder.root / ".dvc/cache")
    assert "4 unchanged" in said("--against", "HEAD", code=0)
    shutil.rmtree(folder.root / ".dvc/cache", ignore_errors=True)
    (tmp_path / "remote").rename(tmp_path / "away")
    (tmp_path / "remote").mkdir()
    out = said("--against", "HEAD", code=2)
    assert "`dvc push --all-commits`, then `dvc fetch --all-commits reports/comparison.json`" in out


def test_what_cannot_be_compared_is_said(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    def problem(*arguments: str) -> str:
        assert cli.run(["compare", *arguments]) == 2
        return capsys.readouterr().err

    assert "compare needs --against REVISION" in problem()
    assert "unknown Git revision 'nope'" in problem("--against", "nope")
    shown = read_json(folder.root / REPORTS / "comparison.json")
    shown["groups"][0]["primary_name"] = "accuracy"
    write_json(folder.root / REPORTS / "comparison.json", shown)
    unjudged = problem("--against", "HEAD")
    assert "tiny/sql/molf cannot be judged: the score was sql's execution_accuracy then" in unjudged
    assert "no score of HEAD" in unjudged
    folder.compare()
    shutil.rmtree(folder.root / "results/tiny/sql/lora")
    assert "`dvc pull results/tiny/sql/lora/seed-0/evaluation`" in problem("--against", "HEAD")
    (folder.root / "reports/comparison.json").unlink()
    assert "there is no reports/comparison.json here; `dvc pull reports" in problem("--against", "HEAD")
    folder.sh("dvc checkout --quiet --force && git checkout --quiet --orphan bare && git rm -rfq --cached dvc.lock")
    folder.sh("git commit --quiet -m bare")
    assert "has no reports/comparison.json: nobody compared then" in problem("--against", "bare")
