"""MLflow's store: finds, creates and fills the runs of one experiment. All here may raise; tracking.py guards it.

A metric's name is SECTION/NAME: MLflow's page draws the charts of a section together, sorted by name.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.errors import RunError
from molf.paths import BASE_METHOD, Cell, keep_private
from molf.report import quality
from molf.report.controls import control

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

keep_private()  # whoever imports this, also without a command of ours
# An unreachable server is given up within seconds: MLflow's own defaults wait for many minutes.
for _key, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "PGCONNECT_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_key, _value)

STEP_METRICS = {  # by the column of history.parquet
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
}
DATABASE_RETRIES = 3  # of a connection, within a second; MLflow has no setting for its 10, which take 100 s
LOCK_SECONDS = 60.0  # creating a fresh SQLite store takes some 10 s; longer than this means that its owner hangs
MAX_METRICS, MAX_PARAMS = 1000, 100  # in one batch, by MLflow's API
MAX_CHILDREN = 1000  # of one parent, trainings of earlier configurations among them
MAX_ALIKE = 1000  # runs that mean the same: as many as machines that make one at the same moment
GONE = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")  # what MLflow says of a deleted run
RACES = 10  # that a machine may lose in a row when it settles with others which run counts
MAX_PARAM_LENGTH = 6000  # characters of one value, by MLflow's API
MAX_TAG_LENGTH, MAX_DIGEST_LENGTH = 8000, 36  # characters, likewise
NOTE = "mlflow.note.content"  # tag by which a run or an experiment has a description, in Markdown
# Of the two ways in which MLflow's page shows an experiment, the one for trainings; it would ask otherwise.
KIND = {"mlflow.experimentKind": "custom_model_development"}
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
        self._root = root
        uri = uri_of(root)
        # A server chooses the place itself; MLflow freezes it at creation, so that a local one must be given in full.
        local = None if uri.startswith(("http://", "https://")) else (folder_of(uri, root) / "mlartifacts").as_uri()
        with _locked(folder_of(uri, root)):
            self.client = client_of(uri)
            known = self.client.get_experiment_by_name(experiment) or self._create(experiment, local)
        self.experiment_id: str = known.experiment_id
        if local and known.artifact_location.startswith("file:") and known.artifact_location != local:
            raise RunError(
                f"its artifacts lie in {known.artifact_location}, made when the project was elsewhere; "
                "remove mlflow.db and mlartifacts, then `molf track` rebuilds both"
            )

    def _create(self, experiment: str, local: str | None) -> "Experiment":
        from mlflow import MlflowException

        try:
            made = self.client.create_experiment(experiment, artifact_location=local, tags=KIND)
        except MlflowException as error:
            known = self.client.get_experiment_by_name(experiment)  # another machine may have been faster
            if known is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return known
        return self.client.get_experiment(made)

    def find(self, **tags: str) -> "Run | None":
        """The run with these `molf.` tags; of several, the one that all machines agree on."""
        return next(iter(self._alike(**tags)), None)

    def _alike(self, **tags: str) -> "list[Run]":
        """All runs with these `molf.` tags: those that are filled or finished first, then the oldest.

        MLflow takes two runs that mean the same, and machines share no lock: each that makes one looks again.
        """
        where = " and ".join(f"tags.`molf.{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([self.experiment_id], where, max_results=MAX_ALIKE)
        return sorted(
            found,
            key=lambda run: (
                "molf.seeds" not in run.data.tags,
                run.info.status != "FINISHED",
                run.info.start_time,
                run.info.run_id,
            ),
        )

    @classmethod
    def existing(cls, experiment: str, root: Path) -> "Store | None":
        """The store if it holds the experiment; unlike the constructor it makes nothing."""
        uri = uri_of(root)
        file = uri.removeprefix("sqlite:///")
        if file != uri and not Path(file).is_file():
            return None
        return cls(experiment, root) if client_of(uri).get_experiment_by_name(experiment) else None

    def open_cell(self, run: Mapping[str, Any]) -> "Run":
        """The cell's run by its fingerprint; if it lacks, a new one below its model/task/method, with params and data.

        Args:
            run: What run.json holds.
        """
        cell = Cell(**run["cell"])
        with _locked(folder_of(uri_of(self._root), self._root)):
            found = self.find(kind="cell", fingerprint=run["fingerprint"])
            if found is None:
                tags = {
                    **_tags("cell", cell),
                    "mlflow.parentRunId": self.parent(cell).info.run_id,
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
                if beside := control(run.get("config", {}).get("method", {"kind": BASE_METHOD})):
                    tags["molf.control"] = f"{beside['kind']}: {beside['words']}"
                if run.get("git_commit"):
                    tags["mlflow.source.git.commit"] = run["git_commit"]
                started = milliseconds(run["started"]) if "started" in run else None
                own = self.client.create_run(self.experiment_id, started, tags, run_name=cell.name)
                found = self.only(kind="cell", fingerprint=run["fingerprint"]) or own
                if found.info.run_id != own.info.run_id:
                    self.client.delete_run(own.info.run_id)
                # Another machine may have found this parent superfluous before it had a child.
                self.set_tags(found.info.run_id, {"mlflow.parentRunId": self.parent(cell).info.run_id})
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
            rows: Mappings with `step`, `seconds` and metrics, whose names hold a "/".
        """
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), started + round(1000 * row["seconds"]), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if "/" in key and value is not None and math.isfinite(value)
        ]
        for i in range(0, len(points), MAX_METRICS):
            self.client.log_batch(run_id, metrics=points[i : i + MAX_METRICS])

    def parent(self, cell: Cell) -> "Run":
        """The run of a model, task and method, below which its seeds lie; empty until a comparison fills it."""
        wanted = {"kind": "method", "model": cell.model, "task": cell.task, "method": cell.method}
        found = self.only(**wanted)
        if found is None:
            name = f"{cell.model}/{cell.task}/{cell.method}"
            made = self.client.create_run(self.experiment_id, tags=_tags("method", cell), run_name=name)
            found = self.only(**wanted) or made
        return found

    def only(self, **tags: str) -> "Run | None":
        """The run with these `molf.` tags, once those that mean the same have left it their children and are gone.

        Of cells only runs beside a finished one go, for others may be written to at this moment.
        """
        from mlflow import MlflowException

        for attempt in range(RACES):
            runs = self._alike(**tags)
            if not runs:
                return None
            first, *others = runs
            try:
                if tags["kind"] == "method" and first.info.status != "FINISHED":
                    self.client.set_terminated(first.info.run_id, "FINISHED")
                if tags["kind"] == "method" or first.info.status == "FINISHED":
                    for other in others:
                        self._adopt(other.info.run_id, first.info.run_id)
                        self.client.delete_run(other.info.run_id)
                return first
            except MlflowException as error:
                # Another machine settles the same and was faster: what was to be changed is gone.
                if error.error_code not in GONE or attempt == RACES - 1:
                    raise
        return None

    def _adopt(self, old: str, new: str) -> None:
        """Gives the children of one run to another."""
        where = f"tags.`mlflow.parentRunId` = '{old}'"
        for child in self.client.search_runs([self.experiment_id], where, max_results=MAX_CHILDREN):
            self.client.set_tag(child.info.run_id, "mlflow.parentRunId", new)

    def new_parent(self, cell: Cell, old: str) -> "Run":
        """An empty parent in place of one, whose children it takes: a curve that was logged cannot be changed."""
        with _locked(folder_of(uri_of(self._root), self._root)):
            self.client.delete_run(old)
            found = self.parent(cell)
            self._adopt(old, found.info.run_id)
        return found

    def _describe(self, found: "Run", run: Mapping[str, Any]) -> None:
        """Logs params, hashes and data set of a cell where they lack: a kill may have left a run half described."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run_id, data = found.info.run_id, run.get("data")
        params = {**run["cell"], **flatten(run.get("config", {})), "model_hash": run.get("model", {}).get("hash")}
        if data:
            params["data_hash"] = data["hash"]
        self.log_params(run_id, {key: value for key, value in params.items() if key not in found.data.params})
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

    def log_data(self, run_id: str, folder: str, data: Mapping[str, Any]) -> None:
        """Logs what is known of a data set: whole as JSON, its tables, and the counts that must not go unseen."""
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "summary.json"
            path.write_text(json.dumps(data, indent=2), encoding="utf-8")
            self.log_files(run_id, folder, path)
        for table in quality.tables(data):
            self.log_table(run_id, f"{folder}/{slug(table.title)}.json", table.header, table.rows)
        leaks, kept = quality.leaked(data)
        counts = {"rejected": quality.rejected(data), "leaks": leaks, "leaks_kept": kept}
        self.log_values(run_id, {f"{folder}/{key}": count for key, count in counts.items()})

    def log_table(self, run_id: str, file: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table that MLflow's page shows as one.

        Args:
            run_id: MLflow's id of the run.
            file: Its path among the artifacts.
            header: Names of the columns.
            rows: Of plain data.
        """
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / Path(file).name
            # As `MlflowClient.log_table` writes it, which would add the rows once more each time.
            path.write_text(json.dumps({"columns": list(header), "data": list(rows)}), encoding="utf-8")
            self.log_files(run_id, str(Path(file).parent), path)
        known = json.loads(self.client.get_run(run_id).data.tags.get(TABLES, "[]"))
        shown = {"path": file, "type": "table"}
        if shown not in known:
            self.client.set_tag(run_id, TABLES, json.dumps([*known, shown]))

    def set_tags(self, run_id: str, tags: Mapping[str, str | None]) -> None:
        """Sets tags that have a value, cut where MLflow would refuse them, in their order."""
        for key, value in tags.items():
            if value is not None:
                self.client.set_tag(run_id, key, value[:MAX_TAG_LENGTH])

    def describe(self, tags: Mapping[str, str]) -> None:
        """Sets those tags of the experiment that it has not, or has otherwise."""
        known = self.client.get_experiment(self.experiment_id).tags
        for key, value in {**KIND, **tags}.items():
            if known.get(key) != value:
                self.client.set_experiment_tag(self.experiment_id, key, value)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        known = [Param(key, _text(value)[:MAX_PARAM_LENGTH]) for key, value in params.items() if value is not None]
        for i in range(0, len(known), MAX_PARAMS):
            self.client.log_batch(run_id, params=known[i : i + MAX_PARAMS])

    def log_values(self, run_id: str, values: Mapping[str, float]) -> None:
        """Logs numbers without steps, those that the run does not show already."""
        from mlflow.entities import Metric

        shown = self.client.get_run(run_id).data.metrics
        now = round(1000 * time.time())
        points = [Metric(key, float(value), now, 0) for key, value in values.items() if shown.get(key) != float(value)]
        if points:
            self.client.log_batch(run_id, metrics=points)

    def log_files(self, run_id: str, folder: str | None, *paths: Path) -> None:
        for path in paths:
            if path.exists():
                self.client.log_artifact(run_id, str(path), folder)


def client_of(uri: str) -> "MlflowClient":
    """MLflow's client of a store, which says no more than warnings."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith(("http://", "https://")):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = DATABASE_RETRIES
        logging.getLogger(utils.__name__).setLevel(logging.ERROR)  # it warns of each try
    return MlflowClient(tracking_uri=uri)


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
            return scheme, {"uri": _common(places) if scheme == "local" else places[0]}
    return "local", {"uri": f"data/prepared/{task}"}


def _common(places: Sequence[str]) -> str:
    """The one local file, or the folder that holds all; some paths may be absolute and others not."""
    if len(places) == 1:
        return places[0]
    absolute = any(map(os.path.isabs, places))
    return os.path.commonpath([os.path.abspath(place) if absolute else os.path.normpath(place) for place in places])


def slug(title: str) -> str:
    """A table's title as the name of a file."""
    return re.sub(r"\W+", "_", title.lower()).strip("_")


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; None becomes "null" so that it shows."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if item is None else item
    return flat


def _tags(kind: str, cell: Cell) -> dict[str, str]:
    return {"molf.kind": kind, "molf.model": cell.model, "molf.task": cell.task, "molf.method": cell.method}


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


def folder_of(uri: str, root: Path) -> Path:
    """Where a store's artifacts and its lock lie: beside its SQLite file, else in the project folder."""
    file = uri.removeprefix("sqlite:///")
    return (root if file == uri else Path(file).parent).resolve()


def _locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """One process at a time: several that create a fresh SQLite store together leave it unusable."""
    return locked(root / ".molf/mlflow.lock", LOCK_SECONDS)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Holds a lock between processes within its `with` block.

    Args:
        path: Its file, made if it lacks.
        seconds: How long another process may hold it.

    Raises:
        RunError: Another holds it for longer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process holds {path} for over {seconds:.0f} s") from None
                time.sleep(0.05)
        yield
