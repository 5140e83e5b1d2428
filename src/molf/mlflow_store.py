"""MLflow's store: finds, creates and fills the runs of one experiment. All here may raise; tracking.py guards it."""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.errors import RunError
from molf.paths import BASE_METHOD, Cell, read_json
from molf.report import quality

if TYPE_CHECKING:
    from mlflow.entities import Run

# No telemetry, and an unreachable server is given up within seconds: MLflow's own defaults wait for many minutes.
for _key, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_key, _value)

STEP_METRICS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
ROUTING_SHARE = "routing_share_"  # + expert: its share of the module-steps so far
SUMMARY_METRICS = ("train_seconds", "peak_memory_bytes", "trained_parameters", "weights_bytes", "final_loss", "steps")
LOCK_SECONDS = 60.0  # creating a fresh SQLite store takes some 10 s; longer than this means that its owner hangs
MAX_METRICS, MAX_PARAMS = 1000, 100  # in one batch, by MLflow's API
MAX_PARAM_LENGTH = 6000  # characters of one value, by MLflow's API
MAX_TAG_LENGTH, MAX_DIGEST_LENGTH = 5000, 36  # characters, likewise
TABLES = "mlflow.loggedArtifacts"  # tag by which MLflow's page knows which files are tables


class Store:
    """One experiment of an MLflow store: finds and fills its runs, always through MlflowClient.

    The client takes parents as tags; the fluent API would let MLFLOW_RUN_ID of the environment win over them.

    Args:
        experiment: Name of the MLflow experiment; created if it lacks.
        root: Project folder.

    Raises:
        RunError: The local store was made in another folder.
        Exception: Whatever MLflow raises.
    """

    def __init__(self, experiment: str, root: Path) -> None:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # after the import, which sets them to INFO
            logging.getLogger(name).setLevel(logging.WARNING)

        self._root = root
        uri = uri_of(root)
        # A server chooses the place itself; MLflow freezes it at creation, so that a local one must be given in full.
        local = None if uri.startswith(("http://", "https://")) else (root / "mlartifacts").resolve().as_uri()
        with _locked(root):
            self.client = MlflowClient(tracking_uri=uri)
            known = self.client.get_experiment_by_name(experiment)
            self.experiment_id: str = (
                known.experiment_id if known else self.client.create_experiment(experiment, artifact_location=local)
            )
        if known and local and known.artifact_location != local:
            raise RunError(
                f"its artifacts lie in {known.artifact_location}, made when the project was elsewhere; "
                "remove mlflow.db and mlartifacts, then `molf track` rebuilds both"
            )

    def find(self, **tags: str) -> "Run | None":
        """The oldest run with these `molf.` tags."""
        where = " and ".join(f"tags.`molf.{key}` = '{value}'" for key, value in tags.items())
        runs = self.client.search_runs(
            [self.experiment_id], where, max_results=1, order_by=["attributes.start_time ASC"]
        )
        return runs[0] if runs else None

    @classmethod
    def existing(cls, experiment: str, root: Path) -> "Store | None":
        """The store if it holds the experiment; unlike the constructor it makes nothing."""
        from mlflow import MlflowClient

        uri = uri_of(root)
        file = uri.removeprefix("sqlite:///")
        if file != uri and not Path(file).is_file():
            return None
        return cls(experiment, root) if MlflowClient(uri).get_experiment_by_name(experiment) else None

    def open_cell(self, run: Mapping[str, Any]) -> "Run":
        """The cell's run by its fingerprint; if it lacks, a new one below its model/task/method, with params and data.

        Args:
            run: What run.json holds.
        """
        cell = Cell(**run["cell"])
        with _locked(self._root):
            found = self.find(kind="cell", fingerprint=run["fingerprint"])
            if found is None:
                tags = {
                    **_tags("cell", cell),
                    "mlflow.parentRunId": self._parent(cell),
                    "molf.seed": str(cell.seed),
                    "molf.cell": cell.name,
                    "molf.fingerprint": run["fingerprint"],
                    "molf.config_hash": _hash(run.get("config", {})),
                    "molf.git_commit": str(run.get("git_commit") or "none"),
                    "molf.lineage": f"molf lineage {cell.name}",
                    "molf.hardware": str(run.get("hardware", {}).get("name", "unknown")),
                    "molf.generated_data": json.dumps(bool(run.get("generated_data"))),
                    "mlflow.source.name": "molf",
                    "mlflow.source.type": "LOCAL",
                }
                if run.get("git_commit"):
                    tags["mlflow.source.git.commit"] = run["git_commit"]
                started = milliseconds(run["started"]) if "started" in run else None
                found = self.client.create_run(self.experiment_id, started, tags, run_name=cell.name)
        self._describe(found, run)
        return found

    def logged_steps(self, run_id: str, metric: str) -> set[int]:
        """The steps at which a run has a metric."""
        return {point.step for point in self.client.get_metric_history(run_id, metric)}

    def log_steps(self, run_id: str, started: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Logs rows of a history, each number at its step; numbers that are not finite are left out.

        Args:
            run_id: MLflow's id of the run.
            started: Start of the training, ms since 1970; with the rows' `seconds` it gives their time.
            rows: As `LiveRun.log` takes them.
        """
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), started + round(1000 * row["seconds"]), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if (key in STEP_METRICS or key.startswith(ROUTING_SHARE)) and value is not None and math.isfinite(value)
        ]
        for i in range(0, len(points), MAX_METRICS):
            self.client.log_batch(run_id, metrics=points[i : i + MAX_METRICS])

    def complete(self, run_id: str, train: Path) -> None:
        """Brings a run up to the files of results/CELL/train, then ends it: FINISHED means that nothing is missing."""
        run, summary = read_json(train / "run.json"), read_json(train / "summary.json")
        rows = _history_rows(train)
        keys = {key for row in rows for key in row if key in STEP_METRICS or key.startswith(ROUTING_SHARE)}
        logged = {key: self.logged_steps(run_id, key) for key in keys}
        missing = [
            {key: value for key, value in row.items() if key not in keys or row["step"] not in logged[key]}
            for row in rows
        ]
        started = milliseconds(run["started"])
        self.log_steps(run_id, started, missing)
        self._log_values(run_id, {key: summary[key] for key in SUMMARY_METRICS if summary.get(key) is not None})
        self._log_files(run_id, "train", train / "run.json", train / "summary.json", train / "history.parquet")
        if (train / "routing.parquet").exists():
            self._log_routing(run_id, train, Cell(**run["cell"]))
        for warning in summary.get("warnings", [])[:1]:
            self.client.set_tag(run_id, "molf.warning", warning)
        self._log_data(run_id, "data", run["data"])
        if "lineage" in summary:
            self.client.set_tag(run_id, "molf.weights_hash", summary["lineage"]["weights"]["hash"])
        self.client.set_terminated(run_id, "FINISHED", started + round(1000 * summary["train_seconds"]))

    def sync_cell(self, results: Path) -> tuple[bool, bool]:
        """Brings a cell's run up to its files.

        Args:
            results: results/CELL.

        Returns:
            Whether the training's part was logged now, and whether the evaluation's was.
        """
        metrics = _read(results / "evaluation/metrics.json")
        if (results / "train/summary.json").exists():
            run = read_json(results / "train/run.json")
        elif metrics and metrics["cell"]["method"] == BASE_METHOD:
            run = {"cell": metrics["cell"], "fingerprint": metrics["fingerprint"], **_asked(metrics)}
        else:
            return False, False
        known = self.find(kind="cell", fingerprint=run["fingerprint"])
        found = known if known and known.info.status == "FINISHED" else self.open_cell(run)
        run_id = found.info.run_id
        trained = found.info.status != "FINISHED" and "started" in run
        if trained:
            self.complete(run_id, results / "train")
        # An evaluation of another training must not be shown as this one's.
        fits = metrics and (metrics.get("train_fingerprint") == run["fingerprint"] or "started" not in run)
        evaluated = bool(fits and found.data.tags.get("molf.evaluation") != metrics["fingerprint"])
        if evaluated:
            values = {"primary": metrics["primary"], "n": metrics["n"], **_numbers(metrics["metrics"])}
            self._log_values(run_id, {f"test/{key}": value for key, value in values.items()})
            self._log_files(run_id, "evaluation", *sorted((results / "evaluation").glob("*.*")))
            self.client.set_tag(run_id, "molf.primary", metrics["primary_name"])
            for key, value in _hashes(metrics.get("lineage", {})).items():
                self.client.set_tag(run_id, key, value)
            self.client.set_tag(run_id, "molf.evaluation", metrics["fingerprint"])
            if "started" not in run:
                self.client.set_terminated(run_id, "FINISHED")
        return trained, evaluated

    def sync_comparison(self, reports: Path, root: Path) -> bool:
        """Logs reports/ as a run of its own unless this very comparison has one; returns whether it was logged now."""
        from molf.report.page import markdown_table

        comparison = read_json(reports / "comparison.json")
        key = _hash(comparison)
        found = self.find(kind="comparison", fingerprint=key)
        if found is not None and found.info.status == "FINISHED":
            return False
        if found is None:
            tags = {
                "molf.kind": "comparison",
                "molf.fingerprint": key,
                "mlflow.note.content": markdown_table(comparison),
            }
            found = self.client.create_run(self.experiment_id, tags=tags, run_name="comparison")
        run_id = found.info.run_id
        for group in comparison["groups"]:
            for method in group["methods"]:
                place = f"{group['model']}/{group['task']}/{method['method']}"
                self._log_values(run_id, {place: method["mean"]})
                for seed in method["per_seed"]:
                    cell = Cell(group["model"], group["task"], method["method"], seed["seed"])
                    self.sync_cell(root / cell.results)
                    child = self.find(kind="cell", fingerprint=seed["train_fingerprint"])
                    if child is not None:
                        self.client.set_tag(run_id, f"molf.run.{cell.name}", child.info.run_id)
        for task, data in comparison["data"].items():
            self._log_data(run_id, f"data/{task}", data)
        self._log_params(run_id, {"margin": comparison["margin"], "confidence": comparison["confidence"]})
        self._log_files(
            run_id, None, *(reports / name for name in ("comparison.json", "comparison.csv", "report.html"))
        )
        self._log_files(run_id, "figures", *sorted((reports / "figures").glob("*.png")))
        self.client.set_terminated(run_id, "FINISHED")
        return True

    def _parent(self, cell: Cell) -> str:
        """The run of a model, task and method, below which its seeds lie."""
        tags = _tags("method", cell)
        found = self.find(kind="method", model=cell.model, task=cell.task, method=cell.method)
        if found is None:
            name = f"{cell.model}/{cell.task}/{cell.method}"
            found = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
            self.client.set_terminated(found.info.run_id, "FINISHED")
        return str(found.info.run_id)

    def _describe(self, found: "Run", run: Mapping[str, Any]) -> None:
        """Logs params, hashes and data set of a cell where they lack: a kill may have left a run half described."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run_id, data = found.info.run_id, run.get("data")
        params = {**run["cell"], **flatten(run.get("config", {})), "model_hash": run.get("model", {}).get("hash")}
        if data:
            params["data_hash"] = data["hash"]
        self._log_params(run_id, {key: value for key, value in params.items() if key not in found.data.params})
        tags = {"model_hash": params["model_hash"], "data_hash": params.get("data_hash"), "code_hash": run.get("code")}
        if data:
            tags |= {"data_source": quality.origin(data.get("source")), "data_license": data.get("license")}
        for key, value in tags.items():
            if value and f"molf.{key}" not in found.data.tags:
                self.client.set_tag(run_id, f"molf.{key}", str(value)[:MAX_TAG_LENGTH])
        if data and not (found.inputs and found.inputs.dataset_inputs):
            task = run["cell"]["task"]
            kind, source = data_source(data.get("source"), task)
            dataset = Dataset(
                name=task,
                digest=str(data["hash"])[:MAX_DIGEST_LENGTH],
                source_type=kind,
                source=json.dumps(source),
                profile=json.dumps({"prepared": f"data/prepared/{task}", **data}),
            )
            context = "evaluation" if run["cell"]["method"] == BASE_METHOD else "training"
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def _log_data(self, run_id: str, folder: str, data: Mapping[str, Any]) -> None:
        """Logs what is known of a data set: whole as JSON, its tables, and the counts that must not go unseen."""
        shown = [{"path": f"{folder}/{_slug(table.title)}.json", "type": "table"} for table in quality.tables(data)]
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "summary.json"
            path.write_text(json.dumps(data, indent=2), encoding="utf-8")
            self._log_files(run_id, folder, path)
            for table in quality.tables(data):
                path = Path(name) / f"{_slug(table.title)}.json"
                # As `MlflowClient.log_table` writes it, which would add the rows once more each time.
                path.write_text(json.dumps({"columns": table.header, "data": table.rows}), encoding="utf-8")
                self._log_files(run_id, folder, path)
        known = json.loads(self.client.get_run(run_id).data.tags.get(TABLES, "[]"))
        if any(table not in known for table in shown):
            tables = [*known, *(table for table in shown if table not in known)]
            self.client.set_tag(run_id, TABLES, json.dumps(tables))
        leaks, kept = quality.leaked(data)
        counts = {"rejected": quality.rejected(data), "leaks": leaks, "leaks_kept": kept}
        self._log_values(run_id, {f"{folder}/{key}": count for key, count in counts.items()})

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        known = [Param(key, _text(value)[:MAX_PARAM_LENGTH]) for key, value in params.items() if value is not None]
        for i in range(0, len(known), MAX_PARAMS):
            self.client.log_batch(run_id, params=known[i : i + MAX_PARAMS])

    def _log_values(self, run_id: str, values: Mapping[str, float]) -> None:
        """Logs numbers without steps, those that the run does not show already."""
        from mlflow.entities import Metric

        shown = self.client.get_run(run_id).data.metrics
        now = round(1000 * time.time())
        points = [Metric(key, float(value), now, 0) for key, value in values.items() if shown.get(key) != float(value)]
        if points:
            self.client.log_batch(run_id, metrics=points)

    def _log_files(self, run_id: str, folder: str | None, *paths: Path) -> None:
        for path in paths:
            if path.exists():
                self.client.log_artifact(run_id, str(path), folder)

    def _log_routing(self, run_id: str, train: Path, cell: Cell) -> None:
        from molf.report.routing_figures import read_routing, routing_heat_map
        from molf.report.style import save

        self._log_files(run_id, "routing", train / "routing.parquet")
        routing = read_routing(train)
        if routing.empty:  # no step at a rate above 0
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "heat_map.png"
            save(routing_heat_map({cell.method: routing}, f"{cell.name}: where the updates went"), path)
            self._log_files(run_id, "routing", path)


def data_source(source: Any, task: str) -> tuple[str, dict[str, Any]]:
    """A data set's source as MLflow knows sources: its type and what `mlflow.data.get_source` reads.

    Args:
        source: As source.json has it.
        task: Whose prepared rows are named where the source is not known.
    """
    match source:
        case {"kind": "generated"}:
            return "code", {"tags": {"mlflow.source.name": "molf.generate", "seed": str(source.get("seed"))}}
        case {"kind": "hub"}:
            keys = {"path": source.get("id"), "config_name": source.get("config"), "revision": source.get("revision")}
            return "hugging_face", keys
        case {"kind": "url" | "file", "files": {"train": _}}:
            places = [str(file["from"]) for file in quality.files_of(source)["train"]]
            scheme = places[0].partition("://")[0] if "://" in places[0] else "local"
            if scheme in ("http", "https"):
                return "http", {"url": places[0]}
            return scheme, {"uri": places[0] if len(places) == 1 or scheme != "local" else os.path.commonpath(places)}
    return "local", {"uri": f"data/prepared/{task}"}


def _asked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the untrained model's run shows of its data and model, as far as the evaluation noted it."""
    seen = metrics.get("lineage", {})
    if "source" not in seen:
        return {}
    return {
        "data": {"hash": metrics["data_hash"], "source": seen["source"]},
        "model": seen["model"],
        "git_commit": seen["git_commit"],
    }


def _hashes(seen: Mapping[str, Any]) -> dict[str, str]:
    """Tags of what an evaluation noted."""
    found = {
        "molf.predictions_sha256": seen.get("predictions", {}).get("sha256"),
        "molf.evaluated_weights_hash": seen.get("weights", {}).get("hash"),
    }
    return {key: value for key, value in found.items() if value}


def _slug(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower())


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; None becomes "null" so that it shows."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if item is None else item
    return flat


def _history_rows(train: Path) -> list[dict[str, Any]]:
    """The rows of history.parquet with every expert's share so far, which is told once the training has ended."""
    import pandas as pd

    history = pd.read_parquet(train / "history.parquet")
    if (train / "routing.parquet").exists():
        from molf.report.routing_figures import read_routing, share_so_far

        history = history.join(share_so_far(read_routing(train)).add_prefix(ROUTING_SHARE), on="step")
    return [{str(key): value for key, value in row.items()} for row in history.to_dict("records")]


def _tags(kind: str, cell: Cell) -> dict[str, str]:
    return {"molf.kind": kind, "molf.model": cell.model, "molf.task": cell.task, "molf.method": cell.method}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among an evaluation's metrics, under names that MLflow allows (a subject may hold "&")."""
    finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {re.sub(r"[^\w\-. /]", "_", key): value for key, value in finite.items()}


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hash(value: Any) -> str:
    from molf.config import fingerprint

    return fingerprint(value)


def milliseconds(iso: str) -> int:
    return round(1000 * datetime.fromisoformat(iso).timestamp())


def uri_of(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file in the project folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time: several that create a fresh SQLite store together leave it unusable."""
    path = root / ".molf/mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process holds {path} for over {LOCK_SECONDS:.0f} s") from None
                time.sleep(0.05)
        yield
