"""A project whose stages have the names and the grid of the real ones, but only write files: a flow takes seconds.

Each stage notes in the folder TOY that it ran; a file there named like the stage tells it to fail. It is not a test.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from molf.paths import own_tools
from pipelines import checkout
from tests.conftest import QUIET, ROOT

STAGE = '''"""A stage of the toy: python stage.py NAME DEPENDENCY ... -- OUTPUT ..."""
import json, os, pathlib, sys, time

name, *rest = sys.argv[1:]
cut = rest.index("--")
needed, made = rest[:cut], rest[cut + 1:]
toy = pathlib.Path(os.environ["TOY"])
with (toy / "ran.log").open("a") as file:
    shown = {key: os.environ.get(key) for key in ("MOLF_MICRO_BATCHES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    print(json.dumps({"stage": name, "cwd": os.getcwd(), "time": time.time(), **shown}), file=file)
order, mark, told = toy / name, os.environ.get("TOY_MARK", ""), {}
if order.exists():
    told = json.loads(order.read_text())
    if told.get("times", 1) > 0:
        order.write_text(json.dumps({**told, "times": told.get("times", 1) - 1}))
        mark = told.get("mark", mark)
        if "say" in told:
            print(told["say"], flush=True)
        if "sleep" in told or "until" in told:
            (toy / f"{name}.pid").write_text(str(os.getpid()))
            time.sleep(told.get("sleep", 0))
        while "until" in told and not os.path.exists(told["until"]):
            time.sleep(0.1)
        if "signal" in told:
            os.kill(os.getpid(), told["signal"])
        if "exit" in told:
            sys.exit(told["exit"])
for path in map(pathlib.Path, needed):
    assert path.exists(), f"{path} lacks"
print(f"{name} is made", flush=True)
if name == "compare":
    pathlib.Path("reports/figures").mkdir(parents=True, exist_ok=True)
    pathlib.Path("reports/figures/score.txt").write_text("")
    pathlib.Path("reports/report.html").write_text("<p>toy</p>")
    pathlib.Path("reports/comparison.csv").write_text("method\\n")
    found = sorted(map(str, pathlib.Path("results").glob("*/*/*/*/evaluation")))
    lacking = pathlib.Path("results/lacking.json")
    comparison = {
        "sentence": f"{len(found)} evaluations compared.", "groups": [], "data": {}, "cells": [], "hardware": [],
        "margin": 0.015, "confidence": 0.95, "interval": "none", "grid": {}, "bootstrap": 100, "seed": 0,
        "lacking": json.loads(lacking.read_text()) if lacking.exists() else {},
    }
    pathlib.Path("reports/comparison.json").write_text(json.dumps(comparison))
elif name == "choose":
    wanted = json.loads((toy / "choice.json").read_text()) if (toy / "choice.json").exists() else {}
    chosen = {}
    for path in pathlib.Path("sweeps").glob("*/*/*"):
        model, task, method = path.parts[1:]
        chosen.setdefault(model, {}).setdefault(task, {})[method] = wanted.get(method, 1.0)
    pathlib.Path("results").mkdir(exist_ok=True)
    pathlib.Path("results/rates.json").write_text(json.dumps({"chosen": chosen}))
else:
    for path in map(pathlib.Path, made):
        path.mkdir(parents=True, exist_ok=True)
        (path / "made.txt").write_text(name + mark)
        (path / "other.txt").write_text(told.get("other", ""))
'''
CELL = "${item.model}/${item.task}/${item.method}/seed-${item.seed}"
AXES = {axis: f"${{grid.{axis}s}}" for axis in ("model", "task", "method", "seed")}


def _stage(name: str, needs: list[str], makes: list[str], params: list[Any], **more: Any) -> dict[str, Any]:
    command = ["python", "stage.py", name, *needs, "--", *makes]
    return {**more, "cmd": " ".join(command), "deps": [*needs, "stage.py"], "params": params, "outs": makes}


def graph(sweeps: bool = False) -> dict[str, Any]:
    """The toy's dvc.yaml, with the stages of sweeps or without."""
    cell = "@${item.model}-${item.task}-${item.method}-${item.seed}"
    base = "results/${item.model}/${item.task}/base/seed-0/evaluation"
    data = ["models/${item.model}", "data/prepared/${item.task}"]
    trained = [f"weights/{CELL}", f"results/{CELL}/train"]
    compare = _stage("compare", ["results"], ["reports/report.html", "reports/comparison.csv"], ["grid", "compare"])
    compare["outs"].append("reports/figures")
    compare["metrics"] = ["reports/comparison.json"]
    trial = "${item.model}-${item.task}-${item.method}-${item.factor}"
    parts = ["models/${item.model}", "data/prepared/${item.task}/made.txt"]
    tried = ["sweeps/${item.model}/${item.task}/${item.method}/factor-${item.factor}"]
    axes = {axis: AXES[axis] for axis in ("model", "task", "method")} | {"factor": "${grid.tune}"}
    chosen = {"results/rates.json": ["chosen.${item.model}.${item.task}.${item.method}"]}
    tuned = {
        "sweep": _stage(f"sweep@{trial}", parts, tried, ["methods.${item.method}"], matrix=axes),
        "choose": _stage("choose", ["sweeps"], ["results/rates.json"], ["grid.tune", "grid.methods"]),
    }
    return {
        "stages": {
            "prepare": {
                "foreach": "${tasks}",
                "do": _stage("prepare@${key}", [], ["data/prepared/${key}"], ["tasks.${key}.kind"]),
            },
            "base": {"foreach": "${models}", "do": _stage("base@${key}", [], ["models/${key}"], ["models.${key}"])},
            "baseline": _stage(
                "baseline@${item.model}-${item.task}",
                data,
                [base],
                ["evaluation"],
                matrix={axis: AXES[axis] for axis in ("model", "task")},
            ),
            **(tuned if sweeps else {}),
            "train": _stage(
                f"train{cell}",
                data,
                trained,
                ["training", "methods.${item.method}", *([chosen] if sweeps else [])],
                matrix=AXES,
            ),
            "evaluate": _stage(
                f"evaluate{cell}", [*data, *trained], [f"results/{CELL}/evaluation"], ["evaluation"], matrix=AXES
            ),
            "compare": compare,
        }
    }


class Toy:
    """A toy project below a folder.

    Args:
        folder: Empty; gets `project`, `notes` and Prefect's home.
        server: Address of a Prefect server's API; without, each flow starts one of its own.
        grid: Lists of params.yaml's grid that differ from one task and two methods; of `tune`, also its stages.
    """

    def __init__(self, folder: Path, server: str | None = None, **grid: list[Any]) -> None:
        self.server = server
        self.root, self.notes, self.prefect = folder / "project", folder / "notes", folder / "prefect"
        for path in (self.root / ".dvc", self.notes):
            path.mkdir(parents=True)
        for name in ("params.yaml", ".gitignore", ".dvcignore", "sources.lock"):
            (self.root / name).write_text((ROOT / name).read_text())
        (self.root / ".dvc/config").write_text("[core]\n    analytics = false\n")
        (self.root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (self.root / "stage.py").write_text(STAGE)
        with (self.root / "dvc.yaml").open("w") as file:
            YAML().dump(graph(sweeps="tune" in grid), file)
        (self.root / "sweeps").mkdir()
        (self.root / "sweeps/.gitignore").write_text((ROOT / "sweeps/.gitignore").read_text())
        grid = {"tasks": ["fact"], "methods": ["fft", "lora"], **grid}
        self.edit({f"grid.{axis}": values for axis, values in grid.items()})
        self.git("init", "--quiet", "--initial-branch", "main")
        self.commit("start")

    @property
    def environment(self) -> dict[str, str]:
        """For a flow that works on this project; the molf and the pipelines are those under test."""
        found = {
            **own_tools(),
            **QUIET,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "MOLF_CHECKOUT": str(self.root),
            "TOY": str(self.notes),
            "PREFECT_HOME": str(self.prefect),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            found.pop(name, None)
        if self.server:
            found["PREFECT_API_URL"] = self.server
        return found

    def git(self, *arguments: str) -> str:
        return checkout.git(self.root, *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        self.git(*author, "commit", "--quiet", "-m", message)

    def edit(self, changes: Mapping[str, Any]) -> None:
        """Changes params.yaml by dotted keys."""
        checkout.edit(self.root / "params.yaml", changes)

    def repro(self) -> list[str]:
        """`dvc repro` without a flow; returns the stages that ran, but for the comparison."""
        done = subprocess.run(
            ["dvc", "repro", "compare"],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [entry["stage"] for entry in self.ran() if entry["stage"] != "compare"]

    def choose(self, **factors: float) -> None:
        """Has the stage `choose` take a factor other than 1.0 for a method."""
        (self.notes / "choice.json").write_text(json.dumps(factors))

    def tell(self, stage: str, **order: Any) -> None:
        """Tells a stage to misbehave `times` times: say=, sleep=, until= a file is there,
        signal=, exit=; or to make something else: mark=, or other= in another file."""
        (self.notes / stage).write_text(json.dumps(order))

    def ran(self) -> list[dict[str, Any]]:
        """What ran since the last call, in its order."""
        path = self.notes / "ran.log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Starts a flow run in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.flow", *arguments],
            cwd=self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def flow(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """A flow run to its end; returns what it printed."""
        with self.start(*arguments, **environment) as process:
            said, _ = process.communicate()
        assert process.returncode == code, said
        return said
