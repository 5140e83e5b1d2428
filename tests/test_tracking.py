"""MLflow's runs: live and rebuilt alike, nothing twice, and no training lost to an outage."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf import mlflow_cells, mlflow_comparison, mlflow_server, tracking
from molf.config import Params
from molf.errors import RunError, UserError
from molf.mlflow_cells import history_rows, routing_curves
from molf.mlflow_store import MAX_TAG_LENGTH, Store, data_source, flatten
from molf.paths import Cell, file_hash, read_json, write_json
from molf.report import comparison, figures, page
from tests.report import fake

CELL = Cell("tiny", "sql", "molf", 0)
TAGS = (
    *("lineage", "data_hash", "data_source", "data_license", "model_hash", "code_hash", "weights_hash"),
    *("evaluated_weights_hash", "predictions_sha256"),
)


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


@pytest.fixture
def params(tmp_path: Path, fresh: bytes) -> Params:
    (tmp_path / "mlflow.db").write_bytes(fresh)
    return fake.write_tree(tmp_path, fake.raw_params(tasks=("sql",)))


def record(root: Path, cell: Cell = CELL) -> Any:
    return read_json(root / cell.results / "train/run.json")


def content(root: Path, **tags: str) -> dict[str, Any]:
    """All that a run shows, but for ids and the time of logging."""
    store = Store("molf", root)
    run = store.find(**tags)
    assert run is not None
    history = {
        key: [
            (p.step, p.value, p.timestamp if p.step else 0)
            for p in store.client.get_metric_history(run.info.run_id, key)
        ]
        for key in run.data.metrics
    }
    assert run.inputs is not None
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "metrics": history,
        "tags": {k: v for k, v in run.data.tags.items() if k.startswith("molf.")},
        "data": [
            (d.dataset.name, d.dataset.digest, d.dataset.source_type, d.dataset.source, d.dataset.profile)
            for d in run.inputs.dataset_inputs
        ],
        "artifacts": {
            f"{folder}/{Path(file.path).name}"
            for folder in ("train", "routing", "ranks", "evaluation", "data", "tables")
            for file in store.client.list_artifacts(run.info.run_id, folder)
        },
    }


def runs(root: Path) -> list[Any]:
    store = Store("molf", root)
    return list(store.client.search_runs([store.experiment_id]))


def live(root: Path, rows: int = 7) -> None:
    with tracking.live_run(record(root), "molf", root) as run:
        for row in history_rows(root / CELL.results / "train")[:rows]:
            run.log([row])
        run.finish(root / CELL.results)
    tracking.log_evaluation(root / CELL.results, "molf", root)


def test_where_ranks_went_is_a_figure_of_the_run(params: Params, tmp_path: Path) -> None:
    path = tmp_path / CELL.results / "train/summary.json"
    write_json(path, {**read_json(path), "adaptation": {"ranks": {"model.layers.0.mlp.up_proj": 3}}})
    live(tmp_path)
    assert "ranks/heat_map.png" in content(tmp_path, kind="cell", cell=CELL.name)["artifacts"]


def test_live_and_rebuilt_runs_are_alike(params: Params, tmp_path: Path, fresh: bytes) -> None:
    live(tmp_path)
    key = {"kind": "cell", "cell": CELL.name}
    first = content(tmp_path, **key)
    (tmp_path / "mlflow.db").write_bytes(fresh)
    tracking.track(tmp_path, params)
    assert content(tmp_path, **key) == first
    assert first["status"] == "FINISHED"
    assert first["params"]["method.lora_learning_rate"] == "0.001"
    assert first["params"]["method.r"] == "[8]"
    assert first["params"]["training.max_steps"] == "null"
    assert first["params"]["data_hash"] == "hash-of-sql"
    assert first["tags"]["molf.git_commit"] == "0" * 40
    assert first["tags"]["molf.generated_data"] == "true"
    assert first["data"][0][:3] == ("sql", "hash-of-sql", "code")
    assert json.loads(first["data"][0][4])["rows"]["train"]["kept"] == 48
    predictions = tmp_path / CELL.results / "evaluation/predictions.parquet"
    assert {key: first["tags"][f"molf.{key}"] for key in TAGS} == {
        "lineage": f"molf lineage {CELL.name}",
        "data_hash": "hash-of-sql",
        "data_source": "the built-in generator, seed 3",
        "data_license": "cc-by-4.0",
        "model_hash": "hash-of-tiny",
        "code_hash": "c" * 16,
        "weights_hash": "weights-of-molf",
        "evaluated_weights_hash": "weights-of-molf",
        "predictions_sha256": file_hash(predictions),
    }
    assert [first["metrics"][f"data/{key}"][0][1] for key in ("rejected", "leaks", "leaks_kept")] == [3, 2, 2]
    assert {"data/summary.json", "data/rejected_rows_by_reason.json", "data/rows.json"} <= first["artifacts"]
    assert [step for step, *_ in first["metrics"]["train/loss"]] == list(range(1, fake.STEPS + 1))
    assert [step for step, *_ in first["metrics"]["routing/share/full"]] == list(range(2, fake.STEPS + 1))
    assert first["metrics"]["test/primary"][0][1] == pytest.approx(32 / 39)
    assert {"routing/routing.parquet", "routing/heat_map.png", "train/summary.json"} <= first["artifacts"]
    names = ("evaluation/predictions.parquet", "evaluation/general.parquet", "evaluation/weights.parquet")
    assert {*names, "tables/predictions.json", "tables/weights.json"} <= first["artifacts"]
    values = {name: points[0][1] for name, points in first["metrics"].items()}
    summary = read_json(tmp_path / CELL.results / "train/summary.json")
    assert values["cost/peak_memory_gb"] == summary["peak_memory_bytes"] / 1e9
    assert values["cost/energy_joules"] == summary["energy_joules"]
    loss, before = (
        read_json(tmp_path / f"results/tiny/sql/{method}/seed-0/evaluation/metrics.json")["general"]["loss"]
        for method in ("molf", "base")
    )
    assert values["damage/forgetting"] == pytest.approx(loss - before) and loss > before
    assert values["damage/intruders"] > 0


@pytest.mark.parametrize(
    ("source", "kind", "place"),
    [
        ({"kind": "file", "files": {"train": [{"from": "data/my.jsonl"}]}}, "local", {"uri": "data/my.jsonl"}),
        (
            {"kind": "file", "files": {"train": [{"from": "data/a.csv"}, {"from": "data/b.csv"}]}},
            "local",
            {"uri": "data"},
        ),
        (
            {"kind": "file", "files": {"train": [{"from": "data/a.csv"}, {"from": f"{Path.cwd()}/other/b.csv"}]}},
            "local",
            {"uri": str(Path.cwd())},
        ),
        ({"kind": "file", "files": {"train": {"from": "old.jsonl"}}}, "local", {"uri": "old.jsonl"}),
        ({"kind": "url", "files": {"train": [{"from": "https://x.org/a"}]}}, "http", {"url": "https://x.org/a"}),
        ({"kind": "url", "files": {"train": [{"from": "s3://bucket/a"}]}}, "s3", {"uri": "s3://bucket/a"}),
        (
            {"kind": "hub", "id": "a/b", "config": None, "revision": "f" * 40},
            "hugging_face",
            {"path": "a/b", "revision": "f" * 40},
        ),
        ({"kind": "generated", "seed": 3}, "code", {"tags": {"mlflow.source.name": "molf.generate", "seed": "3"}}),
        ("unknown", "local", {"uri": "data/prepared/sql"}),
    ],
)
def test_a_data_sets_source_is_one_that_mlflow_reads(source: Any, kind: str, place: dict[str, Any]) -> None:
    from mlflow.data import get_source
    from mlflow.entities import Dataset

    told, given = data_source(source, "sql")
    assert told == kind
    read = get_source(Dataset(name="sql", digest="d", source_type=told, source=json.dumps(given))).to_dict()
    assert {key: read[key] for key in place} == place


def test_the_datas_tables_are_mlflows_and_stand_once(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # `load_table` asks no client
    live(tmp_path)
    store = Store("molf", tmp_path)
    run = store.find(kind="cell", cell=CELL.name)
    assert run is not None
    mlflow_cells.complete(store, run.info.run_id, tmp_path / CELL.results / "train")  # once more
    file = "data/rejected_rows_by_reason.json"
    table = store.client.load_table(store.experiment_id, file, [run.info.run_id])
    assert table["check"].tolist() == ["is not empty"]
    run = store.client.get_run(run.info.run_id)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]).count({"path": file, "type": "table"}) == 1


def test_the_untrained_models_run_names_its_data(params: Params, tmp_path: Path) -> None:
    path = tmp_path / "results/tiny/sql/base/seed-0/evaluation/metrics.json"
    metrics = read_json(path)
    metrics["lineage"] |= {
        "source": {"kind": "file", "files": {"train": [{"from": "x.csv"}]}},
        "model": {"hash": "hash-of-tiny"},
        "git_commit": None,
    }
    write_json(path, metrics)
    tracking.track(tmp_path, params)
    found = content(tmp_path, kind="cell", cell="tiny/sql/base/seed-0")
    assert found["data"][0][:4] == ("sql", "hash-of-sql", "local", '{"uri": "x.csv"}')
    assert found["tags"]["molf.data_source"] == "file: x.csv"


def test_a_run_is_found_by_its_fingerprint_and_looking_makes_nothing(params: Params, tmp_path: Path) -> None:
    key = record(tmp_path)["fingerprint"]
    assert tracking.find_run(key, "molf", tmp_path) is None
    assert tracking.find_run(key, "molf", tmp_path / "elsewhere") is None
    assert not (tmp_path / "elsewhere").exists()
    live(tmp_path)
    run = Store("molf", tmp_path).find(kind="cell", cell=CELL.name)
    assert run is not None and tracking.find_run(key, "molf", tmp_path) == run.info.run_id
    (tmp_path / "mlflow.db").write_text("not a database" * 1000)
    with pytest.raises(RunError, match="MLflow"):
        tracking.find_run(key, "molf", tmp_path)


def test_a_control_is_tagged_as_what_it_is(params: Params, tmp_path: Path) -> None:
    run, store = record(tmp_path), Store("molf", tmp_path)
    assert "molf.control" not in store.open_cell(run).data.tags
    other = {**run, "fingerprint": "f" * 16, "config": {"method": {**run["config"]["method"], "winners": "random"}}}
    found = store.client.get_run(store.open_cell(other).info.run_id)
    assert found.data.tags["molf.control"] == "control: winners drawn at random"


def test_tracking_twice_adds_nothing(params: Params, tmp_path: Path) -> None:
    counts = tracking.track(tmp_path, params)
    assert counts == {"cells": 5, "runs": 4, "evaluations": 5, "comparisons": 0}
    before = [(run.info.run_id, run.data.metrics, run.data.params, run.data.tags) for run in runs(tmp_path)]
    assert len(before) == 10  # a parent and a child for each of four methods and the untrained model
    assert tracking.track(tmp_path, params) == {"cells": 5, "runs": 0, "evaluations": 0, "comparisons": 0}
    assert [(run.info.run_id, run.data.metrics, run.data.params, run.data.tags) for run in runs(tmp_path)] == before


def test_seeds_are_children_of_one_parent(tmp_path: Path, fresh: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(fresh)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # what the fluent API would obey
    params = fake.write_tree(tmp_path, fake.raw_params(tasks=("sql",), seeds=(0, 1)))
    tracking.track(tmp_path, params)
    found = runs(tmp_path)
    parents = {run.info.run_name: run.info.run_id for run in found if run.data.tags["molf.kind"] == "method"}
    assert sorted(parents) == [f"tiny/sql/{name}" for name in ("base", "fft", "lora", "molf", "molf-e")]
    children = [run for run in found if run.data.tags["molf.kind"] == "cell"]
    assert len(children) == 9
    for run in children:
        name = run.data.tags["molf.cell"].rsplit("/", 1)[0]
        assert run.data.tags["mlflow.parentRunId"] == parents[name]


def test_a_resumed_cell_reopens_its_run_and_a_new_one_does_not(params: Params, tmp_path: Path) -> None:
    rows = history_rows(tmp_path / CELL.results / "train")
    with pytest.raises(ValueError, match="killed"), tracking.live_run(record(tmp_path), "molf", tmp_path) as run:
        run.log(rows[:8])
        raise ValueError("killed")
    first = content(tmp_path, kind="cell", cell=CELL.name)
    assert first["status"] == "FAILED"
    assert len(first["metrics"]["train/loss"]) == 8
    with tracking.live_run(record(tmp_path), "molf", tmp_path) as run:
        run.log([{**row, "seconds": row["seconds"] + 100} for row in rows[5:]])  # from the checkpoint at step 5
        run.finish(tmp_path / CELL.results)
    again = content(tmp_path, kind="cell", cell=CELL.name)
    assert again["status"] == "FINISHED"
    assert [step for step, *_ in again["metrics"]["train/loss"]] == list(range(1, fake.STEPS + 1))
    assert len(runs(tmp_path)) == 2
    other = {**record(tmp_path), "fingerprint": "other"}
    with tracking.live_run(other, "molf", tmp_path):
        pass
    cells = [run for run in runs(tmp_path) if run.data.tags["molf.kind"] == "cell"]
    assert len({run.data.tags["mlflow.parentRunId"] for run in cells}) == 1
    assert len(cells) == 2


def test_track_completes_what_a_kill_left_half_done(params: Params, tmp_path: Path) -> None:
    live_run = tracking.LiveRun(record(tmp_path), "molf", tmp_path)
    live_run.log(history_rows(tmp_path / CELL.results / "train")[:3])
    assert tracking.track(tmp_path, params)["runs"] == 4
    found = content(tmp_path, kind="cell", cell=CELL.name)
    assert found["status"] == "FINISHED"
    assert len(found["metrics"]["train/loss"]) == fake.STEPS


def test_a_new_evaluation_is_shown(params: Params, tmp_path: Path) -> None:
    live(tmp_path)
    path = tmp_path / CELL.results / "evaluation/metrics.json"
    write_json(path, {**read_json(path), "fingerprint": "again", "primary": 0.5})
    tracking.log_evaluation(tmp_path / CELL.results, "molf", tmp_path)
    run = Store("molf", tmp_path).find(kind="cell", cell=CELL.name)
    assert run is not None
    assert run.data.metrics["test/primary"] == 0.5
    # An evaluation of other weights is not this training's.
    write_json(path, {**read_json(path), "fingerprint": "stale", "train_fingerprint": "stale", "primary": 0.1})
    tracking.log_evaluation(tmp_path / CELL.results, "molf", tmp_path)
    run = Store("molf", tmp_path).find(kind="cell", cell=CELL.name)
    assert run is not None
    assert run.data.metrics["test/primary"] == 0.5


def compare(params: Params, root: Path) -> Any:
    """Writes reports/ as the stage does; returns the comparison."""
    result, reports = comparison.build(params, root), root / "reports"
    drawn = figures.draw(result, root, reports / "figures")
    write_json(reports / "comparison.json", result)
    comparison.flat(result).to_csv(reports / "comparison.csv", index=False)
    (reports / "report.html").write_text(page.render(result, drawn, reports / "figures", []))
    return result


@pytest.fixture(scope="module")
def compared_once(tmp_path_factory: pytest.TempPathFactory, fresh: bytes) -> Path:
    """A project of two seeds whose comparison is in the store."""
    root = tmp_path_factory.mktemp("compared")
    (root / "mlflow.db").write_bytes(fresh)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        compare(fake.write_tree(root, fake.raw_params(tasks=("sql",), seeds=(0, 1))), root)
        tracking.log_comparison(root / "reports", "molf", root)
    return root


@pytest.fixture
def compared(compared_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That project, to be looked at only."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{compared_once}/mlflow.db")  # `load_table` asks no client
    return compared_once


def test_a_comparison_is_a_run_with_the_report(compared: Path, tmp_path: Path) -> None:
    result = read_json(compared / "reports/comparison.json")
    tracking.log_comparison(compared / "reports", "molf", compared)
    found = [run for run in runs(compared) if run.data.tags["molf.kind"] == "comparison"]
    assert len(found) == 1
    store, run_id = Store("molf", compared), found[0].info.run_id
    files = {file.path for file in store.client.list_artifacts(run_id)}
    assert files == {
        "comparison.json", "comparison.csv", "report.html", "runs.json", "figures", "data", "tables",
    }  # fmt: skip
    drawn = {Path(file.path).name for file in store.client.list_artifacts(run_id, "figures")}
    assert drawn == {path.name for path in (compared / "reports/figures").iterdir()}
    assert [found[0].data.metrics[f"data/sql/{key}"] for key in ("rejected", "leaks", "leaks_kept")] == [3, 2, 2]
    assert found[0].data.metrics["comparison/tiny/sql/molf"] == pytest.approx((32 + 31) / 2 / 39)
    table = store.client.load_table(store.experiment_id, "tables/tiny/sql/scores.json", [run_id])
    assert table["method"].tolist() == ["base", "fft", "lora", "molf", "molf-e"]
    linked = read_json(Path(store.client.download_artifacts(run_id, "runs.json", str(tmp_path))))
    assert store.client.get_run(linked[CELL.name]).data.tags["molf.cell"] == CELL.name
    note = found[0].data.tags["mlflow.note.content"]
    assert "keeps up" in note and result["groups"][0]["recommendation"]["sentence"] in note
    assert all(linked[f"tiny/sql/{m}"] in note for m in ("base", "fft", "lora", "molf", "molf-e"))


def test_the_methods_runs_alone_make_the_table(compared: Path) -> None:
    result = read_json(compared / "reports/comparison.json")
    group = result["groups"][0]
    store = Store("molf", compared)
    for row in (group["base"] | {"method": "base"}, *group["methods"]):
        run = store.find(kind="method", method=row["method"])
        assert run is not None
        shown = run.data.metrics
        for name, key in (("test/primary", "mean"), ("test/primary_low", "low"), ("test/primary_high", "high")):
            assert shown[name] == pytest.approx(row[key], rel=1e-4)
        assert row["method"] in run.data.tags["mlflow.note.content"]
        if row["method"] == "base":
            assert "train/loss" not in shown
            continue
        assert shown["cost/train_seconds"] == pytest.approx(row["train_seconds"])
        assert shown["damage/forgetting"] == pytest.approx(row["general"]["mean"], rel=1e-4)
        assert run.data.tags["molf.recommended"] == json.dumps(group["recommendation"]["method"] == row["method"])
        curve = {p.step: p.value for p in store.client.get_metric_history(run.info.run_id, "train/loss")}
        trains = [compared / f"results/tiny/sql/{row['method']}/seed-{seed}/train" for seed in (0, 1)]
        one, other = (pd.read_parquet(train / "history.parquet").set_index("step")["loss"] for train in trains)
        assert curve == pytest.approx(((one + other) / 2).to_dict())
    routed = store.find(kind="method", method="molf")
    assert routed is not None and "routing/share/full/mlp.up_proj" in routed.data.metrics
    assert routed.data.tags["mlflow.runColor"].startswith("#")


def test_a_second_comparison_fills_the_same_runs_and_new_trainings_get_fresh_curves(
    params: Params, tmp_path: Path
) -> None:
    def parents() -> dict[str, Any]:
        return {run.data.tags["molf.method"]: run for run in runs(tmp_path) if run.data.tags["molf.kind"] == "method"}

    compare(params, tmp_path)
    tracking.log_comparison(tmp_path / "reports", "molf", tmp_path)
    first = parents()
    raw = fake.raw_params(tasks=("sql",))
    raw["compare"]["margin"] = 0.4
    compare(fake.write_tree(tmp_path, raw), tmp_path)
    tracking.log_comparison(tmp_path / "reports", "molf", tmp_path)
    assert {m: run.info.run_id for m, run in parents().items()} == {m: run.info.run_id for m, run in first.items()}
    raw["methods"]["lora"]["r"] = 4
    compare(fake.write_tree(tmp_path, raw), tmp_path)
    tracking.log_comparison(tmp_path / "reports", "molf", tmp_path)
    now = parents()
    assert {m for m in now if now[m].info.run_id != first[m].info.run_id} == {"lora"}
    store = Store("molf", tmp_path)
    history = store.client.get_metric_history(now["lora"].info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, fake.STEPS + 1))
    seeds = [run for run in runs(tmp_path) if run.data.tags.get("molf.cell", "").startswith("tiny/sql/lora/")]
    assert len(seeds) == 2  # one trained with each rank
    assert {run.data.tags["mlflow.parentRunId"] for run in seeds} == {now["lora"].info.run_id}
    assert len([run for run in runs(tmp_path) if run.data.tags["molf.kind"] == "comparison"]) == 3


def test_the_experiment_says_how_to_read_it_and_has_views(compared: Path) -> None:
    result = read_json(compared / "reports/comparison.json")
    store = Store("molf", compared)
    tags = store.client.get_experiment(store.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert result["sentence"].split(",")[0] in tags["mlflow.note.content"]
    views = {key: json.loads(value) for key, value in tags.items() if key.startswith(mlflow_comparison.VIEW)}
    assert sorted(view["name"] for view in views.values()) == [
        "tiny/sql: routing by step", "tiny/sql: scores and costs", "tiny/sql: training by step",
    ]  # fmt: skip
    for key, view in views.items():
        assert f"viewStateShareKey={key.removeprefix(mlflow_comparison.VIEW)}" in tags["mlflow.note.content"]
        asked = json.loads(view["state"])["searchFilter"]
        shown = store.client.search_runs([store.experiment_id], asked)
        methods = {run.data.tags["molf.method"] for run in shown}
        assert methods == {"fft", "lora", "molf", "molf-e"} | ({"base"} if "scores" in view["name"] else set())


def test_a_long_note_is_cut_at_a_line(compared: Path) -> None:
    result = read_json(compared / "reports/comparison.json")
    many = {**result, "groups": 20 * result["groups"]}
    text = mlflow_comparison.note(many, {}, "1")
    assert MAX_TAG_LENGTH - 1000 < len(text) <= MAX_TAG_LENGTH
    assert text.endswith("\n\nThe rest is in report.html, under Artifacts.")


def test_forgetting_is_added_once_the_untrained_model_is_scored(params: Params, tmp_path: Path) -> None:
    path = tmp_path / "results/tiny/sql/base/seed-0/evaluation/metrics.json"
    metrics = read_json(path)
    path.unlink()
    live(tmp_path)
    assert "damage/forgetting" not in content(tmp_path, kind="cell", cell=CELL.name)["metrics"]
    write_json(path, {**metrics, "general": {**metrics["general"], "hash": "of other texts"}})
    tracking.track(tmp_path, params)
    assert "damage/forgetting" not in content(tmp_path, kind="cell", cell=CELL.name)["metrics"]
    write_json(path, metrics)
    tracking.track(tmp_path, params)
    assert content(tmp_path, kind="cell", cell=CELL.name)["metrics"]["damage/forgetting"][0][1] > 0


def test_routing_curves() -> None:
    won = {("a", 1): "full", ("b", 1): "lora_r8", ("a", 2): "full", ("b", 2): "full", ("a", 3): "lora_r8"}
    won[("b", 3)] = "lora_r8"
    rows = [
        (step, f"layers.0.{kind}", expert, 4.0 if expert == "full" else 1.0, expert == winner, step > 0)
        for (kind, step), winner in {("a", 0): "full", ("b", 0): "full", **won}.items()
        for expert in ("full", "lora_r8")
    ]
    curves = routing_curves(pd.DataFrame(rows, columns=["step", "module", "expert", "score", "won", "counted"]))
    assert curves.index.tolist() == [1, 2, 3]
    assert curves["routing/share/full"].tolist() == pytest.approx([1 / 2, 3 / 4, 3 / 6])
    assert curves["routing/share/lora_r8"].tolist() == pytest.approx([1 / 2, 1 / 4, 3 / 6])
    assert curves["routing/share/full/a"].tolist() == pytest.approx([1, 1, 2 / 3])
    assert curves["routing/score_ratio"].tolist() == pytest.approx([4, 4, 4])
    zero = pd.DataFrame(rows, columns=["step", "module", "expert", "score", "won", "counted"])
    zero.loc[zero["expert"] == "lora_r8", "score"] = 0.0  # its rate was 0
    assert routing_curves(zero)["routing/score_ratio"].isna().all()
    uncounted = pd.DataFrame(rows, columns=["step", "module", "expert", "score", "won", "counted"]).query("step == 0")
    assert routing_curves(uncounted).empty


def test_six_processes_on_a_fresh_store(tmp_path: Path) -> None:
    fake.write_tree(tmp_path, fake.raw_params(tasks=("sql",)))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_log_some, args=(tmp_path, i)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 6
    found = runs(tmp_path)
    assert sorted(run.data.tags["molf.kind"] for run in found) == ["cell"] * 6 + ["method"]
    assert all(len(run.data.metrics) >= 5 for run in found if run.data.tags["molf.kind"] == "cell")


def _log_some(root: Path, index: int) -> None:
    run = {**record(root), "fingerprint": f"worker-{index}"}
    with tracking.live_run(run, "molf", root) as live:
        live.log(history_rows(root / CELL.results / "train"))
        sys.exit(live.run_id is None)


def train_through(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A training with MLflow in trouble: goes through and warns once; returns what was printed."""
    live(root)
    return capsys.readouterr().err


def test_store_that_is_no_database(params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").write_text("not a database" * 1000)
    printed = train_through(tmp_path, capsys)
    assert printed.count("warning: MLflow") == 2  # the live run's and the evaluation's
    assert "`molf track`" in printed
    with pytest.raises(RunError, match="MLflow"):
        tracking.track(tmp_path, params)
    assert tracking.initialise(tmp_path, "molf") is False


def test_store_that_breaks_while_training(params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = history_rows(tmp_path / CELL.results / "train")
    with tracking.live_run(record(tmp_path), "molf", tmp_path) as run:
        run.log(rows[:2])
        run._due = 0.0
        (tmp_path / "mlflow.db").write_text("gone" * 5000)
        run.log(rows[2:4])
        run.log(rows[4:6])
        run.finish(tmp_path / CELL.results)
    assert capsys.readouterr().err.count("warning: MLflow") == 1


def test_artifacts_that_cannot_be_written(params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    printed = train_through(tmp_path, capsys)
    assert "warning: MLflow, completing the run" in printed
    (tmp_path / "mlartifacts").unlink()
    tracking.track(tmp_path, params)
    assert content(tmp_path, kind="cell", cell=CELL.name)["status"] == "FINISHED"


def test_unreachable_server(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    printed = train_through(tmp_path, capsys)
    assert time.monotonic() - began < 20
    assert printed.count("warning: MLflow") == 2
    with pytest.raises(UserError, match="open that address"):
        mlflow_server.server_store(tmp_path)


def test_an_unreachable_database_is_given_up_and_its_password_not_shown(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://molf:geheim@127.0.0.1:9/mlflow")
    began = time.monotonic()
    assert tracking.initialise(tmp_path, "molf") is False
    with pytest.raises(RunError, match=r"MLflow \(postgresql://molf:\*\*\*@127.0.0.1:9/mlflow\)") as failed:
        tracking.track(tmp_path, params)
    assert time.monotonic() - began < 20
    printed = capsys.readouterr()
    assert "Connection refused" in printed.err
    assert "geheim" not in printed.err + printed.out + str(failed.value)


def test_checkouts_share_the_store_of_one(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    other = tmp_path / "other"
    other.mkdir()
    fake.write_tree(other, fake.raw_params(tasks=("sql",)))
    live(other)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert content(tmp_path, kind="cell", cell=CELL.name)["status"] == "FINISHED"
    assert (tmp_path / "mlartifacts").is_dir() and not (other / "mlartifacts").exists()
    assert not (other / ".molf").exists()  # the lock is one for all


@pytest.mark.parametrize("kind", ["method", "cell"])
def test_runs_that_mean_the_same_become_one(params: Params, tmp_path: Path, kind: str) -> None:
    live(tmp_path)
    store = Store("molf", tmp_path)
    first = store.find(kind=kind, method=CELL.method)
    assert first is not None
    tags = {key: value for key, value in first.data.tags.items() if key.startswith("molf.")}
    older = store.client.create_run(store.experiment_id, start_time=1, tags=tags)  # as by a machine with a slow clock
    child = store.client.create_run(store.experiment_id, tags={"mlflow.parentRunId": older.info.run_id})
    mlflow_cells.sync(store, tmp_path / CELL.results)
    if kind == "method":
        store.parent(CELL)
        assert store.client.get_run(child.info.run_id).data.tags["mlflow.parentRunId"] == first.info.run_id
    assert [run.info.run_id for run in store._alike(kind=kind, method=CELL.method)] == [first.info.run_id]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes requests and never answers."""
    done = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            done.wait(30)

        do_POST = do_GET

    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    done.set()
    server.shutdown()


def test_silent_server_is_given_up(
    params: Params,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    silent_server: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()
    with tracking.live_run(record(tmp_path), "molf", tmp_path) as run:
        run.log(history_rows(tmp_path / CELL.results / "train"))
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err.count("warning: MLflow") == 1


def test_moved_project_is_told_what_to_do(params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking.initialise(tmp_path, "molf")
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    (tmp_path / "mlflow.db").rename(elsewhere / "mlflow.db")
    assert tracking.initialise(elsewhere, "molf") is False
    assert "remove mlflow.db" in capsys.readouterr().err


def test_writing_costs_at_most_one_percent(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracking.LiveRun(record(tmp_path), "molf", tmp_path)
    calls = []

    def slow(*_: Any) -> None:
        calls.append(1)
        time.sleep(0.1)

    monkeypatch.setattr(run._store, "log_steps", slow)
    for step in range(1, 2000):
        run.log([{"step": step, "seconds": 0.1 * step, "loss": 1.0}])
    assert len(calls) == 1
    assert run._due - time.monotonic() > 9  # 0.1 s of writing for 10 s of training


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": {}}) == {
        "a.b": 1,
        "a.c.d": "null",
        "e": [1, 2],
        "f": {},
    }


def test_long_params_fit(params: Params, tmp_path: Path) -> None:
    run = record(tmp_path)
    run["config"]["method"]["note"] = "x" * 10_000
    with tracking.live_run(run, "molf", tmp_path) as live:
        assert live.run_id is not None
    found = Store("molf", tmp_path).find(kind="cell")
    assert found is not None
    assert len(found.data.params["method.note"]) == 6000


def test_import_is_light_and_telemetry_off() -> None:
    code = "import sys, os, molf.tracking; print('mlflow' in sys.modules, os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False", "true"]
