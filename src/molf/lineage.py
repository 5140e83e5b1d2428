"""Where a number of the report comes from: the chain back to its source, checked.

What the stages noted is held against the files that are here, so that a chain holds on any machine, whatever of it was
pulled.
"""

import difflib
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from molf import closure, errors, models, records, tracking, tuning
from molf.blocks import SPLITS
from molf.config import PARAMS, Params, cell_config, evaluation_fingerprint, fingerprint, untrained_fingerprint
from molf.errors import RunError, UserError, first_line
from molf.paths import (
    BASE_METHOD,
    GENERAL,
    MODELS,
    PREPARED,
    RATES,
    RAW,
    REPORTS,
    RESULTS,
    SWEEPS,
    Cell,
    file_hash,
    read_json,
)
from molf.report import quality

UNNOTED = "not noted: an earlier molf made it; `dvc repro` makes it anew"
SHOWN_CELLS = 20  # of those that are named when one is not known
LONG_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")  # a sha256, of which a line shows the first digits
SHOWN_SCORES = 5  # of those that are not what the rows give
TOLERANCE = 1e-6  # between a score and the same one recomputed from its rows
DAMAGE = {"general.parquet": "general losses", "weights.parquet": "moves of weights"}  # what its links are called


class State(StrEnum):
    """What checking a link of the chain found."""

    OK = "ok"
    DIFFERS = "differs"
    AWAY = "not here"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Link:
    """One link of a chain: what it is, its value, where it lies, and what a check of it found."""

    name: str
    value: str
    place: str
    state: State
    note: str = ""


@dataclass(frozen=True)
class Chain:
    """A cell's score and the links from it back to its source."""

    cell: Cell
    number: str
    links: list[Link]

    def differing(self) -> list[Link]:
        """The links that are not what they were."""
        return [link for link in self.links if link.state is State.DIFFERS]


# --- the chain -------------------------------------------------------------------------------------------------------


def find(name: str) -> Cell:
    """The cell of that name, as the report shows it.

    Raises:
        UserError: There is none: with those that there are.
    """
    known = {
        str(path.relative_to(RESULTS))
        for path in RESULTS.glob("*/*/*/seed-*[0-9]")
        if any((path / file).is_file() for file in ("evaluation/metrics.json", "train/summary.json"))
    }
    given = name.strip().removeprefix(f"{RESULTS}/").rstrip("/")
    if given in known:
        return Cell.parse(given)
    if not known:
        raise UserError(f"{name}: there are no results here yet; `dvc pull {RESULTS}` brings a teammate's, or make run")
    near = difflib.get_close_matches(given, known, SHOWN_CELLS, cutoff=0)
    rest = f", and {len(known) - len(near)} more below {RESULTS}/" if len(known) > len(near) else ""
    raise UserError(f"there is no cell {name!r}; a cell is MODEL/TASK/METHOD/seed-S, here: {', '.join(near)}{rest}")


def trace(cell: Cell, params: Params) -> Chain:
    """The chain of a cell's score, every hash in it computed anew from the files that are here.

    Args:
        cell: As `find` gives it.
        params: What params.yaml says now.

    Raises:
        UserError: There is nothing here of the cell.
        RunError: A record of it is damaged, or lacks what every one holds.
    """
    metrics = records.read(cell.results / "evaluation/metrics.json")
    run = records.read(cell.results / "train/run.json")
    if metrics is None and run is None:
        raise UserError(
            f"{cell.name}: neither {cell.results}/train/run.json nor its evaluation is here; dvc pull {cell.results}"
        )
    noted = (records.read(cell.results / "train/summary.json") or {}).get("lineage", {})
    seen = (metrics or {}).get("lineage", {})
    links = _scored(cell, metrics, run, seen, params) if metrics else []
    links += _weights(cell, noted, seen)
    if run is not None:
        links += _trained(cell, run, {**noted.get("records", {}), **seen.get("training", {})}, params)
    model = seen.get("model") or (run or {}).get("model")
    data_hash = metrics["data_hash"] if metrics else run["data"]["hash"]
    source = run["data"]["source"] if run else seen.get("source")
    links += [_model(cell, model, metrics), *_data(cell, data_hash, [noted, seen]), *_source(cell.task, source)]
    if metrics and metrics.get("general"):
        links.append(_general(cell, metrics["general"]))
    if run is not None:
        own = closure.of_method(run["config"]["method"]["kind"])
        links.append(_code("training code", ["molf.stages.train", own], run["code"], run["git_commit"]))
    if metrics:
        links.append(_code("evaluation code", ["molf.stages.evaluate"], metrics["code"], seen.get("git_commit")))
    commit = run["git_commit"] if run else seen.get("git_commit")
    key = run["fingerprint"] if run else metrics["fingerprint"]
    links += [_commit(commit), _mlflow(key, params, noted.get("mlflow_run"))]
    return Chain(cell, _number(metrics), links)


def render(chain: Chain) -> str:
    """A chain as lines: state, link, value (of a sha256 its first digits), place; what to do where it does not hold."""
    width = {key: max(len(str(getattr(link, key))) for link in chain.links) for key in ("state", "name")}
    lines = [f"{chain.cell.name}: {chain.number}"]
    for link in chain.links:
        value = LONG_HASH.sub(r"\1...", link.value)
        where = f"  {link.place}" if link.place else ""
        lines.append(f"  {link.state:{width['state']}}  {link.name:{width['name']}}  {value}{where}".rstrip())
        if link.note:
            lines.append(f"  {'':{width['state']}}  {'':{width['name']}}  ({link.note})")
    counts = {state: sum(link.state is state for link in chain.links) for state in State}
    lines.append(
        f"{len(chain.links)} links: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    )
    return "\n".join(map(errors.plain, lines))


def plain(chain: Chain) -> dict[str, Any]:
    """A chain as plain data."""
    return {
        "cell": chain.cell.name,
        "number": chain.number,
        "links": [asdict(link) for link in chain.links],
        "ok": not chain.differing(),
    }


def _number(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "not evaluated yet"
    left_out = ", ".join(f"{count} left out: {reason}" for reason, count in metrics["left_out"].items() if count)
    shown = f"{metrics['primary_name']} {metrics['primary']:.4f} on {metrics['n']} examples"
    return f"{shown} ({left_out})" if left_out else shown


def _scored(
    cell: Cell, metrics: Mapping[str, Any], run: Mapping[str, Any] | None, seen: Mapping[str, Any], params: Params
) -> list[Link]:
    """From the report's number to the rows that it was computed from, and the training that was asked."""
    path = cell.results / "evaluation/predictions.parquet"
    key = evaluation_fingerprint(metrics)
    changes = _changes(metrics["evaluation"], params.evaluation.model_dump(mode="json"))
    wrong = ""
    if (key, metrics["cell"]) != (metrics["fingerprint"], asdict(cell)):
        wrong = "its parts give another one: the file was changed"
    elif run is not None and metrics["train_fingerprint"] != run["fingerprint"]:
        wrong = f"it is of training {metrics['train_fingerprint']}; `dvc repro` evaluates this one"
    return [
        _reported(cell, metrics),
        _recomputed(metrics, path),
        _file("predictions", path, seen.get("predictions", {}).get("sha256")),
        *(_file(DAMAGE[name], path.with_name(name), digest) for name, digest in seen.get("tables", {}).items()),
        _compared(
            "evaluation",
            f"fingerprint {metrics['fingerprint']}",
            str(cell.results / "evaluation/metrics.json"),
            not wrong,
            wrong,
        ),
        _compared("evaluation params", f"hash {fingerprint(metrics['evaluation'])}", str(PARAMS), not changes, changes),
    ]


def _reported(cell: Cell, metrics: Mapping[str, Any]) -> Link:
    """Whether the report shows this very score."""
    path = REPORTS / "comparison.json"
    value = f"{metrics['primary_name']} {metrics['primary']:.4f}"
    comparison = records.read_any(path)
    if comparison is None:
        return _away("report", value, path)
    try:
        return _shown(cell, metrics, comparison, value, path)
    except (KeyError, TypeError, AttributeError) as error:
        note = f"no report of this molf ({type(error).__name__}: {first_line(error)}); `dvc repro compare` makes it"
        return Link("report", value, str(path), State.DIFFERS, note)


def _shown(cell: Cell, metrics: Mapping[str, Any], comparison: Mapping[str, Any], value: str, path: Path) -> Link:
    for group in comparison["groups"]:
        if (group["model"], group["task"]) != (cell.model, cell.task):
            continue
        shown = [
            (seed["evaluation_fingerprint"], seed["score"])
            for method in group["methods"]
            for seed in method["per_seed"]
            if (method["method"], seed["seed"]) == (cell.method, cell.seed)
        ]
        if cell.method == BASE_METHOD and group["base"]:
            shown = [(group["base"]["fingerprint"], group["base"]["mean"])]
        for key, score in shown:
            same = key == metrics["fingerprint"] and abs(score - metrics["primary"]) <= TOLERANCE
            return _compared(
                "report", value, str(path), same, "the report is of another evaluation; `dvc repro compare`"
            )
    return Link("report", value, str(path), State.AWAY, "the last comparison did not hold this cell")


def _recomputed(metrics: Mapping[str, Any], path: Path) -> Link:
    """Every score, the number of examples and of those left out, computed anew from the rows."""
    value = f"{metrics['primary']:.6f} and {len(metrics['metrics'])} more"
    if not path.is_file():
        return _away("score", value, path)

    import pandas as pd

    from molf.tasks import TASKS

    try:
        rows = pd.read_parquet(path)
        again = TASKS[metrics["task_kind"]].metrics(rows)
    except (KeyError, TypeError, ValueError, OSError, RunError) as error:  # pyarrow's are of these
        return Link("score", value, "", State.DIFFERS, f"the rows give none: {first_line(error)}")
    told = {**{key: metrics[key] for key in ("primary", "primary_name", "n", "left_out")}, **metrics["metrics"]}
    wrong = [f"{key} {again.get(key)}, not {shown}" for key, shown in told.items() if not _alike(again.get(key), shown)]
    value += f" from {len(rows)} prediction rows"
    return _compared("score", value, "", not wrong, f"the rows give {', '.join(wrong[:SHOWN_SCORES])}")


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return bool(abs(one - other) <= TOLERANCE or one != one and other != other)
    return bool(one == other)


def _weights(cell: Cell, noted: Mapping[str, Any], seen: Mapping[str, Any]) -> list[Link]:
    """The weights that were asked, and that training and evaluation speak of the same."""
    if cell.method == BASE_METHOD:
        return []
    hashes = [block["weights"]["hash"] for block in (noted, seen) if "weights" in block]
    if not hashes:
        return [Link("weights", "hash unknown", str(cell.weights), State.UNCHECKED, UNNOTED)]
    value = f"hash {hashes[0]}"
    if len(set(hashes)) > 1:
        note = f"trained are {hashes[0]}, evaluated were {hashes[1]}; `dvc repro` evaluates them"
        return [Link("weights", value, str(cell.weights), State.DIFFERS, note)]
    if not cell.weights.is_dir():
        return [_away("weights", value, cell.weights)]
    folder = cell.weights
    note = records.read_any(folder / models.ELSEWHERE)
    if note is not None:  # not kept; perhaps still there
        folder = Path(note["path"])
        if not folder.is_dir():
            return [
                Link("weights", value, str(folder), State.AWAY, "not kept (training.keep); only a training makes them")
            ]
    return [_compared("weights", value, str(folder), models.folder_hash(folder) == hashes[0], "these are others")]


def _trained(cell: Cell, run: Mapping[str, Any], files: Mapping[str, str], params: Params) -> list[Link]:
    """The training, what it recorded (file: sha256), and the params that shaped it."""
    parts = run["config"], run["data"]["hash"], run["model"]["hash"], run["code"], run["versions"]
    links = [
        _compared(
            "training",
            f"fingerprint {run['fingerprint']}",
            str(cell.results / "train/run.json"),
            (fingerprint(*parts), run["cell"]) == (run["fingerprint"], asdict(cell)),
            "its parts give another one: the file was changed",
        )
    ]
    links += [_file(Path(name).stem, cell.results / "train" / name, digest) for name, digest in files.items()]
    value = f"hash {fingerprint(run['config'])}"
    if cell.method not in params.methods or cell.task not in params.tasks:
        links.append(Link("params", value, str(PARAMS), State.AWAY, f"no block there for {cell.method} or {cell.task}"))
    else:
        try:
            changes = _changes(run["config"], cell_config(params, cell))
        except UserError as error:  # the sweep's choice is not here
            return [*links, Link("params", value, str(PARAMS), State.UNCHECKED, str(error))]
        links.append(_compared("params", value, str(PARAMS), not changes, changes))
        links += _rates(cell, params)
    return links


def _rates(cell: Cell, params: Params) -> list[Link]:
    """Whether the trials that are here choose the learning rates that the training took; of no sweep no link."""
    of = (cell.model, cell.task, cell.method)
    if not params.grid.tune:
        return []
    noted = next((s for s in read_json(RATES)["sweeps"] if (s["model"], s["task"], s["method"]) == of), None)
    if noted is None:  # of a cell outside the grid
        return []
    told = f"factor {noted['chosen']:g} of {len(noted['trials'])}, by {noted['primary_name']} on validation rows"
    now = tuning.sweep(params, of, Path())
    if now["chosen"] is None:
        return [_away("learning rates", told, SWEEPS / "/".join(of))]
    return [_compared("learning rates", told, str(RATES), now == noted, "the trials here tell other numbers")]


def _model(cell: Cell, model: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> Link:
    """The base model that was trained, or asked as it is."""
    folder = MODELS / cell.model
    if model is None:
        return Link("base model", "hash unknown", str(folder), State.UNCHECKED, UNNOTED)
    value = f"{describe_model(model)}, hash {model['hash']}"
    if metrics and cell.method == BASE_METHOD and metrics["train_fingerprint"] != untrained_fingerprint(model["hash"]):
        return Link(
            "base model", value, str(folder), State.DIFFERS, "the scores are of another; `dvc repro` asks this one"
        )
    if not folder.is_dir():
        return _away("base model", value, folder)
    return _compared("base model", value, str(folder), models.folder_hash(folder) == model["hash"], "this is another")


def describe_model(model: Mapping[str, Any]) -> str:
    """A base model's origin in words."""
    revision = f"@{model['revision']}" if "revision" in model else ""
    origin = model.get("id") or model.get("package") or model.get("kind", "unknown")
    return f"{model['name']} ({origin}{revision})"


def _data(cell: Cell, recorded: str, blocks: Iterable[Mapping[str, Any]]) -> list[Link]:
    """The prepared data's hash, and the files that were read of it."""
    from molf.data import data_hash

    folder = PREPARED / cell.task
    if any(not (folder / f"{split}.parquet").is_file() for split in SPLITS):
        return [_away("data", f"hash {recorded}", folder)]
    try:
        now = f"have {data_hash(folder)}"
    except (ValueError, OSError) as error:  # pyarrow's errors are of these
        now = f"cannot be read: {first_line(error)}"
    links = [_compared("data", f"hash {recorded}", str(folder), now == f"have {recorded}", f"the rows here {now}")]
    for block in blocks:
        for name, digest in block.get("data", {}).get("files", {}).items():
            links.append(_file(f"{Path(name).stem} rows", folder / name, digest))
    return links


def _source(task: str, source: Mapping[str, Any] | None) -> list[Link]:
    """Where the rows came from: what `fetch` noted then and holds now, and files that it read."""
    folder = RAW / task
    if not isinstance(source, Mapping):
        return [Link("source", "unknown", str(folder), State.UNCHECKED, UNNOTED)]
    now = records.read_any(folder / "source.json")
    value = quality.origin(source)
    links = [
        _away("source", value, folder)
        if now is None
        else _compared("source", value, str(folder), now == source, f"the rows here came from {quality.origin(now)}")
    ]
    for split, digest in source.get("written", {}).items():
        links.append(_file(f"{split} raw rows", folder / f"{split}.parquet", digest))
    for split, files in quality.files_of(source).items() if source.get("kind") == "file" else ():
        hashed = [(Path(file["from"]), file["sha256"]) for file in files if "sha256" in file]
        if hashed:
            links.append(_files(f"{split} source", hashed))
    return links


def _general(cell: Cell, told: Mapping[str, Any]) -> Link:
    """The general loss: whether the texts that were asked are those that are here, and give it."""
    from molf.general import folder_hash

    value = f"loss {told['loss']:.6f} on {told['texts']} texts, hash {told['hash']}"
    losses = cell.results / "evaluation/general.parquet"
    if not losses.is_file() or not (GENERAL / "text.parquet").is_file():
        return _away("general text", value, losses if not losses.is_file() else GENERAL)

    import pandas as pd

    wrong = []
    if (now := folder_hash(GENERAL)) != told["hash"]:
        wrong.append(f"the texts here have {now}")
    frame = pd.read_parquet(losses, columns=["nll", "tokens"])
    if not _alike(float(frame["nll"].sum() / frame["tokens"].sum()), told["loss"]):
        wrong.append(f"{losses} gives another loss")
    return _compared("general text", value, str(GENERAL), not wrong, "; ".join(wrong))


def _files(name: str, files: list[tuple[Path, str]]) -> Link:
    """Several files as one link, which names those that are not as they were."""
    here = [(path, digest) for path, digest in files if path.is_file()]
    wrong = [str(path) for path, digest in here if file_hash(path) != digest]
    value = f"sha256 {files[0][1]}" if len(files) == 1 else f"{len(files)} files with their sha256"
    place = str(files[0][0]) if len(files) == 1 else str(files[0][0].parent)
    if wrong:
        return Link(name, value, place, State.DIFFERS, f"changed since: {', '.join(wrong)}")
    if len(here) < len(files):
        return Link(name, value, place, State.AWAY, f"{len(files) - len(here)} of {len(files)} files are not here")
    return Link(name, value, place, State.OK)


def _code(name: str, modules: list[str], recorded: str, commit: str | None) -> Link:
    where = f"; `git checkout {commit.rstrip('+')}` has it" if commit else ""
    same = closure.code_hash(*modules) == recorded
    return _compared(name, f"hash {recorded}", " ".join(modules), same, f"the code here is another{where}")


def _commit(commit: str | None) -> Link:
    """The commit that was checked out, and whether this repository has it."""
    if commit is None:
        return Link("git commit", "none", "", State.UNCHECKED, "it ran outside a repository, or an earlier molf ran it")
    changed = "tracked files differed from it" if commit.endswith("+") else ""
    try:
        command = ["git", "cat-file", "-e", f"{commit.rstrip('+')}^{{commit}}"]
        known = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return Link("git commit", commit, "", State.UNCHECKED, "git is not installed")
    if known:
        return Link("git commit", commit, "", State.OK, changed)
    return Link("git commit", commit, "", State.AWAY, "git fetch --all")


def _mlflow(key: str, params: Params, live: str | None) -> Link:
    """The run that shows the cell, found by its fingerprint in the store that is here."""
    try:
        found = tracking.find_run(key, params.tracking.experiment)
    except RunError as error:
        return Link("MLflow run", live or "unknown", "", State.UNCHECKED, str(error))
    if found is None:
        return Link(
            "MLflow run", live or "unknown", f"experiment {params.tracking.experiment}", State.AWAY, "molf track"
        )
    return Link("MLflow run", found, f"experiment {params.tracking.experiment}", State.OK)


def _file(name: str, path: Path, recorded: str | None) -> Link:
    """A file by its sha256."""
    if recorded is None:
        return Link(name, "sha256 unknown", str(path), State.UNCHECKED, UNNOTED)
    if not path.is_file():
        return _away(name, f"sha256 {recorded}", path)
    now = file_hash(path)
    return _compared(name, f"sha256 {recorded}", str(path), now == recorded, f"the file here has {now}")


def _compared(name: str, value: str, place: str, same: bool, note: str) -> Link:
    return Link(name, value, place, State.OK) if same else Link(name, value, place, State.DIFFERS, note)


def _away(name: str, value: str, path: Path) -> Link:
    return Link(name, value, str(path), State.AWAY, f"dvc pull {path}")


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    from molf.report.results import changes

    return "; ".join(changes(then, now))
