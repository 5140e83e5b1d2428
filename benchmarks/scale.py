"""What bookkeeping costs at 10, 100 and 1,000 cells, without training one: `python -m benchmarks.scale`.

DVC over this project's own graph, whose cells' outputs are made up and whose stages never run: reading the graph,
status, a reproduction that finds nothing to do, cells restored from the run cache, one cell in the worktree that
the flow gives it, all pushed to a folder as a remote. Prefect's server on SQLite with task runs that only log lines.
MLflow's SQLite store filled from ready made results. CPU time counts all processes that took part.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import project
from benchmarks.measure import RESULTS, ROOT
from benchmarks.project import Sample, git
from molf.blocks import SPLITS
from molf.config import PARAMS, load_params
from molf.paths import CODE, PREPARED, RATES, write_json
from molf.tuning import choose
from pipelines import checkout, graph
from pipelines.graph import Job

CELLS = (10, 100, 1000)
TASK_RUNS, LINES = 400, 100
TRACKED = 40  # cells in MLflow
STEPS = 400  # of a made up training: rows of its curves
PAGES = "select page_count * page_size from pragma_page_count, pragma_page_size"
LINE = "step 123, loss 1.2345, 12,345 tokens/s".ljust(100, ".")
FIRST, AGAIN = "one cell, the first of all", "one cell, all others known"
TWO, ALL = "two cells restored by dvc repro -s", "all cells restored by pipelines.restore"
DVC = ("dag", "status", "nothing to do", FIRST, AGAIN, TWO, ALL, "pushed")


# --- DVC ------------------------------------------------------------------------------------------------------------


def grid(cells: int) -> dict[str, Any]:
    """A grid of so many trained cells, as keys of params.yaml.

    Raises:
        ValueError: They do not fill one.
    """
    methods = ["fft", "lora", "molf", "molf-e"][: 2 if cells < 100 else 4]
    tasks = ["sql", "fact"][: 1 if cells < 1000 else 2]
    seeds, rest = divmod(cells, len(methods) * len(tasks))
    if rest or not seeds:
        raise ValueError(f"{cells} cells are no grid of {len(tasks)} tasks and {len(methods)} methods")
    return {"grid.tasks": tasks, "grid.methods": methods, "grid.seeds": list(range(seeds))}


def make_up(folder: Path) -> None:
    """Writes outputs of every stage, and what DVC knows of them once it has run: dvc.lock, cache, run cache."""
    from dvc.repo import Repo
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dump_yaml

    with contextlib.chdir(folder), Repo() as repo:  # DVC takes some paths as seen from where it runs
        stages = list(repo.index.stages)
        for stage in stages:
            for out in stage.outs:
                path = Path(out.fs_path)
                for name in _files(path.relative_to(folder)):
                    file = path / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(f"{stage.name} {name}\n" * 20)
        params = load_params(folder / PARAMS)  # two files that cells' stages read a part of
        write_json(folder / RATES, choose(params))
        write_json(folder / CODE, dict.fromkeys(params.methods, "0" * 16))
        locked: dict[str, Any] = {}
        with repo.lock:
            for stage in stages:
                stage.save()
                stage.commit()
                locked |= to_lockfile(stage)
        dump_yaml(str(folder / "dvc.lock"), {"schema": "2.0", "stages": locked})


def _files(out: Path) -> Sequence[str]:
    """Names of the files that an output of a stage has, alike in number to the real ones."""
    if out.suffix:
        return ("",)
    if out.is_relative_to(PREPARED):
        return (*(f"{split}.parquet" for split in SPLITS), "rejected.parquet", "copies.parquet", "summary.json")
    return {
        "weights": ("model.safetensors", "config.json", "generation_config.json"),
        "train": ("history.parquet", "routing.parquet", "summary.json", "run.json"),
        "evaluation": ("predictions.parquet", "general.parquet", "weights.parquet", "metrics.json"),
    }.get("weights" if out.parts[0] == "weights" else out.name, ("one.txt", "two.txt"))


def dvc(scratch: Path, cells: int, rounds: int) -> dict[str, Any]:
    """DVC's commands as the flow gives them, on a grid of so many cells.

    Raises:
        RuntimeError: A command failed, or a stage would have run.
    """
    folder, remote = scratch / "project", scratch / "remote"
    project.copy(folder, grid(cells))
    bare = scratch / "bin"  # a stage that DVC runs instead of restoring it fails
    bare.mkdir()
    (bare / "python").write_text("#!/bin/sh\necho a stage would run >&2\nexit 1\n")
    (bare / "python").chmod(0o755)
    variables = project.environment(folder)
    variables["PATH"] = f"{bare}{os.pathsep}{variables['PATH']}"
    make_up(folder)
    project.commit(folder, "as if it had run")
    found: dict[str, Any] = {"cells": cells}

    def timed(name: str, *command: str, again: int = rounds) -> str:
        taken = [project.run(command, folder, variables) for _ in range(again)]
        found[name] = [sample.as_json() for sample, _ in taken]
        return taken[-1][1]

    dot = timed("dag", "dvc", "dag", "--dot", "compare")
    stages = graph.read(folder, dot)
    names = [stage for job in stages.jobs for stage in job.stages]
    trained = [job for job in stages.jobs if len(job.stages) == 2]
    if len(trained) != cells:
        raise RuntimeError(f"{cells} cells were asked for, but the graph has {len(trained)}")
    stale = json.loads(timed("status", "dvc", "status", "--json").splitlines()[-1])
    if stale:
        raise RuntimeError(f"{len(stale)} stages are not up to date, the first is {min(stale)}: {stale[min(stale)]}")
    timed("nothing to do", "dvc", "repro", "compare")
    for name, known in ((FIRST, names), (AGAIN, list(trained[0].stages))):
        found[name] = [one_cell(folder, trained[0], known, variables) for _ in range(rounds)]
    found["dvc.lock, bytes"] = (folder / "dvc.lock").stat().st_size

    project.run(["dvc", "remote", "add", "--default", "here", str(remote)], folder, variables)
    timed("pushed", "dvc", "push", "--run-cache", again=1)
    files = [path for path in remote.rglob("*") if path.is_file()]
    found["remote"] = {
        "files": len(files),
        "bytes": project.size(remote),
        "run_cache_files": sum("runs" in path.relative_to(remote).parts for path in files),
        "run_cache_bytes": project.size(remote / "runs"),
    }

    few = [stage for job in trained[-2:] for stage in job.stages]
    forget(folder, few)
    said = timed(TWO, "dvc", "repro", "--single-item", *few, again=1)
    if (count := said.count("is cached - skipping run")) != len(few):
        raise RuntimeError(f"{count} of {len(few)} stages came from the run cache: {said[-1000:]}")
    forget(folder, names)
    own = sys.executable, "-m", "pipelines.restore"
    variables["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    said = timed(ALL, *own, *names, again=1)
    if f"{len(names)} of {len(names)} stages restored" not in said:
        raise RuntimeError(f"not all stages came from the run cache: {said[-1000:]}")
    return found


def forget(folder: Path, stages: Sequence[str]) -> None:
    """Removes the outputs of stages and their part of dvc.lock; the cache keeps them."""
    from dvc.utils.serialize import dump_yaml, load_yaml

    lock = load_yaml(str(folder / "dvc.lock"))
    for name in stages:
        for out in lock["stages"].pop(name, {"outs": []})["outs"]:
            shutil.rmtree(folder / out["path"], ignore_errors=True)
    dump_yaml(str(folder / "dvc.lock"), lock)


def one_cell(folder: Path, job: Job, unknown: Sequence[str], variables: dict[str, str]) -> dict[str, Any]:
    """What the flow does for one cell beside its stages' own work: worktree, inputs, DVC twice, worktree removed.

    Args:
        folder: The project.
        job: The cell.
        unknown: Stages that dvc.lock knows nothing of, the cell's among them.
        variables: Environment.
    """
    head = git(folder, "rev-parse", "HEAD")
    made: list[checkout.Place] = []
    parts = {"worktree": project.call(lambda: made.append(checkout.cell_worktree(folder, head, job)))}
    place = made[0]
    forget(place.root, unknown)
    own = {**variables, **place.environment(), "PATH": variables["PATH"]}
    command = ["dvc", "checkout", "--quiet", "--with-deps", "--allow-missing", *job.stages]
    parts["inputs"], _ = project.run(command, place.root, own)
    for stage in job.stages:
        parts[stage.partition("@")[0]], said = project.run(["dvc", "repro", "--single-item", stage], place.root, own)
        if "is cached - skipping run" not in said:
            raise RuntimeError(f"{stage} did not come from the run cache: {said}")
    parts["removed"] = project.call(lambda: checkout.remove_worktree(folder, place.root))
    return {
        **_sum(parts.values()).as_json(),
        "parts": {name: sample.as_json() for name, sample in parts.items()},
    }


def _sum(samples: "Sequence[Sample] | Any") -> Sample:
    taken = list(samples)
    return Sample(
        sum(sample.seconds for sample in taken),
        sum(sample.cpu_seconds for sample in taken),
        max(sample.load for sample in taken),
    )


# --- Prefect --------------------------------------------------------------------------------------------------------


def prefect(scratch: Path, task_runs: int, lines: int) -> dict[str, Any]:
    """Task runs per second on a server of its own with SQLite, bytes of a task run and of a line of a log."""
    from pipelines.server import server

    home = scratch / "prefect"
    home.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    found: dict[str, Any] = {"task_runs": task_runs, "lines": task_runs * lines // 10}
    database = home / "prefect.db"
    with (scratch / "server.log").open("wb") as output, server(port, {"PREFECT_HOME": str(home)}, output) as api:
        variables = project.environment(scratch, PREFECT_API_URL=api, PREFECT_HOME=str(home))
        variables["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
        child = [sys.executable, "-m", "benchmarks.scale", "--task-runs-of"]
        project.run([*child, "2", "1"], ROOT, variables)  # fills the server's caches
        for name, count, each in (("silent", task_runs, 0), ("with lines", task_runs // 10, lines)):
            before, cpu, known = _pages(database), _cpu_below(os.getpid()), _completed(database)
            taken, said = project.run([*child, str(count), str(each)], ROOT, variables)
            while _completed(database) < known + count:  # the server writes them after the flow run has ended
                time.sleep(0.1)
            seconds = time.time() - json.loads(said.splitlines()[-1])["started"]
            bytes_ = _pages(database) - before
            found[name] = {
                "seconds": seconds,
                "client": taken.as_json(),
                "server_cpu_seconds": _cpu_below(os.getpid()) - cpu,
                "bytes": bytes_,
            }
    a_run = found["silent"]["bytes"] / task_runs
    found["bytes_a_task_run"] = a_run
    found["bytes_a_line"] = (found["with lines"]["bytes"] - a_run * (task_runs // 10)) / max(1, found["lines"])
    found["task_runs_a_second"] = task_runs / found["silent"]["seconds"]
    return found


def task_runs_of(count: int, lines: int) -> None:
    """A flow run of so many tasks, eight at once, each with so many lines in its log; prints when they began."""
    from prefect import flow, get_run_logger, task
    from prefect.cache_policies import NO_CACHE
    from prefect.task_runners import ThreadPoolTaskRunner

    @task(cache_policy=NO_CACHE)
    def one() -> None:
        logger = get_run_logger()
        for _ in range(lines):
            logger.info(LINE)

    runner: Any = ThreadPoolTaskRunner(max_workers=8)
    started: list[float] = []

    @flow(task_runner=runner)
    def many() -> None:
        started.append(time.time())
        for future in [one.submit() for _ in range(count)]:
            future.wait()

    many()
    print(json.dumps({"started": started[0]}))


def _completed(database: Path) -> int:
    """Task runs that the server knows to have ended well."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as store:
        return int(store.execute("select count(*) from task_run where state_type = 'COMPLETED'").fetchone()[0])


def _pages(database: Path, still: float = 4.0) -> int:
    """Bytes of an SQLite database, once it has not grown for some seconds: events and logs come late."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < still:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as store:
            size = store.execute(PAGES).fetchone()[0]
        if size != last:
            last, since = size, time.monotonic()
        time.sleep(0.5)
    return int(last)


def _cpu_below(pid: int) -> float:
    """CPU seconds of all processes below one that run at this moment, and of their children that have ended."""
    from pipelines.guard import descendants

    total = 0
    for child in descendants(pid):
        try:
            text = Path(f"/proc/{child}/stat").read_text()
        except OSError:
            continue
        total += sum(map(int, text.rpartition(")")[2].split()[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


# --- MLflow ---------------------------------------------------------------------------------------------------------


def mlflow(scratch: Path, cells: int, steps: int) -> dict[str, Any]:
    """A store on SQLite, filled from made up results of four methods: bytes and seconds a cell."""
    from molf import mlflow_cells
    from molf.mlflow_store import Store
    from tests.report import fake

    folder = scratch / "tracked"
    folder.mkdir()
    with patch.multiple(fake, STEPS=steps, MODULES=[f"model.layers.{i}.{m}" for i in range(4) for m in "abcdefg"]):
        params = fake.write_tree(folder, fake.raw_params(("sql",), tuple(range(cells // 4))))
    with patch.dict(os.environ):
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        store = Store("scale", folder)
        database, files = folder / "mlflow.db", folder / "mlartifacts"
        empty = database.stat().st_size
        taken = []
        for cell in params.cells():
            sample = project.call(partial(mlflow_cells.sync, store, folder / cell.results))
            taken.append({"method": cell.method, **sample.as_json()})
    return {
        "cells": len(taken),
        "steps": steps,
        "database_bytes_a_cell": (database.stat().st_size - empty) / len(taken),
        "file_bytes_a_cell": project.size(files) / len(taken),
        "empty_database_bytes": empty,
        "samples": taken,
    }


# --- all of it ------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    text = (
        []
        if not found["dvc"]
        else [
            "| DVC, CPU seconds (seconds on the wall) | "
            + " | ".join(f"{run['cells']:,} cells" for run in found["dvc"])
            + " |",
            "| --- |" + " --- |" * len(found["dvc"]),
        ]
    )
    for name in DVC if found["dvc"] else ():
        text.append(f"| {name} | " + " | ".join(_amount(run, name) for run in found["dvc"]) + " |")
    if found["dvc"]:
        files = (f"{run['remote']['files'] / run['cells']:.1f}" for run in found["dvc"])
        text.append("| files pushed a cell | " + " | ".join(files) + " |")
        kilobytes = (f"{run['remote']['run_cache_bytes'] / run['cells'] / 1000:.1f} kB" for run in found["dvc"])
        text.append("| run cache pushed a cell | " + " | ".join(kilobytes) + " |")
    if "prefect" in found:
        it = found["prefect"]
        both = it["silent"]["server_cpu_seconds"] + it["silent"]["client"]["cpu_seconds"]
        text += [
            "",
            "| Prefect on SQLite | |",
            "| --- | --- |",
            f"| task runs a second | {it['task_runs_a_second']:.1f} |",
            f"| CPU a task run, server and client | {both / it['task_runs'] * 1000:.0f} ms |",
            f"| database a task run | {it['bytes_a_task_run'] / 1000:.1f} kB |",
            f"| database a line of a log | {it['bytes_a_line']:.0f} B |",
        ]
    if "mlflow" in found:
        it = found["mlflow"]
        cpu = {
            method: statistics.median(sample["cpu_seconds"] for sample in it["samples"] if sample["method"] == method)
            for method in dict.fromkeys(sample["method"] for sample in it["samples"])
        }
        text += [
            "",
            "| MLflow on SQLite, a cell | |",
            "| --- | --- |",
            f"| database, {it['steps']} steps | {it['database_bytes_a_cell'] / 1e6:.2f} MB |",
            f"| files | {it['file_bytes_a_cell'] / 1e6:.2f} MB |",
            "| CPU | " + ", ".join(f"{method} {seconds:.1f} s" for method, seconds in cpu.items()) + " |",
        ]
    return "\n".join(text)


def _amount(run: dict[str, Any], name: str) -> str:
    cpu, seconds = (statistics.median(sample[key] for sample in run[name]) for key in ("cpu_seconds", "seconds"))
    return f"{cpu:.1f} ({seconds:.1f})"


def run(arguments: Sequence[str]) -> None:
    """Measures what was asked for, prints the tables and writes the samples."""
    options = _options(arguments)

    from benchmarks import table
    from benchmarks.device import Device
    from benchmarks.measure import Settings
    from molf.paths import write_json

    settings = Settings(Device("cpu"), os.cpu_count() or 1, options.rounds, False, None, Path())
    found: dict[str, Any] = {"environment": {**table.environment(settings), "load": os.getloadavg()}, "dvc": []}
    print(table.heading(found["environment"]) + f"\nload {os.getloadavg()[0]:.1f}\n", flush=True)
    path: Path = options.into / "scale-cpu.json"
    parts: list[tuple[str, Callable[[Path], Any]]] = [
        ("prefect", partial(prefect, task_runs=options.task_runs, lines=options.lines)),
        ("mlflow", partial(mlflow, cells=options.tracked, steps=options.steps)),
        *((str(cells), partial(dvc, cells=cells, rounds=options.rounds)) for cells in options.cells),
    ]
    for name, measure in parts:
        print(f"measuring {name if name.isalpha() else f'DVC with {name} cells'} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            result = measure(Path(scratch))
        if name.isalpha():
            found[name] = result
        else:
            found["dvc"].append(result)
        write_json(path, found)  # after each part, for the last takes the longest
    print(lines(found))
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; all samples: {path}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--cells", type=int, nargs="*", default=CELLS, help="sizes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="samples of DVC's commands (default: %(default)s)")
    parser.add_argument("--task-runs", type=int, default=TASK_RUNS, help="of Prefect (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=LINES, help="in a task run's log (default: %(default)s)")
    parser.add_argument("--tracked", type=int, default=TRACKED, help="cells in MLflow (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a made up training (default: %(default)s)")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the file (default benchmarks/results)")
    parser.add_argument("--scratch", type=Path, help="folder for the projects (default: the system's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from molf.errors import main

    if sys.argv[1:2] == ["--task-runs-of"]:
        task_runs_of(int(sys.argv[2]), int(sys.argv[3]))
    else:
        raise SystemExit(main(lambda: run(sys.argv[1:])))
