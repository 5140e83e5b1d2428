"""A project whose four cells were trained and evaluated by the real stages, without DVC: seconds. It is not a test."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from molf import models, tracking
from molf.config import read_yaml
from molf.errors import main
from molf.stages import base, choose, compare, evaluate, fetch, general, prepare, sweep, train
from tests.conftest import ROOT

METHODS = ("fft", "lora", "molf", "molf-e")
STAGES = {"fetch": fetch, "prepare": prepare, "base": base, "general": general, "train": train, "evaluate": evaluate}
STAGES |= {"sweep": sweep, "choose": choose, "compare": compare}
HOSTILE = "<script>alert(1)</script>"


def rows(count: int = 30) -> list[dict[str, object]]:
    """CounterFact's records in the words of the `base` fixture's tokenizer; one is broken, two are equal."""
    made: list[dict[str, object]] = [
        {
            "requested_rewrite": {
                "prompt": f"w{i % 13} {{}} w{(3 * i) % 11}",
                "subject": f"w{i} w{(7 * i) % 17}",
                "target_new": {"str": f"w{20 + i % 5}"},
                "target_true": {"str": f"w{30 + i % 5}"},
            },
            "paraphrase_prompts": [f"w1 w{i}", f"w2 w{i}"],
            "neighborhood_prompts": [f"w3 w{(i + 1) % 30}"],
        }
        for i in range(count)
    ]
    broken = json.loads(json.dumps(made[3]))
    broken["requested_rewrite"]["prompt"] = HOSTILE
    return [*made, broken, made[5]]


def run_stage(name: str, *arguments: str) -> None:
    """Runs a stage in this process and folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(models, "quiet", lambda: None)  # which is for good
        assert main(STAGES[name].run) == 0


def make(
    root: Path, model: Path, keep: str = "all", blocks: Mapping[str, dict[str, Any]] | None = None, epochs: int = 2
) -> Path:
    """Fills a folder.

    Args:
        root: The folder.
        model: Folder of the base model.
        keep: `training.keep`.
        blocks: Of the methods that are trained, by name; by default those of the default grid.
        epochs: `training.epochs`.

    Returns:
        `root`.
    """
    data = read_yaml(ROOT / "params.yaml")
    data["grid"] = {"models": ["tiny"], "tasks": ["fact"], "methods": list(blocks or METHODS), "seeds": [0]}
    data["grid"]["tune"] = []
    data["models"] = {"tiny": {"kind": "path", "path": str(model)}}
    task = data["tasks"]["fact"]
    task["source"] = {"kind": "file", "path": "rows.jsonl"}
    task["limits"] = {"train": 20, "validation": 6, "test": None}
    task |= {"max_rejected": 0.1, "training": {}}
    data["tasks"] = {"fact": task}
    data["general"] = {"kind": "file", "path": "general.txt", "column": None, "rows": None, "max_length": 16}
    data["training"] |= {"max_length": 32, "batch_size": 4, "epochs": epochs, "threads": 1, "keep": keep}
    data["methods"]["lora"]["r"] = 3
    data["methods"]["molf"]["r"] = [3]
    data["methods"]["molf-e"]["r"] = [2, 5]
    data["methods"] |= blocks or {}
    data["compare"]["bootstrap"] = 200
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(json.dumps(data))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (root / "general.txt").write_text("\n\n".join(f"w{i} w{(5 * i) % 40} w1" + " w2" * i for i in range(20)))
    here = Path.cwd()
    os.chdir(root)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracking, "Store", _no_store)  # setting one up takes 10 s
            run_stage("fetch", "fact")
            run_stage("prepare", "fact")
            run_stage("base", "tiny")
            run_stage("general")
            run_stage("evaluate", "tiny", "fact")
            for method in blocks or METHODS:
                run_stage("train", "tiny", "fact", method, "0")
                run_stage("evaluate", "tiny", "fact", method, "0")
            run_stage("compare")
    finally:
        os.chdir(here)
    return root


def _no_store(*_: object) -> None:
    raise ConnectionError("no store in this test")
