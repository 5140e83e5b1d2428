"""What the stages note of where their numbers come from; `lineage` checks it. A note enters no fingerprint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molf import models
from molf.config import PARAMS, fingerprint
from molf.paths import MODELS, PREPARED, Cell, file_hash

RECORDS = ("run.json", "summary.json")  # what a training tells of itself: its parts, its time, memory and loss
TABLES = ("predictions.parquet", "general.parquet", "weights.parquet")  # what an evaluation leaves, as far as it does


def data_record(summary: Mapping[str, Any], license: str) -> dict[str, Any]:
    """What is known of a prepared data set, as kept in every `run.json`: its summary.json, its hash as `hash`.

    The licence comes from params.yaml: in the data's own folder, a word of it would train every cell anew.
    """
    rest = {key: value for key, value in summary.items() if key != "data_hash"}
    return {"hash": summary["data_hash"], "license": license, **rest}


def of_training(
    record: Mapping[str, Any], weights: Path, kept: bool, trained_on: str, results: Path, run_id: str | None
) -> dict[str, Any]:
    """What a training knows of where its numbers come from, for train/summary.json.

    Args:
        record: What run.json holds.
        weights: The folder that holds the weights.
        kept: Whether they stay there after the evaluation.
        trained_on: sha256 of the train rows' file, taken before they were read.
        results: results/CELL/train, with history.parquet and perhaps routing.parquet.
        run_id: MLflow's id of the live run; None if there was none.
    """
    cell = Cell(**record["cell"])
    return {
        "weights": {"path": str(cell.weights), "hash": models.folder_hash(weights), "kept": kept},
        "records": {path.name: file_hash(path) for path in sorted(results.glob("*.parquet"))},
        "params": {"path": str(PARAMS), "hash": fingerprint(record["config"])},
        "data": {
            "path": str(PREPARED / cell.task),
            "hash": record["data"]["hash"],
            "files": {"train.parquet": trained_on},
        },
        "source": record["data"]["source"],
        "model": {"path": str(MODELS / cell.model), **record["model"]},
        "code": record["code"],
        "git_commit": record["git_commit"],
        "mlflow_run": run_id,
    }


def of_evaluation(
    cell: Cell,
    weights_hash: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    asked: str,
    git_commit: str | None,
) -> dict[str, Any]:
    """What an evaluation knows of where its scores come from, for evaluation/metrics.json.

    Args:
        cell: The cell, or the untrained model's, its tables written.
        weights_hash: Of the folder whose weights were asked.
        model: The base model's description.
        data: The prepared data's summary.json.
        asked: sha256 of the test rows' file, taken before they were read.
        git_commit: The checked-out commit.
    """
    train = cell.results / "train"
    told = [train / name for name in RECORDS]
    predictions, *tables = [cell.results / "evaluation" / name for name in TABLES]
    return {
        "predictions": {"path": str(predictions), "sha256": file_hash(predictions)},
        "tables": {path.name: file_hash(path) for path in tables if path.is_file()},
        "weights": {"hash": weights_hash},
        "training": {path.name: file_hash(path) for path in told if path.is_file()},
        "data": {"path": str(PREPARED / cell.task), "hash": data["data_hash"], "files": {"test.parquet": asked}},
        "source": data["source"],
        "model": {"path": str(MODELS / cell.model), **model},
        "git_commit": git_commit,
    }
