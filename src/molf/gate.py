"""Whether a score fell since a git revision by more than its interval allows: a gate for CI."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from molf import records
from molf.config import Params, cell_config
from molf.errors import UserError, first_line, plain
from molf.paths import REPORTS, Cell
from molf.report import statistics
from molf.report.results import changes
from molf.report.statistics import Interval
from molf.revisions import Revision, Unavailable, WorkingTree
from molf.tasks import TASKS

COMPARISON = REPORTS / "comparison.json"
COSTS = {"train_seconds": "training, seconds", "peak_memory_bytes": "peak memory, bytes"}
SHOWN_CHANGES = 4  # of what else changed, in the table


class Change(StrEnum):
    """What became of a score."""

    FELL = "fell"
    IMPROVED = "improved"
    NOISE = "within noise"
    SAME = "unchanged"
    UNJUDGED = "not judged"


@dataclass(frozen=True)
class Scored:
    """A cell's scores: evaluation/metrics.json, and what each example gave."""

    metrics: Mapping[str, Any]
    predictions: pd.DataFrame

    def asked(self) -> object:
        """What tells its test rows from others: their file's hash; an earlier molf noted only that of all data."""
        files = self.metrics.get("lineage", {}).get("data", {}).get("files", {})
        return files.get("test.parquet", self.metrics["data_hash"])


@dataclass(frozen=True)
class Version:
    """A comparison and its cells, at a revision or here."""

    name: str
    comparison: Mapping[str, Any]
    cells: Mapping[Cell, Scored]

    def methods(self) -> dict[tuple[str, str, str], tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """{(model, task, method): (its group, its numbers there)}."""
        return _methods(self.comparison)

    def provenance(self, cell: Cell) -> Mapping[str, Any]:
        """How a cell was made."""
        return next((found for found in self.comparison["cells"] if found["cell"] == cell.name), {})


def _methods(
    comparison: Mapping[str, Any],
) -> dict[tuple[str, str, str], tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return {
        (group["model"], group["task"], method["method"]): (group, method)
        for group in comparison["groups"]
        for method in group["methods"]
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def against(root: Path, revision: str, params: Params) -> dict[str, Any]:
    """Compares the results that are here with those of a git revision.

    Args:
        root: The project's folder.
        revision: Anything that git takes for a commit.
        params: Their `compare` says how; what they say else than the results here is noted.

    Returns:
        {from, to, confidence, rows, only_then, only_now, notes, fell, lacking}; of rows see `judge`; lacking: cells
        that had a score then and failed now.

    Raises:
        UserError: There is no such revision, or no comparison then or now; files of it cannot be had here; no method is
            in both; or no score can be judged.
    """
    before, now = Revision(root, revision), WorkingTree(root)
    if not (root / COMPARISON).is_file():
        raise UserError(f"there is no {COMPARISON} here; `dvc pull {COMPARISON} results` brings it, or `molf run`")
    if not before.has(COMPARISON):
        raise UserError(
            f"{before.name} has no {COMPARISON}: nobody compared then, or dvc.lock was not committed with it; "
            "`git log --oneline dvc.lock` lists revisions that may have one"
        )
    comparisons = [_comparison(before), _comparison(now)]
    then, here = map(_methods, comparisons)
    both = [key for key in then if key in here]
    if not both:
        raise UserError(
            f"no model, task and method is both in {before.name} ({_listed(then)}) and here ({_listed(here)}), so that "
            "nothing can be compared"
        )
    seeds = {key: [_seeds(side[key][1]) for side in (then, here)] for key in both}
    wanted = [Cell(*key, seed) for key in both for seed in seeds[key][0] if seed in seeds[key][1]]
    pairs: list[tuple[Revision | WorkingTree, Any]] = [(before, comparisons[0]), (now, comparisons[1])]
    then_now = [Version(version.name, comparison, _cells(version, wanted, comparison)) for version, comparison in pairs]
    how = params.compare
    result = judge(then_now[0], then_now[1], how.confidence, how.bootstrap, how.seed)
    if all(row["change"] is Change.UNJUDGED for row in result["rows"]):
        told = [
            f"{row['model']}/{row['task']}/{row['method']} cannot be judged: {row['note']}" for row in result["rows"]
        ]
        raise UserError([*told, f"no score of {before.name} can be held against one here"])
    had = {Cell(*key, seed).name for key, (_, method) in then.items() for seed in _seeds(method)}
    lacking = [of["cell"] for of in comparisons[1].get("lacking_cells", []) if of["cell"] in had]
    return {**result, "lacking": lacking, "notes": _stale(params, comparisons[1])}


def _seeds(method: Mapping[str, Any]) -> list[int]:
    return [found["seed"] for found in method["per_seed"]]


def _listed(methods: Mapping[tuple[str, str, str], Any]) -> str:
    return ", ".join("/".join(key) for key in methods)


def _cells(
    version: Revision | WorkingTree, wanted: Sequence[Cell], comparison: Mapping[str, Any]
) -> dict[Cell, Scored]:
    """Scores of the cells, which are those that the comparison shows.

    Raises:
        UserError: With each that is not here, or that is of another evaluation.
    """
    shown = {
        Cell(*key, found["seed"]): found["evaluation_fingerprint"]
        for key, (_, method) in _methods(comparison).items()
        for found in method["per_seed"]
    }
    found, problems = {}, []
    for cell in wanted:
        folder = cell.results / "evaluation"
        try:
            metrics = _record(version, folder / "metrics.json")
            with version.open(folder / "predictions.parquet") as file:
                found[cell] = Scored(metrics, pd.read_parquet(file))
        except Unavailable as error:
            problems.append(str(error))
        except UserError as error:
            problems += error.problems
        except FileNotFoundError:
            problems.append(f"{folder} is not here; `dvc pull {folder}`")
        except ValueError as error:
            problems.append(f"{folder} of {version.name} cannot be read: {first_line(error)}")
        else:
            if metrics["fingerprint"] != shown[cell]:
                advice = (
                    "`dvc repro compare` makes it anew"
                    if isinstance(version, WorkingTree)
                    else "its dvc.lock was committed between the two; take another revision"
                )
                problems.append(f"{cell.name}: {COMPARISON} of {version.name} is of another evaluation; {advice}")
    if problems:
        raise UserError(problems)
    return found


def _comparison(version: Revision | WorkingTree) -> Any:
    """A version's comparison, with all that is read of it below."""
    found = _record(version, COMPARISON)
    try:
        for group, method in _methods(found).values():
            _ = [group[key] for key in ("task_kind", "primary_name", "examples")]
            _ = [method[key] for key in ("mean", "low", "high", *COSTS)]
            _ = [(one["seed"], one["evaluation_fingerprint"]) for one in method["per_seed"]]
        _ = [of["cell"] for of in found.get("lacking_cells", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{COMPARISON} of {version.name} lacks {first_line(error)}: an earlier molf wrote it, or it was edited; "
            "`dvc repro compare` makes one that can be compared"
        ) from None
    return found


def _json(version: Revision | WorkingTree, path: Path) -> Any:
    try:
        with version.open(path) as file:
            return json.load(file)
    except Unavailable as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"{path} of {version.name} cannot be read: {first_line(error)}") from None


def _record(version: Revision | WorkingTree, path: Path) -> Any:
    found = _json(version, path)
    if wrong := records.flaw(path.name, found):
        raise UserError(f"{path} of {version.name} {wrong}: an earlier molf wrote it, or it was edited")
    return found


def _stale(params: Params, comparison: Mapping[str, Any]) -> list[str]:
    """Where params.yaml asks for other trainings than those that the results here are of."""
    notes = []
    for found in comparison["cells"]:
        cell = Cell.parse(found["cell"])
        if cell.method in params.methods and cell.task in params.tasks:
            told = changes(found["config"], cell_config(params, cell))
            if told:
                notes.append(f"{cell.name} was trained with other params than params.yaml says: {'; '.join(told)}")
    return [*notes, "`dvc repro compare` makes the results anew; then compare again"] if notes else []


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(then: Version, now: Version, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    """What became of each method's score.

    Args:
        then, now: The versions; their cells are those with a seed that both have.
        confidence: Of the intervals of differences.
        resamples, seed: Of the bootstrap, where there is one seed.

    Returns:
        {from, to, confidence, rows, only_then, only_now, fell}. rows: {model, task, method, primary_name, change,
        paired, seeds, examples, then, now, difference {mean, low, high} or null, interval (what it takes as random) or
        null, note, lost and won (example_id of those right then and wrong now, and the reverse, in any seed), changed
        (what else is not as it was), costs {name: {then, now}}, costs_comparable}. fell: rows whose score fell.
    """
    before, here = then.methods(), now.methods()
    rows = [_row(key, then, now, before[key], here[key], confidence, resamples, seed) for key in before if key in here]
    return {
        "from": then.name,
        "to": now.name,
        "confidence": confidence,
        "rows": rows,
        "only_then": ["/".join(key) for key in before if key not in here],
        "only_now": ["/".join(key) for key in here if key not in before],
        "fell": [f"{row['model']}/{row['task']}/{row['method']}" for row in rows if row["change"] is Change.FELL],
    }


def _row(
    key: tuple[str, str, str],
    then: Version,
    now: Version,
    before: tuple[Mapping[str, Any], Mapping[str, Any]],
    here: tuple[Mapping[str, Any], Mapping[str, Any]],
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """One method of a model and task."""
    (group, old), (group_now, new) = before, here
    every = [_seeds(old), _seeds(new)]
    seeds = [number for number in every[0] if number in every[1]]
    cells = [Cell(*key, number) for number in seeds]
    pairs = [(then.cells[cell], now.cells[cell]) for cell in cells]
    row: dict[str, Any] = {
        **dict(zip(("model", "task", "method"), key, strict=True)),
        "primary_name": group_now["primary_name"],
        "change": Change.UNJUDGED,
        "paired": False,
        "seeds": seeds,
        "examples": group_now["examples"],
        "then": old["mean"],
        "now": new["mean"],
        "difference": None,
        "interval": None,
        "note": "",
        "lost": [],
        "won": [],
        "changed": sorted(
            {text for cell, pair in zip(cells, pairs, strict=True) for text in _changed(then, now, cell, pair)}
        ),
        "costs": {name: {"then": old[name], "now": new[name]} for name in COSTS},
        "costs_comparable": _comparable(then, now, cells, old, new),
    }
    if (group["task_kind"], group["primary_name"]) != (group_now["task_kind"], group_now["primary_name"]):
        return row | {"note": f"the score was {group['task_kind']}'s {group['primary_name']} then"}
    unlike = _unlike(pairs, group_now["task_kind"])
    if unlike:
        return row | unpaired(old, new) | {"note": f"not the same examples ({unlike}): the two intervals are compared"}
    note = "" if every[0] == every[1] else f"on the seeds of both; then {_numbers(every[0])}, now {_numbers(every[1])}"
    return row | _paired(pairs, group_now["task_kind"], confidence, resamples, seed) | {"note": note}


def _unlike(pairs: Sequence[tuple[Scored, Scored]], kind: str) -> str:
    """Why examples cannot be paired; empty if they can."""
    if not pairs:
        return "no seed is in both"
    for old, new in pairs:
        if old.asked() != new.asked():
            return "the test rows changed"
        if list(old.predictions["example_id"]) != list(new.predictions["example_id"]):
            return "other example ids"
        lacking = [name for name in TASKS[kind].COMPONENTS if name not in old.predictions]
        if lacking:
            return f"no column {', '.join(lacking)} then"
    return ""


def _paired(
    pairs: Sequence[tuple[Scored, Scored]], kind: str, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """The difference on the same examples and seeds, taken like one of two methods."""
    task = TASKS[kind]
    names = list(task.COMPONENTS)
    values = np.stack(
        [np.stack([pair[side].predictions[names].to_numpy(float) for pair in pairs]) for side in (1, 0)]
    )  # now and then x seeds x examples x components
    scores = statistics.Scores(values, names, task.combine, confidence=confidence, resamples=resamples, seed=seed)
    difference = scores.difference(0, 1)
    means = scores.by_seed.mean(axis=1)
    same = np.array_equal(values[0], values[1], equal_nan=True)
    return {
        "change": Change.SAME if same else _change(difference),
        "paired": True,
        "examples": int(np.isfinite(values).any(axis=(0, 1, 3)).sum()),
        "then": float(means[1]),
        "now": float(means[0]),
        "difference": asdict(difference),
        "interval": str(statistics.label(len(pairs))),
        **_examples(pairs, task.BINARY),
    }


def _examples(pairs: Sequence[tuple[Scored, Scored]], binary: str | None) -> dict[str, list[str]]:
    """Ids of the examples that were right then and are wrong now in some seed, and the reverse."""
    if binary is None:
        return {"lost": [], "won": []}
    ids = pairs[0][0].predictions["example_id"]
    sides = [np.stack([pair[side].predictions[binary].to_numpy(float) for pair in pairs]) for side in (0, 1)]
    return {
        name: ids[((sides[first] == 1) & (sides[1 - first] == 0)).any(axis=0)].tolist()
        for name, first in (("lost", 0), ("won", 1))
    }


def unpaired(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two independent estimates from their intervals (Newcombe 1998, Zou and Donner 2008).

    The distance of each bound from its mean stands for that side's standard error, so that intervals need not be
    symmetric.
    """
    mean = new["mean"] - old["mean"]
    low = mean - float(np.hypot(new["mean"] - new["low"], old["high"] - old["mean"]))
    high = mean + float(np.hypot(new["high"] - new["mean"], old["mean"] - old["low"]))
    difference = Interval(mean, low, high)
    return {"change": _change(difference), "difference": asdict(difference), "interval": "unpaired"}


def _change(difference: Interval) -> Change:
    if difference.high < 0:
        return Change.FELL
    return Change.IMPROVED if difference.low > 0 else Change.NOISE


def _changed(then: Version, now: Version, cell: Cell, pair: tuple[Scored, Scored]) -> list[str]:
    """What of a cell's making is not as it was, which may be why its score is not."""
    old, new = then.provenance(cell), now.provenance(cell)
    found = changes(old.get("config"), new.get("config"))
    found += changes(old.get("versions"), new.get("versions"))
    found += changes(pair[0].metrics["evaluation"], pair[1].metrics["evaluation"], "evaluation")
    for what, key in (("the data", "data"), ("molf's code", "code"), ("molf's code that evaluates", "evaluation_code")):
        found += [what] if old.get(key) != new.get(key) else []
    models = [side.get("model", {}).get("hash") for side in (old, new)]
    return found + (["the base model"] if models[0] != models[1] else [])


def _comparable(
    then: Version, now: Version, cells: Sequence[Cell], old: Mapping[str, Any], new: Mapping[str, Any]
) -> bool:
    """Whether time and memory of both say anything of each other: one kind of machine, on which nothing else ran."""
    machines = {side.provenance(cell).get("hardware", {}).get("fingerprint") for side in (then, now) for cell in cells}
    return len(machines) == 1 and not old.get("contended") and not new.get("contended")


# --- shown -----------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `against` found, for the terminal."""
    rows = result["rows"]
    lines = [f"from {result['from']} to {result['to']}: {100 * result['confidence']:g} % intervals of the differences"]
    width = max(len(row["method"]) for row in rows)
    place = None
    for row in rows:
        if place != (row["model"], row["task"]):
            place = row["model"], row["task"]
            lines.append(f"{row['model']}, {row['task']}: {row['primary_name']}")
        lines.append(f"  {row['method']:{width}}  {_shown(row)}")
        lines += [f"  {'':{width}}  {text}" for text in _below(row)]
    for name, when in (("only_then", result["from"]), ("only_now", result["to"])):
        if result[name]:
            lines.append(f"only in {when}, not judged: {', '.join(result[name])}")
    if result.get("lacking"):
        lines.append(f"lacking in {result['to']}, not judged: {', '.join(result['lacking'])}")
    lines += [f"note: {note}" for note in result.get("notes", [])]
    return "\n".join(map(plain, lines))


def _shown(row: Mapping[str, Any]) -> str:
    text = f"{row['then']:.3f} -> {row['now']:.3f}"
    difference = row["difference"]
    if difference is None:
        return f"{text}  {row['change']}"
    numbers = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{text}  {numbers}  {row['change']}"


def _below(row: Mapping[str, Any]) -> list[str]:
    """What else is to be said of a score: on what it was judged, what changed, what it costs."""
    found = [row["note"]] if row["note"] else []
    if row["paired"] and row["change"] is not Change.SAME:
        on = f"{row['examples']:,} examples, seeds {_numbers(row['seeds'])} ({row['interval']})"
        lost, won = len(row["lost"]), len(row["won"])
        found.append(on + (f"; {lost:,} right then are wrong now, {won:,} the reverse" if lost or won else ""))
    if row["changed"]:
        more = len(row["changed"]) - SHOWN_CHANGES
        shown = "; ".join(row["changed"][:SHOWN_CHANGES])
        found.append(f"also changed: {shown}" + (f"; {more} more" if more > 0 else ""))
    costs = [
        f"{COSTS[name]}: {cost['then']:,.4g} -> {cost['now']:,.4g} ({cost['now'] / cost['then'] - 1:+.0%})"
        for name, cost in row["costs"].items()
        if cost["then"] and cost["now"] != cost["then"]
    ]
    if costs:
        unlike = "" if row["costs_comparable"] else " (another machine, or one that was busy: not comparable)"
        found.append("; ".join(costs) + unlike)
    return found


def _numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def verdict(result: Mapping[str, Any]) -> str:
    """The gate's verdict in a sentence, with how many scores it is about."""
    counts = {change: sum(row["change"] is change for row in result["rows"]) for change in Change}
    judged = len(result["rows"]) - counts[Change.UNJUDGED]
    told = ", ".join(f"{count} {change}" for change, count in counts.items() if count)
    return f"{judged} of {len(result['rows'])} scores judged: {told}"
