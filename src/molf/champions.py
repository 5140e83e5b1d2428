"""Champions in MLflow's model registry: the best model of each task that passed the gate, and how to get it back.

The registry holds what is known of a model; its weights stay in DVC, which a version names by their hash there.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf import cards, export, lineage, machine, mlflow_cells, promotion, records, stored
from molf.blocks import Gate
from molf.config import NAME, Params
from molf.errors import RunError, UserError, first_line, plain
from molf.mlflow_store import Store, client_of, locked, uri_of
from molf.paths import MODELS, REPORTS, SCRATCH, Cell, read_json, write_json, write_text
from molf.promotion import Action, Candidate, Decision, Measured, Rival
from molf.report import comparison as comparing
from molf.report.markdown import literal
from molf.secrets import concealed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
FOLDER = "champion"  # of a run's artifacts: what a version's source names
TAG = "molf."
REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,199}")  # MLflow takes more; these are safe in its queries
HASH, SHA = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
MAX_DESCRIPTION = 5000  # characters, the width of MLflow's column
LOCK_SECONDS = 600.0
TOLERANCE = 1e-6  # relative, between comparison.json and the same computed anew, perhaps on another machine
SHOWN = 5  # differences between the two


@dataclass(frozen=True)
class Champion:
    """A registered version that `molf promote` made, its tags checked: they may come from anyone who reaches MLflow.

    Attributes:
        name, version: In the registry.
        run_id: Of the cell's run, whose folder `champion` holds card and lineage.
        tags: Without their prefix.
        outputs: {path: DVC's hash of the folder}.
    """

    name: str
    version: str
    run_id: str | None
    cell: Cell
    tags: Mapping[str, str]
    outputs: Mapping[str, str]
    score: float
    measured: Measured

    @classmethod
    def of(cls, version: "ModelVersion") -> "Champion":
        """From a version of the registry.

        Raises:
            RunError: `molf promote` did not make it.
        """
        tags = {key.removeprefix(TAG): value for key, value in version.tags.items() if key.startswith(TAG)}
        try:
            cell = Cell.parse(tags["cell"])
            outputs = dict(json.loads(tags["dvc"]))
            if not all(NAME.fullmatch(name) for name in (cell.model, cell.task, cell.method)) or cell.seed < 0:
                raise ValueError(f"cell {tags['cell']!r}")
            for key in ("fingerprint", "weights_hash", "model_hash", "data_hash"):
                if not HASH.fullmatch(tags[key]):
                    raise ValueError(f"{key} {tags[key]!r}")
            wrong = [path for path in _folders(cell) if not stored.FOLDER_MD5.fullmatch(str(outputs[str(path)]))]
            if wrong or len(outputs) != len(_folders(cell)):
                raise ValueError(f"dvc {tags['dvc']!r}")
            test_rows = tags.get("test_rows")
            if test_rows is not None and not SHA.fullmatch(test_rows):
                raise ValueError(f"test_rows {test_rows!r}")
            score = float(tags["score"])
            if not math.isfinite(score):
                raise ValueError(f"score {score}")
            measured = Measured(tags["task_kind"], tags["primary"], tags["data_hash"], test_rows)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"version {version.version} of {version.name} is none that molf registered, or its tags were changed "
                f"({type(error).__name__}: {first_line(error)}); in MLflow, move the alias to one that is, or remove it"
            ) from None
        return cls(version.name, str(version.version), version.run_id, cell, tags, outputs, score, measured)

    def shown(self) -> str:
        return f"version {self.version} of {self.name} ({self.cell.name})"


@dataclass(frozen=True)
class Result:
    """What was found for a task, and what became of its champion."""

    task: str
    decision: Decision
    lines: list[str]


def registered_name(params: Params, task: str) -> str:
    """The name of a task's registered model, EXPERIMENT-TASK.

    Raises:
        UserError: A part of it cannot be one.
    """
    name = f"{params.tracking.experiment}-{task}"
    if not NAME.fullmatch(task):
        raise UserError(f"--task {task!r}: a task's name is lower-case letters, digits, '-' and '_'")
    if not REGISTERED.fullmatch(name):
        raise UserError(
            f"tracking.experiment {params.tracking.experiment!r}: {name!r} cannot be the name of a registered model: "
            "letters, digits, '-', '_', '.' and spaces, up to 200"
        )
    return name


# --- promoting -------------------------------------------------------------------------------------------------------


def promote(params: Params, tasks: Sequence[str], dry_run: bool) -> Iterator[Result]:
    """Makes the best model of each task that passes the gate its champion, from the comparison that is here.

    Args:
        params: Hold the gate; the comparison must be of them.
        tasks: Of the grid.
        dry_run: Whether nothing is changed in MLflow.

    Yields:
        What was found for each task, after it was done. A task fails alone: where a file of its best model lacks, that
        model's lineage does not hold, or MLflow cannot be reached or refuses.

    Raises:
        UserError: The comparison is not up to date, or a name cannot be registered.
    """
    unknown = [task for task in tasks if task not in params.grid.tasks]
    if unknown:
        raise UserError(f"--task {unknown[0]!r} is not in the grid; there is {', '.join(params.grid.tasks)}")
    names = {task: registered_name(params, task) for task in tasks}
    comparison = current_comparison(params)
    for task in tasks:
        yield _promote(params, comparison, task, names[task], dry_run)


def current_comparison(params: Params) -> dict[str, Any]:
    """reports/comparison.json, which is what the results that are here give.

    Raises:
        UserError: It lacks, or is of other params or results: why, and the command that makes it anew.
    """
    path = REPORTS / "comparison.json"
    found = records.read_any(path)
    if found is None:
        raise UserError(f"there is no {path} yet; `make run` makes it")
    if wrong := records.flaw(path.name, found):
        raise UserError(f"{path} {wrong}: an earlier molf made it; `make run` makes it anew")
    now = json.loads(json.dumps(comparing.build(params, Path())))
    differing = list(_differing(found, now, ""))
    if differing:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise UserError(
            f"{path} is not up to date: the results here give another {', '.join(differing[:SHOWN])}{more}; nothing is "
            "promoted from it; `dvc repro compare` makes it anew"
        )
    return now


def _differing(one: Any, other: Any, key: str) -> Iterator[str]:
    """Keys at which two pieces of plain data differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            if (name in one) != (name in other):
                yield f"{key}.{name}".lstrip(".")
            else:
                yield from _differing(one[name], other[name], f"{key}.{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _differing(left, right, f"{key}.{i}")
    elif isinstance(one, float) and isinstance(other, int | float):
        if not math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield key.lstrip(".")
    elif one != other:
        yield key.lstrip(".")


def _promote(params: Params, comparison: Mapping[str, Any], task: str, name: str, dry_run: bool) -> Result:
    gate = params.promotion.gate(task)
    found = promotion.candidates(comparison, task, gate)
    one = promotion.best(found)
    lines = [f"{task}: {_subject(comparison, task)}; registered model {name}", *promotion.table(found)]
    try:
        with _guarded():
            decision, done = _decide(params, comparison, gate, one, name, dry_run)
    except (RunError, UserError) as error:  # the other tasks go on
        decision, done = Decision(Action.FAILED, concealed(error)), []
    return Result(task, decision, [*lines, f"-> {decision.action}: {decision.sentence}", *done])


def _decide(
    params: Params, comparison: Mapping[str, Any], gate: Gate, one: Candidate | None, name: str, dry_run: bool
) -> tuple[Decision, list[str]]:
    """What becomes of a task's champion, done unless it is a dry run; and what was done, in lines."""
    made = cards.Made.read(one.cell, params) if one else None
    now = _measured(made.metrics) if made else None
    with contextlib.nullcontext() if dry_run else _promoting():
        client = _client()
        champion = _at(client, name, CHAMPION) if client else None
        decision = promotion.decide(one, now, _rival(champion, comparison) if champion else None, gate)
        if decision.action is not Action.PROMOTED or one is None or made is None:
            return decision, []
        chain, outputs = _checked(made, params)
        seed = f"   of {one.seeds} seeds, {one.cell.seed} scored nearest their mean"
        done = [seed] if one.seeds > 1 else []
        if dry_run:
            return decision, [*done, "   dry run: nothing was changed"]
        store = Store(params.tracking.experiment, Path())
        version = _register(store, comparison, one, made, name, chain, outputs)
        done.append(f"   version {version} of {name} is its `{CHAMPION}`")
        if champion and champion.version != version:
            store.client.set_registered_model_alias(name, PREVIOUS, champion.version)  # first: a kill loses neither
            done[-1] += f", version {champion.version} its `{PREVIOUS}`"
        store.client.set_registered_model_alias(name, CHAMPION, version)
        after = _at(store.client, name, CHAMPION)
    if after is None or after.version != version:
        raise RunError(f"{name}: another promotion moved the alias at the same time; run `molf promote` again")
    return decision, done


def _subject(comparison: Mapping[str, Any], task: str) -> str:
    group = next((group for group in comparison["groups"] if group["task"] == task), None)
    if group is None:
        return "the comparison holds none of its cells"
    generated = ", generated data" if group["generated"] else ""
    return f"{group['primary_name']} on {group['examples']} examples{generated}"


def _measured(metrics: Mapping[str, Any]) -> Measured:
    rows = metrics.get("lineage", {}).get("data", {}).get("files", {}).get("test.parquet")
    return Measured(metrics["task_kind"], metrics["primary_name"], metrics["data_hash"], rows)


def _rival(champion: Champion, comparison: Mapping[str, Any]) -> Rival:
    """The champion as it is held against a candidate: with its score of now, where the comparison holds it."""
    fingerprint, score, measured = champion.tags["fingerprint"], champion.score, champion.measured
    for group in comparison["groups"]:
        for method in group["methods"]:
            for seed in method["per_seed"]:
                if group["task"] == champion.cell.task and seed["train_fingerprint"] == fingerprint:
                    score = seed["score"]
                    cell = Cell(group["model"], group["task"], method["method"], seed["seed"])
                    measured = _measured(read_json(cell.results / "evaluation/metrics.json"))
    return Rival(champion.shown(), fingerprint, score, measured)


def _folders(cell: Cell) -> list[Path]:
    """What of DVC's outputs is needed to give the model away: weights, base model with tokenizer, records."""
    return [cell.weights, MODELS / cell.model, cell.results / "train", cell.results / "evaluation"]


def _checked(made: cards.Made, params: Params) -> tuple[lineage.Chain, dict[str, str]]:
    """The lineage of the model, which holds, and DVC's hashes of its folders, which its cache has.

    Raises:
        UserError: A folder lacks, or DVC has it not.
        RunError: A link of the lineage is not as it was.
    """
    cell, kept = made.cell, made.summary.get("lineage", {}).get("weights", {})
    if "hash" not in kept:
        raise UserError(f"{cell.name}: its training noted no hash of its weights: an earlier molf made it; `dvc repro`")
    if not kept.get("kept", True):
        raise UserError(f"{cell.name}: its weights were not kept, so that they cannot be promoted; training.keep: all")
    outputs = stored.hashes(Path(), _folders(cell))
    chain = lineage.trace(cell, params)
    if chain.differing():
        told = "; ".join(f"{link.name}: {link.note}" for link in chain.differing())
        raise RunError(f"{cell.name} is not promoted, for its lineage does not hold ({told}); `dvc repro` mends it")
    return chain, outputs


def _register(
    store: Store,
    comparison: Mapping[str, Any],
    one: Candidate,
    made: cards.Made,
    name: str,
    chain: lineage.Chain,
    outputs: Mapping[str, str],
) -> str:
    """The version of the registry that is this model; made, with its card and lineage, if there is none."""
    from mlflow.exceptions import MlflowException

    tags = _tags(comparison, one, made, outputs)
    same = ("fingerprint", "weights_hash", "evaluation", "dvc")
    for version in _versions(store.client, name):
        if all(version.tags.get(TAG + key) == tags[key] for key in same):
            return str(version.version)
    mlflow_cells.sync(store, made.cell.results)
    run = store.find(kind="cell", fingerprint=made.run["fingerprint"])
    if run is None:
        raise RunError(f"MLflow has no run of {made.cell.name}; `molf track` adds it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_text(path / "README.md", cards.model_card(made, made.here()))
        write_text(path / "lineage.txt", lineage.render(chain) + "\n")
        write_json(path / "lineage.json", lineage.plain(chain))
        write_json(path / "version.json", {"where": "the weights are in DVC, by these hashes", **tags, "dvc": outputs})
        store.log_files(run.info.run_id, FOLDER, *sorted(path.iterdir()))
    with contextlib.suppress(MlflowException):  # it exists
        store.client.create_registered_model(
            name, description=f"The best model of the task {made.cell.task} that passed the gate (`molf promote`)."
        )
    # Neither a server nor a database takes a path or a scheme of DVC's as a source; a folder of the version's own run
    # both take. It holds what names the weights in DVC.
    made_now = store.client.create_model_version(
        name,
        f"runs:/{run.info.run_id}/{FOLDER}",
        run.info.run_id,
        tags={TAG + key: value for key, value in tags.items()},
        description=_description(one, made, tags),
    )
    return str(made_now.version)


def _tags(
    comparison: Mapping[str, Any], one: Candidate, made: cards.Made, outputs: Mapping[str, str]
) -> dict[str, str]:
    cell, metrics, measured = one.cell, made.metrics, _measured(made.metrics)
    tags: dict[str, Any] = {
        "cell": cell.name,
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "seed": cell.seed,
        "fingerprint": made.run["fingerprint"],
        "evaluation": metrics["fingerprint"],
        "task_kind": measured.task_kind,
        "primary": measured.primary_name,
        "score": repr(float(one.score)),
        "score_mean": f"{one.interval.mean:.4f}",
        "score_low": f"{one.interval.low:.4f}",
        "score_high": f"{one.interval.high:.4f}",
        "interval": f"{100 * comparison['confidence']:g} %, {comparison['interval']}",
        "seeds": one.seeds,
        "examples": metrics["n"],
        "git_commit": machine.git_commit() or "none",
        "trained_at_commit": made.run["git_commit"] or "none",
        "data_hash": measured.data_hash,
        "test_rows": measured.test_rows,
        "model_hash": made.run["model"]["hash"],
        "weights_hash": made.summary["lineage"]["weights"]["hash"],
        "generated_data": json.dumps(bool(made.run["generated_data"])),
        "dvc_path": str(cell.weights),
        "dvc": json.dumps(outputs, sort_keys=True),
        "license": made.license,
        "data_license": made.data_license,
        "options": json.dumps(made.options, sort_keys=True),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def _description(one: Candidate, made: cards.Made, tags: Mapping[str, str]) -> str:
    cell, interval = one.cell, one.interval
    lines = [
        f"`{cell.name}`: {literal(tags['primary'])} {one.score:.4f} on {tags['examples']} examples; its method over "
        f"{one.seeds} {'seed' if one.seeds == 1 else 'seeds'} {interval.mean:.4f} [{interval.low:.4f}, "
        f"{interval.high:.4f}] ({literal(tags['interval'])}).",
        "",
        f"- Weights: in DVC, `{tags['dvc_path']}`, hash `{tags['weights_hash']}`; `molf champion --task {cell.task} "
        "--out FOLDER` brings them.",
        f"- Base model: {literal(lineage.describe_model(made.run['model']))}; licence {literal(made.license)}.",
        f"- Data: hash `{tags['data_hash']}`; licence {literal(made.data_license)}.",
        f"- Card and lineage: the artifacts in `{FOLDER}` of the source run.",
    ]
    if json.loads(tags["generated_data"]):
        lines.insert(0, "**GENERATED DATA**: the score says nothing about real data.\n")
    return "\n".join(lines)[:MAX_DESCRIPTION]


# --- fetching --------------------------------------------------------------------------------------------------------


def find(params: Params, task: str, previous: bool) -> Champion:
    """A task's champion, or the one before it.

    Raises:
        UserError: There is none.
        RunError: MLflow cannot be reached, or the version is none of molf's.
    """
    name, alias = registered_name(params, task), PREVIOUS if previous else CHAMPION
    with _guarded():
        client = _client()
        found = _at(client, name, alias) if client else None
    if found is None:
        raise UserError(
            f"{name} has no `{alias}` in MLflow ({concealed(uri_of(Path()))}); `molf promote --task {task}` makes one"
        )
    if found.cell.task != task:
        raise RunError(f"{found.shown()} is of another task than {task}; in MLflow, move the alias `{alias}`")
    return found


def describe(champion: Champion, alias: str) -> list[str]:
    """A champion in lines."""
    tags = champion.tags
    shown = {
        "score": f"{tags['primary']} {champion.score:.4f} on {tags.get('examples')} examples; its method "
        f"{tags.get('score_mean')} [{tags.get('score_low')}, {tags.get('score_high')}] ({tags.get('interval')}; seeds: "
        f"{tags.get('seeds')})",
        "data": f"hash {tags['data_hash']}",
        "weights": f"hash {tags['weights_hash']}, in DVC {champion.cell.weights}",
        "base model": f"hash {tags['model_hash']}, in DVC {MODELS / champion.cell.model}",
        "git commit": tags.get("git_commit"),
        "run": champion.run_id,
    }
    return [f"{alias}: {champion.shown()}", *(f"  {key:10}  {plain(value)}" for key, value in shown.items())]


def write(champion: Champion, directory: Path, force: bool) -> list[str]:
    """Writes a champion into a folder that transformers or PEFT loads, with its card and lineage.

    Its weights, base model and records come from DVC by their hashes, whatever is checked out. An adapter whose base
    model is not on the hub is merged into it, so that the folder is whole.

    Args:
        champion: As `find` gives it.
        directory: New, empty, or of an earlier export.
        force: Whether an earlier export there is replaced.

    Returns:
        What was done, in lines.

    Raises:
        UserError, RunError: As `stored.fetch` and `export.write` do; or what came is not what was promoted.
    """
    cell, tags = champion.cell, champion.tags
    with _guarded():
        chain = _lineage_text(champion)
    SCRATCH.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="champion-", dir=SCRATCH))
    try:
        stored.fetch(Path(), champion.outputs, place)
        train, evaluation = place / cell.results / "train", place / cell.results / "evaluation"
        run, summary, metrics = (
            records.read(path) for path in (train / "run.json", train / "summary.json", evaluation / "metrics.json")
        )
        if None in (run, summary, metrics):
            raise RunError(f"{champion.shown()}: a record of it lacks in DVC")
        told = {
            "fingerprint": run["fingerprint"],
            "model_hash": run["model"]["hash"],
            "weights_hash": summary.get("lineage", {}).get("weights", {}).get("hash"),
            "data_hash": metrics["data_hash"],
            "evaluation": metrics["fingerprint"],
        }
        wrong = [f"{key} {value}, registered {tags.get(key)}" for key, value in told.items() if tags.get(key) != value]
        if wrong or Cell(**run["cell"]) != cell:
            raise RunError(f"{champion.shown()}: what DVC has is another model ({', '.join(wrong) or run['cell']})")
        options = json.loads(tags.get("options", "{}"))
        made = cards.Made(
            cell, run, summary, metrics, tags.get("license", "unknown"), tags.get("data_license", "unknown"), options
        )
        rounded = run["config"]["method"].get("base_bits") is not None
        merge = made.adapter and (rounded or run["model"]["kind"] != "hub")
        return export.write(made, directory, merge, force, place, {"lineage.txt": chain})
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _lineage_text(champion: Champion) -> str:
    """The chain as it was checked when the champion was promoted."""
    client = _client()
    if client is None or champion.run_id is None:
        raise RunError(
            f"{champion.shown()}: MLflow ({concealed(uri_of(Path()))}) has no run of it, which holds its lineage"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(champion.run_id, f"{FOLDER}/lineage.txt", folder)
        return Path(path).read_text(encoding="utf-8")


# --- the registry ----------------------------------------------------------------------------------------------------


def _client() -> "MlflowClient | None":
    """MLflow's client; None where there is no local store yet."""
    uri = uri_of(Path())
    file = uri.removeprefix("sqlite:///")
    return None if file != uri and not Path(file).is_file() else client_of(uri)


def _at(client: "MlflowClient", name: str, alias: str) -> Champion | None:
    """The version that an alias names."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_registered_model(name).aliases.get(alias)
        return Champion.of(client.get_model_version(name, str(version))) if version else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _versions(client: "MlflowClient", name: str) -> Iterator["ModelVersion"]:
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Turns what MLflow raises into a `RunError` that names the store."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ConnectionError) as error:
        raise RunError(
            f"MLflow ({concealed(uri_of(Path()))}): {type(error).__name__}: {concealed(first_line(error))[:300]}; run "
            "the same command again once it answers"
        ) from None


def _promoting() -> contextlib.AbstractContextManager[None]:
    """One promotion at a time in all worktrees of a repository."""
    try:
        command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
        folder = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        folder = SCRATCH
    return locked(folder / "molf-promote.lock", LOCK_SECONDS)
