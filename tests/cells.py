"""Cells that are trained by one process and by two, for test_processes.py. It is not a test."""

import json
from pathlib import Path
from typing import Any

from molf.checkpoint import Checkpoints
from molf.collective import rank
from molf.config import Params, check_params, read_yaml
from molf.resume import Keeper
from molf.training import Outcome, train
from tests.conftest import ROOT, frame

# Blocks of methods that choose ranks; params.yaml has none of them.
ADAPTIVE: dict[str, dict[str, Any]] = {
    "adalora": {
        "kind": "adalora",
        "target_r": 4,
        "init_r": 6,
        "lora_alpha": 12.0,
        "lora_dropout": 0.0,
        "exclude_modules": ["lm_head"],
        "tinit": 0.1,
        "tfinal": 0.3,
        "deltaT": 2,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.1,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
    },
    "eva": {
        "kind": "eva",
        "r": 4,
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": False,
        "probe_steps": 4,
        "lora_alpha": 4.0,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "exclude_modules": ["lm_head"],
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
    },
    "selected": {
        "kind": "selected",
        "r": 4,
        "budget": 1.0,
        "share": 0.5,
        "probe_steps": 2,
        "exponent": 0.5,
        "lora_alpha": 4.0,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "exclude_modules": ["lm_head"],
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
    },
}

# method, its changes, the base model's folder
CELLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fft": ("fft", {}, "tied"),
    "lora": ("lora", {"r": 3}, "tied"),
    "dora": ("lora", {"r": 3, "use_dora": True}, "tied"),
    "pissa": ("lora", {"r": 3, "init_lora_weights": "pissa"}, "tied"),
    "loraplus": ("lora", {"r": 3, "loraplus_lr_ratio": 4.0}, "tied"),
    "molf-effective": ("molf", {"forward": "effective"}, "tied"),
    "molf-dense": ("molf", {"forward": "dense"}, "base"),
    "molf-e": ("molf-e", {"r": [2, 5]}, "base"),
    "adalora": ("adalora", ADAPTIVE["adalora"], "tied"),
    "eva": ("eva", ADAPTIVE["eva"], "tied"),
    "selected": ("selected", ADAPTIVE["selected"], "tied"),
    "random": ("molf-e", {"r": [2, 5], "score_per": "layer", "winners": "random"}, "base"),
}


def params(name: str, **budget: Any) -> Params:
    """Small, of two micro-batches a step; the last of an epoch's has no example for a second process."""
    method, changes, _ = CELLS[name]
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "gradient_accumulation": 2, "epochs": 3, "threads": 1}
    data["training"] |= budget
    data["methods"]["molf"] |= {"r": [3], "learning_rate": 5e-3, "lora_learning_rate": 2e-3}
    data["methods"][method] = data["methods"].get(method, {}) | changes
    return check_params(data, "test")


class Stopped(Exception):
    """A training ended here, as if it were killed."""


class StopAfter:
    """A listener that ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, rows: list[dict[str, float]]) -> None:
        if rows[-1]["step"] == self.step:
            raise Stopped


def run_cell(
    name: str, bases: dict[str, str], folder: Path, checkpoints: Path | None = None, stop: int = 0, **budget: Any
) -> Outcome | None:
    """Trains a cell into a folder.

    Args:
        name: Of `CELLS`.
        bases: Folders of the base models.
        folder: For weights and the Trainer's files.
        checkpoints: Where one is written every two steps, and where the training goes on from.
        stop: The step after which the training ends as if it were killed; 0: none.
        budget: Changes of `training`.

    Returns:
        What the training leaves; None if it was stopped.
    """
    method, _, base = CELLS[name]
    chosen = params(name, **budget)
    keeper = Keeper(Checkpoints(checkpoints, {"cell": name}, keep=1), 2, None) if checkpoints else None
    try:
        return train(
            Path(bases[base]),
            frame(18),
            chosen.methods[method],
            chosen.training,
            3,
            folder / "weights",
            folder / "scratch",
            StopAfter(stop),
            keeper,
        )
    except Stopped:
        return None


def run_cells(folder: Path) -> None:
    """Trains what `cells.json` of a folder lists, each in a folder of its own there."""
    listed = json.loads((folder / "cells.json").read_text())
    for cell in listed["cells"]:
        own = folder / cell["folder"]
        checkpoints = Path(cell["checkpoints"]) if cell["checkpoints"] else None
        outcome = run_cell(cell["name"], listed["bases"], own, checkpoints, cell["stop"], **cell["budget"])
        if rank() == 0 and outcome is not None:
            outcome.history.to_parquet(own / "history.parquet")
            (own / "summary.json").write_text(json.dumps(outcome.summary))
            if outcome.routing is not None:
                outcome.routing.to_parquet(own / "routing.parquet")
