"""What the Prefect flow adds to the sum of its cells, beside plain `dvc repro`: `python -m benchmarks.flow`.

The same small grid of real cells (the built-in model on the task fact) twice, each in a clone with a cache of its own:
first by `dvc repro compare`, then by `python -m pipelines.flow` with a temporary server and one slot. Each stage's own
process is timed where it runs; what lies between is DVC's and the flow's. Then both again with nothing to do: what is
constant. At last all is pushed to a folder as a remote. Some 10 minutes on two cores that do nothing else.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import project
from benchmarks.measure import RESULTS, ROOT
from benchmarks.project import git

LIMIT = 0.05  # of the sum of the cells, that orchestration may add beside a constant start
METHODS = ("fft", "lora", "molf")
EPOCHS = 80  # of 25 steps: some minute a cell on two quiet cores
CLOCK = "clock.py"
WATCH = '''"""Runs a stage and notes what it took: python clock.py MODULE ARGUMENT ..."""
import json, os, resource, subprocess, sys, time

started = time.time()
code = subprocess.call([sys.executable, "-m", *sys.argv[1:]])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(os.environ["STAGE_CLOCK"], "a") as file:
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"stage": sys.argv[1:], "start": started, "end": time.time(), "cpu_seconds": cpu}), file=file)
sys.exit(code if code >= 0 else 128 - code)
'''
QUICK: dict[str, Any] = {
    "models.tiny.layers": 1,
    "models.tiny.width": 32,
    "models.tiny.heads": 2,
    "models.tiny.vocabulary": 400,
    "models.tiny.steps": 3,
    "tasks.fact.source.rows": {"train": 24, "validation": 8},
    "tasks.fact.limits": {"train": 24, "validation": 8, "test": None},
    "general.rows": 8,
    "compare.bootstrap": 200,
}


@dataclass(frozen=True)
class Ran:
    """A stage's own process; times as `time.time` has them."""

    name: str
    start: float
    end: float
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def of_cell(self) -> bool:
        return self.name.startswith(("train ", "evaluate "))


def read_clock(path: Path) -> list[Ran]:
    """The stages that ran since the last call, in their order."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    names = [" ".join([row["stage"][0].rpartition(".")[2], *row["stage"][1:]]) for row in rows]
    ran = (Ran(name, row["start"], row["end"], row["cpu_seconds"]) for name, row in zip(names, rows, strict=True))
    return sorted(ran, key=lambda one: one.start)


def between(ran: Sequence[Ran], start: float, end: float) -> dict[str, float]:
    """Where a run's seconds went, if its stages ran one after another.

    Args:
        ran: Its stages, in their order.
        start: When it began.
        end: When it ended.

    Returns:
        Seconds of the cells' stages, of the other stages, from the start to the first stage, between two of the cells'
        stages, and of the rest, what comes before the first cell included; together the whole.
    """
    cells = sum(one.seconds for one in ran if one.of_cell)
    others = sum(one.seconds for one in ran if not one.of_cell)
    first = ran[0].start - start if ran else end - start
    pairs = zip(ran, ran[1:], strict=False)
    gaps = sum(later.start - earlier.end for earlier, later in pairs if earlier.of_cell and later.of_cell)
    rest = end - start - cells - others - first - gaps
    return {"cells": cells, "other_stages": others, "to_the_first_stage": first, "between_cells": gaps, "rest": rest}


def added(flow: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, Any]:
    """What orchestration adds to the sum of the cells.

    Args:
        flow: As `between` has it.
        plain: The same of `dvc repro`.
    """
    share, of_plain = (run["between_cells"] / run["cells"] for run in (flow, plain))
    return {"share": share, "share_of_plain_dvc": of_plain, "limit": LIMIT, "met": share < LIMIT}


def make(folder: Path, changes: Mapping[str, Any]) -> None:
    """A clone whose stages are timed."""
    project.copy(folder, changes)
    (folder / CLOCK).write_text(WATCH)
    graph = (folder / "dvc.yaml").read_text()
    (folder / "dvc.yaml").write_text(graph.replace("python -m molf.stages.", f"python {CLOCK} molf.stages."))
    project.commit(folder, "stages are timed")


def measured(command: Sequence[str], cwd: Path, variables: Mapping[str, str], clock: Path) -> dict[str, Any]:
    """Runs a command and says where its time went."""
    environment = {**variables, "STAGE_CLOCK": str(clock)}
    said: list[str] = []
    start = time.time()
    taken, _ = project.run(command, cwd, environment, lambda line: said.append(f"{time.time() - start:8.2f} {line}"))
    end, ran = time.time(), read_clock(clock)
    return {
        **taken.as_json(),
        **between(ran, start, end),
        "orchestration_cpu_seconds": taken.cpu_seconds - sum(one.cpu_seconds for one in ran),
        "stages": [asdict(one) | {"start": one.start - start, "end": one.end - start} for one in ran],
        "lines": said,
    }


def kept(folder: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Bytes of the cells: outputs by DVC, MLflow's store, and what a push sends."""
    from dvc.utils.serialize import load_yaml

    stages = load_yaml(str(folder / "dvc.lock"))["stages"]
    outs = {out["path"]: out["size"] for stage in stages.values() for out in stage.get("outs", []) if "size" in out}
    remote = folder.parent / "remote"
    project.run(["dvc", "remote", "add", "--default", "here", str(remote)], folder, variables)
    sent, _ = project.run(["dvc", "push", "--run-cache"], folder, variables)
    return {
        "outputs": {path: size for path, size in outs.items() if path.startswith(("weights/", "results/"))},
        "remote": {"bytes": project.size(remote), "run_cache_bytes": project.size(remote / "runs"), **sent.as_json()},
        "mlflow": {
            "database_bytes": project.size(*folder.glob("mlflow.db*")) or (folder / "mlflow.db").stat().st_size,
            "file_bytes": project.size(folder / "mlartifacts"),
        },
        "prefect_bytes": sum(path.stat().st_size for path in (folder.parent / "prefect").glob("prefect.db*")),
        "dvc_lock_bytes": (folder / "dvc.lock").stat().st_size,
    }


def lines(found: Mapping[str, Any]) -> str:
    """The table and the verdict as Markdown."""
    rows = {
        "the whole": "seconds",
        "the cells' own processes": "cells",
        "between these": "between_cells",
        "other stages' own": "other_stages",
        "from the start to the first stage": "to_the_first_stage",
        "the rest": "rest",
        "CPU beside the stages'": "orchestration_cpu_seconds",
    }
    runs = [found[name] for name in ("plain", "flow", "plain_nothing_to_do", "flow_nothing_to_do")]
    text = [
        "| seconds | dvc repro | flow | dvc repro, nothing to do | flow, nothing to do |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | " + " | ".join(f"{run[key]:.1f}" for run in runs) + " |" for name, key in rows.items()),
    ]
    ratio, count = found["added"], sum(stage["name"].startswith("train ") for stage in found["flow"]["stages"])
    verdict = f"less than {ratio['limit']:.0%}: {'yes' if ratio['met'] else 'NO'}"
    of_plain = f"`dvc repro` {ratio['share_of_plain_dvc']:.1%}"
    text.append(f"\nthe flow adds {ratio['share']:.1%} to the sum of its {count} cells ({of_plain}); {verdict}")
    return "\n".join(text)


def run(arguments: Sequence[str]) -> None:
    """Runs both, prints the table and writes the file."""
    options = _options(arguments)

    from benchmarks import table
    from benchmarks.device import Device
    from benchmarks.measure import Settings
    from molf.paths import write_json

    settings = Settings(Device("cpu"), os.cpu_count() or 1, 1, options.quick, None, Path())
    changes = {
        "grid.tasks": ["fact"],
        "grid.methods": options.methods,
        "grid.seeds": [0],
        "models.tiny.steps": 50,
        "tasks.fact.training.epochs": options.epochs,
        "training.threads": settings.threads,
        "flow.cpu_slots": 1,
        **(QUICK if options.quick else {}),
    }
    found: dict[str, Any] = {
        "environment": {**table.environment(settings), "load": os.getloadavg()},
        "params": changes,
    }
    print(table.heading(found["environment"]) + f"\nload {os.getloadavg()[0]:.1f}\n", flush=True)
    path: Path = options.into / f"flow-{'quick' if options.quick else 'cpu'}.json"
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        plain, flow, clock = (Path(scratch) / name for name in ("plain/project", "flow/project", "clock"))
        for folder in (plain, flow):
            folder.mkdir(parents=True)
            make(folder, changes)
        of_plain, of_flow = project.environment(plain), project.environment(flow, MOLF_CHECKOUT=str(flow))
        of_flow["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"  # the flow's code is this checkout's
        orders = {
            "plain": (["dvc", "repro", "compare"], plain, of_plain),
            "plain_nothing_to_do": (["dvc", "repro", "compare"], plain, of_plain),
            "flow": ([sys.executable, "-m", "pipelines.flow"], ROOT, of_flow),
            "flow_nothing_to_do": ([sys.executable, "-m", "pipelines.flow"], ROOT, of_flow),
        }
        for name, (command, cwd, variables) in orders.items():
            print(f"{time.strftime('%H:%M:%S')} {name.replace('_', ' ')} ...", file=sys.stderr, flush=True)
            found[name] = measured(command, cwd, variables, clock)
            if name == "flow":
                branch = git(flow, "branch", "--list", "molf/*", "--format", "%(refname:short)")
                git(flow, "merge", "--quiet", "--ff-only", branch)
            check(found[name], len(options.methods) if not name.endswith("do") else 0)
            del found[name]["lines"]  # thousands, with folders of this machine; the stages say where the time went
        found["kept"] = kept(flow, of_plain)
    found["added"] = added(found["flow"], found["plain"])
    write_json(path, found)
    print(lines(found))
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; all of it: {path}")


def check(run: Mapping[str, Any], cells: int) -> None:
    """Every cell was trained and evaluated, and the untrained model evaluated; or nothing was.

    Raises:
        RuntimeError: Another number of stages ran.
    """
    counts = [sum(re.match(f"{stage} ", ran["name"]) is not None for ran in run["stages"]) for stage in STAGES]
    if counts != ([cells, cells + 1] if cells else [0, 0]):
        raise RuntimeError(f"of {cells} cells ran {counts} stages {STAGES}: " + "\n".join(run["lines"][-20:]))


STAGES = ("train", "evaluate")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="one cell each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of a cell (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, says nothing of speed")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the file (default benchmarks/results)")
    parser.add_argument("--scratch", type=Path, help="folder for the clones (default: the system's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from molf.errors import main

    raise SystemExit(main(lambda: run(sys.argv[1:])))
