"""Cells that are trained by one process and by two, for test_processes.py. It is not a test."""

import json
from pathlib import Path
from typing import Any

from molf.collective import rank
from molf.config import Params, check_params, read_yaml
from molf.training import Outcome, train
from tests.conftest import ROOT, frame

# method, its changes, the base model's folder
CELLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fft": ("fft", {}, "tied"),
    "lora": ("lora", {"r": 3}, "tied"),
    "molf-effective": ("molf", {"forward": "effective"}, "tied"),
    "molf-dense": ("molf", {"forward": "dense"}, "base"),
    "molf-e": ("molf-e", {"r": [2, 5]}, "base"),
}


def params(name: str, **budget: Any) -> Params:
    """Small, of two micro-batches a step; the last of an epoch's has no example for a second process."""
    method, changes, _ = CELLS[name]
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "gradient_accumulation": 2, "epochs": 3, "threads": 1}
    data["training"] |= budget
    data["methods"]["molf"] |= {"r": [3], "learning_rate": 5e-3, "lora_learning_rate": 2e-3}
    data["methods"][method] |= changes
    return check_params(data, "test")


def run_cell(name: str, bases: dict[str, str], folder: Path, **budget: Any) -> Outcome:
    method, _, base = CELLS[name]
    chosen = params(name, **budget)
    return train(
        Path(bases[base]), frame(18), chosen.methods[method], chosen.training, 3, folder / "weights", folder / "scratch"
    )


def run_cells(folder: Path) -> None:
    """Trains what `cells.json` of a folder lists, each in a folder of its own there."""
    listed = json.loads((folder / "cells.json").read_text())
    for cell in listed["cells"]:
        own = folder / cell["folder"]
        outcome = run_cell(cell["name"], listed["bases"], own, **cell["budget"])
        if rank() == 0:
            outcome.history.to_parquet(own / "history.parquet")
            (own / "summary.json").write_text(json.dumps(outcome.summary))
            if outcome.routing is not None:
                outcome.routing.to_parquet(own / "routing.parquet")
