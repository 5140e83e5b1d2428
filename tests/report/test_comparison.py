"""Numbers, verdicts and refusals of a comparison, on results made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from molf.config import Params, check_params
from molf.errors import UserError
from molf.paths import Cell, read_json, write_json, write_parquet
from molf.report.comparison import build, difference, flat
from molf.report.verdicts import limits
from tests.report import fake

FFT = Cell("tiny", "sql", "fft", 0)


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return fake.write_tree(tmp_path, fake.raw_params())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = read_json(path)
    change(value)
    write_json(path, value)


def refused(params: Params, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        build(params, root)
    return str(caught.value)


def test_numbers(params: Params, tmp_path: Path) -> None:
    comparison = build(params, tmp_path)
    sql, fact = comparison["groups"]
    assert [m["method"] for m in sql["methods"]] == ["fft", "lora", "molf", "molf-e"]
    assert [m["mean"] for m in sql["methods"]] == pytest.approx([30 / 39, 20 / 39, 32 / 39, 22 / 39])
    assert sql["base"]["mean"] == pytest.approx(4 / 39)
    assert (sql["examples"], sql["left_out"]) == (39, {"gold does not run": 1})
    assert fact["methods"][0]["mean"] == pytest.approx(fact["methods"][0]["per_seed"][0]["score"])
    gap = difference(sql, "molf", "lora")
    assert gap is not None
    assert gap["mean"] == pytest.approx(12 / 39)
    # 12 discordant examples of 39, all one way.
    assert (gap["high"] - gap["low"]) / 2 == pytest.approx(1.96 * np.sqrt(12 / 39 * 27 / 39 / 39), rel=0.15)
    back = difference(sql, "lora", "molf")
    assert back is not None
    assert (back["low"], back["high"]) == (-gap["high"], -gap["low"])
    assert sql["methods"][2]["routing_share"] == pytest.approx({"full": 0.742, "lora_r8": 0.258}, abs=1e-3)
    assert comparison["interval"] == "examples only"


def test_verdicts_hold_molf_against_both_references(params: Params, tmp_path: Path) -> None:
    comparison = build(params, tmp_path)
    verdicts = {v["method"]: v for v in comparison["groups"][0]["verdicts"]}
    assert verdicts["molf"]["versus"] == ["fft", "lora"]
    assert {name: v["outcome"] for name, v in verdicts.items()} == {"molf": "holds", "molf-e": "fails"}
    assert "molf keeps up with full fine-tuning and LoRA on sql and fact" in comparison["sentence"]
    assert "generated data" in comparison["sentence"]
    assert "examples only" in comparison["sentence"]


def test_no_verdict_without_both_references(tmp_path: Path) -> None:
    raw = fake.raw_params()
    raw["grid"]["methods"] = ["fft", "molf"]
    comparison = build(fake.write_tree(tmp_path, raw), tmp_path)
    assert all(group["verdicts"] == [] for group in comparison["groups"])
    assert "No verdict on MoLF" in comparison["sentence"]


def test_one_method_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    raw = fake.raw_params(tasks=("sql",))
    raw["grid"]["methods"] = ["molf"]
    comparison = build(fake.write_tree(tmp_path, raw), tmp_path)
    assert comparison["groups"][0]["differences"] == []
    assert len(flat(comparison)) == 2


def test_two_seeds_are_exploratory(tmp_path: Path) -> None:
    comparison = build(fake.write_tree(tmp_path, fake.raw_params(seeds=(0, 1))), tmp_path)
    fft = comparison["groups"][0]["methods"][0]
    assert comparison["interval"] == "exploratory"
    assert [s["score"] for s in fft["per_seed"]] == pytest.approx([30 / 39, 29 / 39])
    assert fft["mean"] == pytest.approx(29.5 / 39)
    assert any("exploratory" in text for text in limits(comparison))


def test_equal_results_give_equal_bytes(params: Params, tmp_path: Path) -> None:
    assert json.dumps(build(params, tmp_path)) == json.dumps(build(params, tmp_path))


def test_only_the_grid_is_read(params: Params, tmp_path: Path) -> None:
    stray = tmp_path / "results/tiny/sql/other/seed-0/train/run.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("not even JSON")
    assert len(build(params, tmp_path)["cells"]) == 8


def test_a_lacking_untrained_model_is_refused(params: Params, tmp_path: Path) -> None:
    (tmp_path / "results/tiny/sql/base/seed-0/evaluation/metrics.json").unlink()
    text = refused(params, tmp_path)
    assert "tiny/sql: the untrained model, the zero row of every table, has no scores" in text
    assert "results/tiny/sql/base/seed-0/evaluation/metrics.json missing; `dvc repro baseline` makes them" in text


def test_flat_has_a_row_for_each_model_task_method(params: Params, tmp_path: Path) -> None:
    table = flat(build(params, tmp_path))
    assert list(table["method"]) == ["base", "fft", "lora", "molf", "molf-e"] * 2
    row = table[(table["task"] == "sql") & (table["method"] == "molf")].iloc[0]
    assert row["vs_fft_mean"] == pytest.approx(2 / 39)
    assert row["routing_share_first"] == pytest.approx(0.742, abs=1e-3)
    assert not table.map(lambda value: isinstance(value, dict | list)).any(axis=None)


def test_all_missing_cells_are_named(params: Params, tmp_path: Path) -> None:
    (tmp_path / FFT.results / "evaluation/metrics.json").unlink()
    (tmp_path / "results/tiny/fact/lora/seed-0/train/run.json").unlink()
    text = refused(params, tmp_path)
    assert "tiny/sql/fft/seed-0: results/tiny/sql/fft/seed-0/evaluation/metrics.json missing" in text
    assert "tiny/fact/lora/seed-0" in text
    assert "dvc repro" in text


def test_cell_of_other_params_is_refused_with_what_differs(params: Params, tmp_path: Path) -> None:
    raw = fake.raw_params()
    raw["methods"]["lora"]["r"] = 16
    text = refused(check_params(raw, "params.yaml"), tmp_path)
    assert "tiny/sql/lora/seed-0: trained with other params" in text
    assert "method.r was 8, is 16" in text
    assert "tiny/fact/lora/seed-0" in text
    assert "fft" not in text


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        ("evaluation/metrics.json", "train_fingerprint", "other", "weights of another training"),
        ("evaluation/metrics.json", "data_hash", "other", "trained and evaluated on unlike data"),
        ("evaluation/metrics.json", "task_kind", "med", "scored as task kind med"),
        ("evaluation/metrics.json", "primary", 0.5, "predictions.parquet gives"),
        ("train/summary.json", "fingerprint", "other", "two trainings"),
        ("train/run.json", "data", {"hash": "other"}, "trained on unlike data"),
        ("train/run.json", "model", {"hash": "other"}, "trained on unlike models"),
        ("train/run.json", "code", "other", "unlike versions of molf's code"),
        ("train/run.json", "versions", {"torch": "1.0"}, "unlike library versions"),
        ("evaluation/metrics.json", "code", "other", "not all evaluated by the same code"),
        ("evaluation/metrics.json", "evaluation", {"batch_size": 1}, "batch_size was 1, is 8"),
    ],
)
def test_cells_that_do_not_belong_together(
    params: Params, tmp_path: Path, file: str, key: str, value: Any, expected: str
) -> None:
    edit(tmp_path / FFT.results / file, lambda content: content.update({key: value}))
    assert expected in refused(params, tmp_path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("train_fingerprint", "of another model"), ("data_hash", "other data"), ("code", "not all evaluated by the same")],
)
def test_an_untrained_model_that_does_not_belong_is_refused(
    params: Params, tmp_path: Path, key: str, expected: str
) -> None:
    path = tmp_path / "results/tiny/sql/base/seed-0/evaluation/metrics.json"
    edit(path, lambda content: content.update({key: "other"}))
    assert expected in refused(params, tmp_path)


def test_unlike_examples_are_refused(params: Params, tmp_path: Path) -> None:
    path = tmp_path / FFT.results / "evaluation/predictions.parquet"
    write_parquet(path, pd.read_parquet(path).iloc[::-1])
    assert "unlike examples" in refused(params, tmp_path)


def test_newer_prepared_data_is_refused(params: Params, tmp_path: Path) -> None:
    write_json(tmp_path / "data/prepared/sql/summary.json", {"data_hash": "newer"})
    assert "other data than data/prepared/sql holds now" in refused(params, tmp_path)


def test_unlike_hardware_is_said(params: Params, tmp_path: Path) -> None:
    other = {"name": "another machine", "threads": 8, "fingerprint": "gpu"}
    edit(tmp_path / FFT.results / "train/run.json", lambda run: run.update(hardware=other))
    comparison = build(params, tmp_path)
    assert comparison["costs_comparable"] is False
    assert any("unlike hardware" in text for text in limits(comparison))
