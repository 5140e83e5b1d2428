"""MLflow as a view of results/: every run can be rebuilt from files, so an outage costs nothing but the live view.

A cell's run is a child of its model/task/method's run and is keyed by the cell's fingerprint: a resumed cell reopens
its run, a cell made anew gets a new one. Live and rebuilt runs go through the same functions and so are alike.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from molf import mlflow_cells, mlflow_comparison
from molf.config import Params
from molf.errors import RunError
from molf.mlflow_store import STEP_METRICS, Store, milliseconds, uri_of
from molf.paths import REPORTS, RESULTS, read_json
from molf.secrets import concealed

FLUSH_SECONDS = 3.0  # at the soonest; a slow store is written to less often, see FLUSH_SHARE
FLUSH_SHARE = 0.01  # of the training's time that writing to MLflow may take


def initialise(root: Path, experiment: str) -> bool:
    """Creates the store and the experiment if they lack, so that many processes may then write at once.

    Args:
        root: Project folder; holds mlflow.db and mlartifacts/ unless MLFLOW_TRACKING_URI names another store.
        experiment: Name of the MLflow experiment.

    Returns:
        Whether the store can be used; if not, a warning was printed.
    """
    with _guarded("set-up"):
        Store(experiment, root)
        return True
    return False


class LiveRun:
    """A training's run in MLflow while it trains. Use it through `live_run`.

    After the first failed call it prints one warning and does nothing more: training never waits for a dead tracker.
    """

    def __init__(self, run: Mapping[str, Any], experiment: str, root: Path) -> None:
        self._store: Store | None = None
        self._started = milliseconds(run["started"])
        self._rows: list[Mapping[str, Any]] = []
        self._due = 0.0
        self.run_id: str | None = None
        with _guarded("opening the run"):
            store = Store(experiment, root)
            self.run_id = store.open_cell(run).info.run_id
            store.client.update_run(self.run_id, status="RUNNING")
            self._logged_until = max(store.logged_steps(self.run_id, STEP_METRICS["loss"]), default=0)
            self._store = store

    def log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes rows of history.parquet, buffers them and now and then sends them.

        Args:
            rows: Mappings with `step`, `seconds` and any of `mlflow_store.STEP_METRICS`.
        """
        if self._store is None:
            return
        # A resumed training repeats the steps after its checkpoint; they are in the run already.
        self._rows += [
            {STEP_METRICS.get(key, key): value for key, value in row.items()}
            for row in rows
            if row["step"] > self._logged_until
        ]
        if time.monotonic() >= self._due:
            self._flush()

    def finish(self, results: Path) -> None:
        """Completes the run from the cell's files: what was not sent yet, summary, routing record and heat map.

        Args:
            results: results/CELL, with train/ written.
        """
        if self._store is None:
            return
        self._rows = []  # all in history.parquet by now
        with self._or_off("completing the run"):
            mlflow_cells.complete(self._store, str(self.run_id), results / "train")

    def close(self, status: str) -> None:
        """Sends what is buffered and leaves the run open for a resumed training.

        Args:
            status: MLflow's name of how the training ended: FAILED or KILLED.
        """
        if self._store is not None:
            self._flush()
        if self._store is not None:
            with self._or_off("closing the run"):
                self._store.client.set_terminated(str(self.run_id), status)

    def _flush(self) -> None:
        began = time.monotonic()
        with self._or_off("logging"):
            if self._rows and self._store is not None:
                self._store.log_steps(str(self.run_id), self._started, self._rows)
                self._logged_until = max(row["step"] for row in self._rows)
        self._rows = []
        took = time.monotonic() - began
        self._due = time.monotonic() + max(FLUSH_SECONDS, took / FLUSH_SHARE)

    @contextlib.contextmanager
    def _or_off(self, what: str) -> Iterator[None]:
        done = False
        with _guarded(what):
            yield
            done = True
        if not done:
            self._store = None


@contextlib.contextmanager
def live_run(run: Mapping[str, Any], experiment: str, root: Path = Path()) -> Iterator[LiveRun]:
    """The run of one training, new or reopened by fingerprint; never raises for MLflow's sake.

    Args:
        run: What run.json holds.
        experiment: Name of the MLflow experiment.
        root: Project folder.
    """
    live = LiveRun(run, experiment, root)
    try:
        yield live
    except Exception:
        live.close("FAILED")
        raise
    except BaseException:  # interrupted
        live.close("KILLED")
        raise


def log_evaluation(results: Path, experiment: str, root: Path = Path()) -> None:
    """Adds an evaluation's scores to its cell's run, which is rebuilt if it lacks; an outage gives a warning only.

    Args:
        results: results/CELL, with evaluation/ written.
        experiment: Name of the MLflow experiment.
        root: Project folder.
    """
    with _guarded("logging the evaluation"):
        mlflow_cells.sync(Store(experiment, root), results)


def log_comparison(reports: Path, experiment: str, root: Path = Path()) -> None:
    """Logs a comparison as a run of its own that links its cells' runs; an outage gives a warning only.

    Args:
        reports: The reports folder with comparison.{json,csv}, report.html and figures/.
        experiment: Name of the MLflow experiment.
        root: Project folder.
    """
    with _guarded("logging the comparison"):
        mlflow_comparison.sync(Store(experiment, root), reports, root)


def track(root: Path, params: Params) -> dict[str, int]:
    """Rebuilds every run that lacks or is incomplete from the files of results/ and reports/. Idempotent.

    Args:
        root: Project folder.
        params: Name the MLflow experiment.

    Returns:
        Counts: `cells` found in files, `runs` and `evaluations` logged now, `comparisons` logged now.

    Raises:
        RunError: MLflow cannot be reached or refuses.
    """
    counts = {"cells": 0, "runs": 0, "evaluations": 0, "comparisons": 0}
    try:
        store = Store(params.tracking.experiment, root)
        for results in sorted((root / RESULTS).glob("*/*/*/seed-*")):
            if (results / "train/summary.json").exists() or (results / "evaluation/metrics.json").exists():
                counts["cells"] += 1
                trained, evaluated = mlflow_cells.sync(store, results)
                counts["runs"] += trained
                counts["evaluations"] += evaluated
        if (root / REPORTS / "comparison.json").exists():
            counts["comparisons"] += mlflow_comparison.sync(store, root / REPORTS, root)
    except Exception as error:
        raise RunError(f"MLflow ({concealed(uri_of(root))}): {_first_line(error)}") from error
    return counts


def address(root: Path, experiment: str) -> str:
    """Where MLflow's page shows the experiment, without the server's part; empty where the store has none."""
    with _guarded("looking for the experiment"):
        store = Store.existing(experiment, root)
        return mlflow_comparison.PAGE.format(experiment=store.experiment_id) if store else ""
    return ""


def comparison_address(reports: Path, experiment: str, root: Path) -> str:
    """Where MLflow's page shows this comparison's run, without the server's part; empty where the store has none.

    Args:
        reports: The reports folder, with comparison.json.
        experiment: Name of the MLflow experiment.
        root: Project folder.
    """
    from molf.config import fingerprint

    with _guarded("looking for the comparison"):
        store = Store.existing(experiment, root)
        key = fingerprint(read_json(reports / "comparison.json"))
        run = store.find(kind="comparison", fingerprint=key) if store else None
        return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" if run else ""
    return ""


def find_run(fingerprint: str, experiment: str, root: Path = Path()) -> str | None:
    """MLflow's id of a cell's run; None where the store that is here has none. Makes nothing.

    Args:
        fingerprint: The training's; of the untrained model, the evaluation's.
        experiment: Name of the MLflow experiment.
        root: Project folder.

    Raises:
        RunError: MLflow cannot be reached or refuses.
    """
    try:
        store = Store.existing(experiment, root)
        found = store.find(kind="cell", fingerprint=fingerprint) if store else None
    except Exception as error:
        raise RunError(f"MLflow ({concealed(uri_of(root))}): {_first_line(error)}") from error
    return found.info.run_id if found else None


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Turns any failure into one warning: MLflow is a view, and no work may be lost for it."""
    try:
        yield
    except Exception as error:  # whatever a dead store, server or disk raises
        print(
            f"warning: MLflow, {what}: {_first_line(error)}. Nothing is lost: `molf track` adds it from files later.",
            file=sys.stderr,
        )


def _first_line(error: Exception) -> str:
    text = concealed(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
