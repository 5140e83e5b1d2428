"""The grid's results as the stages left them; those that do not belong together are refused, all at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from molf import records
from molf.config import Params, cell_config, fingerprint, untrained_fingerprint
from molf.errors import UserError, first_line
from molf.paths import BASE_METHOD, PREPARED, Cell, read_json
from molf.report import lacking
from molf.report.lacking import Kind, Lack
from molf.tasks import TASKS

Loaded = dict[str, Any]  # run, summary, metrics: as their files; predictions, general: frames, or None
# The score that the paper reports for a task; its claims are judged on that (DESIGN.md, sections 1 and 3).
PAPER_SCORES = {"sql": "exact_match", "med": "accuracy", "fact": "efficacy_first_token"}
# What is compared of a cell's records beside what each must hold anyway.
_COSTS = ("train_seconds", "tokens_per_second", "peak_memory_bytes", "weights_bytes")
_SIZES = ("steps", "examples", "trained_parameters", "total_parameters", "final_loss")
NEEDED = {
    "run.json": ("hardware.fingerprint", "hardware.name", "hardware.threads", "generated_data"),
    "summary.json": ("fingerprint", *_SIZES, *_COSTS, "routing", "warnings"),
    "metrics.json": ("seconds",),
}


def load(params: Params, root: Path) -> tuple[dict[Cell, Loaded], dict[tuple[str, str], Loaded], dict[Cell, Lack]]:
    """Cells of the grid, the untrained model's evaluation by model and task, and the cells that lack.

    A cell lacks if `results/lacking.json` names it and it has no results that fit, or if the untrained model's
    evaluation does; a model and task of which every cell lacks has no evaluation of the untrained model either.

    Args:
        params: Their grid says which cells are read, their blocks what these must have been made with.
        root: Project folder.

    Raises:
        UserError: Every cell that lacks and is not said to, that another configuration made, or that does not fit its
            neighbours; or nothing is there to be compared.
    """
    problems: list[str] = []
    named = lacking.read(root)
    cells: dict[Cell, Loaded] = {}
    bases: dict[tuple[str, str], Loaded] = {}
    absent: dict[Cell, Lack] = {}
    for model in params.grid.models:
        for task in params.grid.tasks:
            zero = Cell(model, task, BASE_METHOD, 0)
            of_cells: list[str] = []
            of_base: list[str] = []
            here = _group(params, model, task, root, named, absent, of_cells)
            base = _base(params, model, task, root, of_base)
            problems += of_cells
            if zero in named and (not base or _only_with(base, model, task, here, root)):
                absent[zero] = named[zero]
                why = f"{zero.name}, the untrained model's scores, lacks"
                absent |= dict.fromkeys(here, Lack(Kind.UNCOMPARED, why))
                continue
            fitting = {cell: found for cell, found in here.items() if cell not in named}
            for cell in [cell for cell in here if cell in named]:
                with_it = {**fitting, cell: here[cell]}
                if any(_misfits(model, task, with_it, base, root)) and not any(
                    _misfits(model, task, fitting, base, root)
                ):
                    absent[cell] = named[cell]
                    del here[cell]
                else:
                    fitting = with_it
            problems += [*of_base, *_misfits(model, task, here, base, root)]
            cells |= here
            if base and here:
                bases[model, task] = base
    if problems:
        raise UserError([*problems, "nothing was compared; `dvc repro` brings the results up to date with params.yaml"])
    if not cells:
        told = [f"{cell.name} lacks: {lack.kind}: {lack.reason}" for cell, lack in absent.items()]
        raise UserError([*told, "so nothing can be compared; `dvc repro` tries these again"])
    return cells, bases, absent


def _group(
    params: Params,
    model: str,
    task: str,
    root: Path,
    named: Mapping[Cell, Lack],
    absent: dict[Cell, Lack],
    problems: list[str],
) -> dict[Cell, Loaded]:
    """Cells of a model and task; of the others those that are named go to `absent`, what is wrong to `problems`."""
    here = {}
    for cell in (cell for cell in params.cells() if (cell.model, cell.task) == (model, task)):
        wrong: list[str] = []
        found = _cell(params, cell, root, wrong)
        if found:
            here[cell] = found
        elif cell in named:
            absent[cell] = named[cell]
        else:
            problems += wrong
    return here


def _only_with(base: Loaded, model: str, task: str, cells: Mapping[Cell, Loaded], root: Path) -> bool:
    """Whether cells fit each other, and not the untrained model's evaluation."""
    with_it, without = (any(_misfits(model, task, cells, zero, root)) for zero in (base, None))
    return with_it and not without


def _cell(params: Params, cell: Cell, root: Path, problems: list[str]) -> Loaded | None:
    """A cell's files, or None with what is wrong added to `problems`."""
    train = root / cell.results / "train"
    files = [train / "run.json", train / "summary.json", *_files(cell, root)]
    lacking = _lacking(files, root)
    if lacking:
        problems.append(f"{cell.name}: {', '.join(lacking)} missing")
        return None
    kind = params.tasks[cell.task].kind
    unreadable = _unreadable(files, root, kind)
    if unreadable:
        problems += [f"{cell.name}: {text}" for text in unreadable]
        return None
    found = {"run": read_json(train / "run.json"), "summary": read_json(train / "summary.json")}
    found |= _evaluation(params, cell, root)
    wrong = []
    try:
        now, then = cell_config(params, cell, root), found["run"]["config"]
        if then != now:
            wrong.append("trained with other params than params.yaml says: " + "; ".join(changes(then, now)))
    except UserError as error:
        wrong += error.problems
    if found["summary"]["fingerprint"] != found["run"]["fingerprint"]:
        wrong.append("train/summary.json and train/run.json are of two trainings")
    if found["metrics"]["train_fingerprint"] != found["run"]["fingerprint"]:
        wrong.append("evaluated on the weights of another training (train_fingerprint differs)")
    evaluated, evaluation = found["metrics"]["evaluation"], params.evaluation.model_dump(mode="json")
    if evaluated != evaluation:
        shown = "; ".join(changes(evaluated, evaluation))
        wrong.append(f"evaluated with other params than params.yaml says: {shown}")
    if found["metrics"]["task_kind"] != kind:
        wrong.append(f"scored as task kind {found['metrics']['task_kind']}, but params.yaml says {kind}")
    problems += [f"{cell.name}: {text}" for text in wrong]
    return None if wrong else found


def _base(params: Params, model: str, task: str, root: Path, problems: list[str]) -> Loaded | None:
    """The untrained model's evaluation, or None with what lacks added to `problems`."""
    cell = Cell(model, task, BASE_METHOD, 0)
    files = _files(cell, root)
    lacking = _lacking(files, root)
    if lacking:
        problems.append(
            f"{model}/{task}: the untrained model, the zero row of every table, has no scores: {', '.join(lacking)} "
            f"missing; `dvc repro baseline` makes them"
        )
        return None
    unreadable = _unreadable(files, root, params.tasks[task].kind)
    if unreadable:
        problems += [f"{cell.name}: {text}" for text in unreadable]
        return None
    return _evaluation(params, cell, root)


def _files(cell: Cell, root: Path) -> list[Path]:
    folder = root / cell.results / "evaluation"
    return [folder / "metrics.json", folder / "predictions.parquet"]


def _lacking(files: Iterable[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in files if not path.exists()]


def _unreadable(paths: Iterable[Path], root: Path, kind: str) -> list[str]:
    """Which of a cell's files cannot be compared, and why."""
    found = []
    for path in paths:
        try:
            if path.suffix == ".json":
                wrong = records.flaw(path.name, read_json(path), NEEDED[path.name])
            else:
                names = pq.read_schema(path).names
                binary = [TASKS[kind].BINARY] if TASKS[kind].BINARY else []
                wanted = dict.fromkeys(["example_id", "prediction", *TASKS[kind].COMPONENTS, *binary])
                lacking = [name for name in wanted if name not in names]
                wrong = f"has no column {', '.join(lacking)}" if lacking else ""
        except ValueError as error:
            wrong = f"cannot be read ({first_line(error)})"
        if wrong:
            found.append(f"{path.relative_to(root)} {wrong}: an earlier molf wrote it, or it was damaged")
    return found


def _evaluation(params: Params, cell: Cell, root: Path) -> Loaded:
    """What an evaluation wrote; of the predictions only the columns that are compared."""
    metrics, predictions = _files(cell, root)
    kind = params.tasks[cell.task].kind
    wanted = dict.fromkeys(["example_id", "prediction", *TASKS[kind].COMPONENTS, TASKS[kind].BINARY])
    wanted[PAPER_SCORES.get(kind)] = None
    columns = [name for name in pq.read_schema(predictions).names if name in wanted]
    general = metrics.with_name("general.parquet")
    return {
        "metrics": read_json(metrics),
        "predictions": pd.read_parquet(predictions, columns=columns),
        "general": pd.read_parquet(general) if general.exists() else None,
    }


def _misfits(model: str, task: str, cells: Mapping[Cell, Loaded], base: Loaded | None, root: Path) -> Iterable[str]:
    """Reasons why cells of one model and task cannot be compared with one another."""
    if not cells:
        return
    where = f"{model}/{task}"
    for what, hashes in (
        ("data", {cell.name: found["run"]["data"]["hash"] for cell, found in cells.items()}),
        ("models", {cell.name: found["run"]["model"]["hash"] for cell, found in cells.items()}),
        ("versions of molf's code", {cell.name: _shared_code(found["run"]) for cell, found in cells.items()}),
        *(
            (f"versions of the code of {method}", {cell.name: cells[cell]["run"]["code"] for cell in seeds})
            for method, seeds in _by_method(cells).items()
        ),
        *((f"versions of {library}", of) for library, of in _by_library(cells).items()),
    ):
        if len(set(hashes.values())) > 1:
            shown = ", ".join(f"{name} {value[:12]}" for name, value in hashes.items())
            yield f"{where}: trained on unlike {what}: {shown}"
    first = next(iter(cells.values()))["run"]
    data = first["data"]["hash"]
    for cell, found in cells.items():
        if found["metrics"]["data_hash"] != found["run"]["data"]["hash"]:
            yield f"{cell.name}: trained and evaluated on unlike data"
    prepared = root / PREPARED / task / "summary.json"
    if prepared.exists() and read_json(prepared)["data_hash"] != data:
        yield f"{where}: trained on other data than {PREPARED / task} holds now"
    if base and base["metrics"]["data_hash"] != data:
        yield f"{where}: the untrained model was evaluated on other data than the methods"
    if base and base["metrics"]["train_fingerprint"] != untrained_fingerprint(first["model"]["hash"]):
        yield f"{where}: the scores of the untrained model are of another model than the methods started from"
    scored = [*cells.values(), *([base] if base else [])]
    if len({fingerprint(found["metrics"]["evaluation"], found["metrics"]["code"]) for found in scored}) > 1:
        yield f"{where}: the cells and the untrained model were not all evaluated by the same code and params"
    examples = [list(found["predictions"]["example_id"]) for found in scored]
    if any(ids != examples[0] for ids in examples):
        yield f"{where}: the cells were evaluated on unlike examples"
    if base and base["metrics"]["task_kind"] != next(iter(cells.values()))["metrics"]["task_kind"]:
        yield f"{where}: the untrained model was scored as task kind {base['metrics']['task_kind']}"
    general = [
        (found["metrics"]["general"]["hash"], list(found["general"]["text_id"]))
        for found in scored
        if found["general"] is not None and found["metrics"].get("general")
    ]
    if any(texts != general[0] for texts in general):
        yield f"{where}: the general loss was measured on unlike texts"


def _by_library(cells: Mapping[Cell, Loaded]) -> dict[str, dict[str, str]]:
    """Each library's version in the cells that depend on it: some are of one method alone."""
    found: dict[str, dict[str, str]] = {}
    for cell, loaded in cells.items():
        for library, version in loaded["run"]["versions"].items():
            found.setdefault(library, {})[cell.name] = str(version)
    return found


def _by_method(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.method, []).append(cell)
    return found


def _shared_code(run: Mapping[str, Any]) -> str:
    """Hash of the code that trains every method; an earlier molf told it from no method's own."""
    shared: str = run.get("shared_code", run["code"])
    return shared


def provenance(cell: Cell, found: Loaded) -> dict[str, Any]:
    """How a cell was made, for the report; its data is described once for all cells."""
    run = found["run"]
    noted, seen = found["summary"].get("lineage", {}), found["metrics"].get("lineage", {})
    kept = ("fingerprint", "config", "model", "code", "git_commit", "versions", "hardware")
    return {
        "cell": cell.name,
        **{key: run[key] for key in kept},
        "data": run["data"]["hash"],
        "weights": noted.get("weights", {}).get("hash"),
        "evaluation": found["metrics"]["fingerprint"],
        "evaluation_code": found["metrics"]["code"],
        "predictions": seen.get("predictions", {}).get("sha256"),
    }


def changes(then: Any, now: Any, key: str = "") -> list[str]:
    """Leaves in which two configurations differ, `key: then -> now`."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [text for k in keys for text in changes(then.get(k), now.get(k), f"{key}.{k}" if key else k)]
    return [] if then == now else [f"{key} was {then}, is {now}"]
