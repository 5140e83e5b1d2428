"""From the grid's results to the numbers of the report; results that do not belong together are refused."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from molf.config import Params, cell_config, fingerprint, untrained_fingerprint
from molf.errors import UserError
from molf.paths import BASE_METHOD, PREPARED, Cell, read_json
from molf.report import statistics
from molf.report.statistics import Interval, Outcome
from molf.tasks import TASKS

# MoLF must keep up with both of these kinds, each on its own: never with the better of two picked from the same data.
REFERENCE_KINDS = ("fft", "lora")
CANDIDATE_KINDS = ("molf", "molf-e")
NESTED = ("per_seed", "metrics", "routing_share", "warnings")  # of a method's numbers; not for the flat table
TOLERANCE = 1e-6  # between metrics.json and the score recomputed from predictions.parquet


def build(params: Params, root: Path) -> dict[str, Any]:
    """Everything that the report shows, as plain data; holds no time of day, so that equal results give equal bytes.

    Args:
        params: Their grid says which cells are read, their blocks what these must have been made with.
        root: Project folder.

    Raises:
        UserError: Every cell that lacks, that another configuration made, or that does not fit its neighbours.
    """
    problems: list[str] = []
    loaded = {cell: found for cell in params.cells() if (found := _load(params, cell, root, problems))}
    for model in params.grid.models:
        for task in params.grid.tasks:
            here = {cell: found for cell, found in loaded.items() if (cell.model, cell.task) == (model, task)}
            problems += _misfits(model, task, here, root)
    if problems:
        raise UserError([*problems, "nothing was compared; `dvc repro` brings the results up to date with params.yaml"])
    groups = [_group(params, model, task, loaded, root) for model in params.grid.models for task in params.grid.tasks]
    hardware = {found["run"]["hardware"]["fingerprint"]: found["run"]["hardware"] for found in loaded.values()}
    comparison: dict[str, Any] = {
        **params.compare.model_dump(mode="json"),
        "interval": str(statistics.label(len(params.grid.seeds))),
        "grid": params.grid.model_dump(mode="json"),
        "generated": any(group["generated"] for group in groups),
        "hardware": list(hardware.values()),
        "costs_comparable": len(hardware) == 1,
        "groups": groups,
        "data": {
            cell.task: {**found["run"]["data"], "license": params.tasks[cell.task].license}
            for cell, found in loaded.items()
        },
        "cells": [_provenance(cell, found) for cell, found in loaded.items()],
    }
    return {"sentence": sentence(comparison), **comparison}


def flat(comparison: Mapping[str, Any]) -> pd.DataFrame:
    """comparison.csv: one row for each model, task and method, the untrained model included."""
    rows = []
    for group in comparison["groups"]:
        place = {key: group[key] for key in ("model", "task", "task_kind", "primary_name", "generated", "examples")}
        if group["base"]:
            rows.append({**place, "method": BASE_METHOD, "kind": BASE_METHOD, **_numbers(group["base"])})
        for method in group["methods"]:
            row = {**place, **{key: method[key] for key in method if key not in NESTED}}
            row["seeds"] = len(method["per_seed"])
            share = method["routing_share"]
            row["routing_share_first"] = next(iter(share.values())) if share else None
            for difference in group["differences"]:
                if difference["method"] == method["method"] and difference["kind_versus"] in REFERENCE_KINDS:
                    for key in ("mean", "low", "high"):
                        row[f"vs_{difference['versus']}_{key}"] = difference[key]
            rows.append(row)
    return pd.DataFrame(rows)


def difference(group: Mapping[str, Any], method: str, versus: str) -> Mapping[str, Any] | None:
    """The difference of two methods of a group, `method` minus `versus`; None of a method to itself."""
    found = (d for d in group["differences"] if d["method"] == method and d["versus"] == versus)
    return next(found, None)


def references(group: Mapping[str, Any]) -> list[str]:
    """The methods of a group that MoLF is held against."""
    return [m["method"] for m in group["methods"] if m["kind"] in REFERENCE_KINDS]


def sentence(comparison: Mapping[str, Any]) -> str:
    """The verdict in one sentence: what each MoLF method is on each task."""
    by_method: dict[str, dict[str, list[str]]] = {}
    groups = comparison["groups"]
    for group in groups:
        place = group["task"] if len(comparison["grid"]["models"]) == 1 else f"{group['task']} with {group['model']}"
        for verdict in group["verdicts"]:
            by_method.setdefault(verdict["method"], {}).setdefault(verdict["outcome"], []).append(place)
    if not by_method:
        best = "; ".join(
            f"{g['task']} with {g['model']}: " + ", ".join(f"{m['method']} {m['mean']:.3f}" for m in g["methods"])
            for g in groups
        )
        return f"No verdict on MoLF: the grid must hold fft, lora and molf or molf-e. Scores: {best}."
    words = {
        Outcome.HOLDS: "keeps up with full fine-tuning and LoRA on",
        Outcome.FAILS: "falls behind full fine-tuning or LoRA on",
        Outcome.UNDECIDED: "is undecided on",
    }
    parts = [
        f"{method} " + ", ".join(f"{words[o]} {_listed(places[o])}" for o in Outcome if o in places)
        for method, places in by_method.items()
    ]
    percent = f"{100 * comparison['confidence']:g} %"
    data = " (generated data)" if all(group["generated"] for group in groups) else ""
    return (
        f"At a margin of {comparison['margin']:g}, {'; '.join(parts)}{data}; "
        f"{percent} bootstrap intervals, {comparison['interval']}."
    )


def limits(comparison: Mapping[str, Any]) -> list[str]:
    """What the comparison is too small to show, in sentences."""
    seeds = len(comparison["grid"]["seeds"])
    found = []
    if seeds == 1:
        found.append(
            "One seed: the intervals hold for these very weights, on other examples of the same kind. Another seed may "
            "move a score by more than they show."
        )
    else:
        found.append(
            f"{seeds} seeds: a bootstrap over so few covers the truth less often than it claims; take the intervals as "
            "exploratory."
        )
    for group in comparison["groups"]:
        widths = [d["high"] - d["low"] for d in group["differences"]]
        if not widths:
            continue
        half = float(np.median(widths)) / 2
        text = (
            f"{group['model']}, {group['task']}: {group['examples']} examples tell differences above about {half:.3f}"
        )
        if half > comparison["margin"]:
            need = math.ceil(group["examples"] * (half / comparison["margin"]) ** 2 / 100) * 100
            text += f"; a margin of {comparison['margin']:g} would need some {need:,} examples"
        found.append(text + ".")
    generated = sorted({group["task"] for group in comparison["groups"] if group["generated"]})
    if generated:
        found.append(f"Data of {_listed(generated)} is generated: a result on it says nothing about real data.")
    if comparison["costs_comparable"]:
        found.append("Times hold for this machine, and only if nothing else ran on it at the time.")
    else:
        found.append("The cells ran on unlike hardware: their times and memory are not comparable and are not ranked.")
    return found


def _load(params: Params, cell: Cell, root: Path, problems: list[str]) -> dict[str, Any] | None:
    """A cell's files, or None with what is wrong added to `problems`."""
    folder = root / cell.results
    files = {
        "run": folder / "train/run.json",
        "summary": folder / "train/summary.json",
        "metrics": folder / "evaluation/metrics.json",
        "predictions": folder / "evaluation/predictions.parquet",
    }
    lacking = [str(path.relative_to(root)) for path in files.values() if not path.exists()]
    if lacking:
        problems.append(f"{cell.name}: {', '.join(lacking)} missing")
        return None
    found = {key: read_json(path) for key, path in files.items() if path.suffix == ".json"}
    found["predictions"] = pd.read_parquet(files["predictions"])
    now, then = cell_config(params, cell), found["run"]["config"]
    wrong = []
    if then != now:
        wrong.append("trained with other params than params.yaml says: " + "; ".join(changes(then, now)))
    if found["summary"]["fingerprint"] != found["run"]["fingerprint"]:
        wrong.append("train/summary.json and train/run.json are of two trainings")
    if found["metrics"]["train_fingerprint"] != found["run"]["fingerprint"]:
        wrong.append("evaluated on the weights of another training (train_fingerprint differs)")
    evaluated, evaluation = found["metrics"]["evaluation"], params.evaluation.model_dump(mode="json")
    if evaluated != evaluation:
        shown = "; ".join(changes(evaluated, evaluation))
        wrong.append(f"evaluated with other params than params.yaml says: {shown}")
    kind = params.tasks[cell.task].kind
    if found["metrics"]["task_kind"] != kind:
        wrong.append(f"scored as task kind {found['metrics']['task_kind']}, but params.yaml says {kind}")
    problems += [f"{cell.name}: {text}" for text in wrong]
    return None if wrong else found


def _misfits(model: str, task: str, cells: Mapping[Cell, Mapping[str, Any]], root: Path) -> Iterable[str]:
    """Reasons why cells of one model and task cannot be compared with one another."""
    if not cells:
        return
    where = f"{model}/{task}"
    for what, hashes in (
        ("data", {cell.name: found["run"]["data"]["hash"] for cell, found in cells.items()}),
        ("models", {cell.name: found["run"]["model"]["hash"] for cell, found in cells.items()}),
        ("versions of molf's code", {cell.name: found["run"]["code"] for cell, found in cells.items()}),
        ("library versions", {cell.name: fingerprint(found["run"]["versions"]) for cell, found in cells.items()}),
    ):
        if len(set(hashes.values())) > 1:
            shown = ", ".join(f"{name} {value[:12]}" for name, value in hashes.items())
            yield f"{where}: trained on unlike {what}: {shown}"
    first = next(iter(cells.values()))["run"]
    data = first["data"]["hash"]
    for cell, found in cells.items():
        if found["metrics"]["data_hash"] != found["run"]["data"]["hash"]:
            yield f"{cell.name}: trained and evaluated on unlike data"
    prepared = _prepared(task, root)
    if prepared and prepared["data_hash"] != data:
        yield f"{where}: trained on other data than {PREPARED / task} holds now"
    base = _base(model, task, root)
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


def _group(params: Params, model: str, task: str, loaded: Mapping[Cell, Any], root: Path) -> dict[str, Any]:
    """One model and task: every method's numbers, their differences and the verdicts."""
    compare, methods, seeds = params.compare, params.grid.methods, params.grid.seeds
    cells = {method: [loaded[Cell(model, task, method, seed)] for seed in seeds] for method in methods}
    every = [found for found_of in cells.values() for found in found_of]
    scorer = TASKS[params.tasks[task].kind]
    names = list(scorer.COMPONENTS)

    def resample(found_of: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
        values = np.stack([np.stack([f["predictions"][names].to_numpy(float) for f in row]) for row in found_of])
        point = statistics.scores(values, names, scorer.combine)
        _agree(point, [f["metrics"] for row in found_of for f in row])
        return point.mean(axis=1), statistics.bootstrap(values, names, scorer.combine, compare.bootstrap, compare.seed)

    point, drawn = resample(list(cells.values()))
    base = _base(model, task, root)
    zero = None
    if base:
        base_point, base_drawn = resample([[base]])
        zero = {
            **vars(statistics.interval(base_point[0], base_drawn[0], compare.confidence)),
            "metrics": _finite(base["metrics"]["metrics"]),
            "fingerprint": base["metrics"]["fingerprint"],
        }
    kinds = {method: params.methods[method].kind for method in methods}
    rows = [
        {
            "method": method,
            "kind": kinds[method],
            **vars(statistics.interval(point[i], drawn[i], compare.confidence)),
            **_method(cells[method], seeds),
        }
        for i, method in enumerate(methods)
    ]
    differences = [
        {
            "method": method,
            "versus": versus,
            "kind_versus": kinds[versus],
            **vars(statistics.interval(point[i] - point[j], drawn[i] - drawn[j], compare.confidence)),
        }
        for i, method in enumerate(methods)
        for j, versus in enumerate(methods)
        if i != j
    ]
    reasons: dict[str, int] = {}
    for found in every:  # methods may differ (an answer that cannot be scored); the most is shown
        for reason, count in found["metrics"]["left_out"].items():
            reasons[reason] = max(reasons.get(reason, 0), count)
    group: dict[str, Any] = {
        "model": model,
        "task": task,
        "task_kind": params.tasks[task].kind,
        "primary_name": every[0]["metrics"]["primary_name"],
        "generated": every[0]["run"]["generated_data"],
        "examples": min(found["metrics"]["n"] for found in every),
        "left_out": {reason: count for reason, count in reasons.items() if count},
        "base": zero,
        "methods": rows,
        "differences": differences,
    }
    return {**group, "verdicts": _verdicts(group, compare.margin)}


def _method(cells: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """A method's cells as one: means over seeds, the peak over seeds."""
    summaries = [found["summary"] for found in cells]
    first = summaries[0]
    metrics = pd.DataFrame([_finite(found["metrics"]["metrics"]) for found in cells]).mean().to_dict()
    routed = [summary["routing"] for summary in summaries if summary["routing"]]
    share = None
    if routed:
        share = {name: float(np.mean([r["share"][name] for r in routed])) for name in routed[0]["experts"]}
    return {
        "per_seed": [
            {
                "seed": seed,
                "score": found["metrics"]["primary"],
                "train_fingerprint": found["run"]["fingerprint"],
                "evaluation_fingerprint": found["metrics"]["fingerprint"],
                "train_seconds": found["summary"]["train_seconds"],
                "evaluation_seconds": found["metrics"]["seconds"],
            }
            for seed, found in zip(seeds, cells, strict=True)
        ],
        "metrics": metrics,
        "steps": first["steps"],
        "train_examples": first["examples"],
        "final_loss": float(np.mean([s["final_loss"] for s in summaries])),
        "train_seconds": float(np.mean([s["train_seconds"] for s in summaries])),
        "tokens_per_second": float(np.mean([s["tokens_per_second"] for s in summaries])),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
        "trained_parameters": first["trained_parameters"],
        "total_parameters": first["total_parameters"],
        "weights_bytes": first["weights_bytes"],
        "routing_share": share,
        "one_sided": any(r["one_sided"] for r in routed),
        "warnings": list(dict.fromkeys(text for s in summaries for text in s["warnings"])),
    }


def _verdicts(group: Mapping[str, Any], margin: float) -> list[dict[str, Any]]:
    """Non-inferiority of each MoLF method to every fft and lora method (DESIGN.md section 3)."""
    against = references(group)
    if {m["kind"] for m in group["methods"] if m["method"] in against} != set(REFERENCE_KINDS):
        return []
    found = []
    for method in (m["method"] for m in group["methods"] if m["kind"] in CANDIDATE_KINDS):
        differences = [d for d in group["differences"] if d["method"] == method and d["versus"] in against]
        outcome = statistics.non_inferiority([Interval(d["mean"], d["low"], d["high"]) for d in differences], margin)
        shown = ", ".join(
            f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] against {d['versus']}" for d in differences
        )
        words = {
            Outcome.HOLDS: f"keeps up: both lower bounds lie above -{margin:g}",
            Outcome.FAILS: f"falls behind: an upper bound lies below -{margin:g}",
            Outcome.UNDECIDED: f"undecided: the bounds allow more and less than -{margin:g}",
        }[outcome]
        found.append(
            {"method": method, "versus": against, "outcome": str(outcome), "sentence": f"{method} {words} ({shown})"}
        )
    return found


def _agree(point: np.ndarray, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Holds scores recomputed from predictions (methods x seeds) against those in metrics.json."""
    problems = [
        f"{Cell(**m['cell']).name}: metrics.json says {m['primary']}, predictions.parquet gives {score}"
        for score, m in zip(point.ravel().tolist(), metrics, strict=True)
        if not abs(score - m["primary"]) <= TOLERANCE  # a NaN is a problem too
    ]
    if problems:
        raise UserError(problems)


def _base(model: str, task: str, root: Path) -> dict[str, Any] | None:
    """The untrained model's evaluation where there is one."""
    folder = root / Cell(model, task, BASE_METHOD, 0).results / "evaluation"
    if not (folder / "metrics.json").exists():
        return None
    return {
        "metrics": read_json(folder / "metrics.json"),
        "predictions": pd.read_parquet(folder / "predictions.parquet"),
    }


def _prepared(task: str, root: Path) -> dict[str, Any] | None:
    path = root / PREPARED / task / "summary.json"
    return read_json(path) if path.exists() else None


def _provenance(cell: Cell, found: Mapping[str, Any]) -> dict[str, Any]:
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


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("mean", "low", "high")}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
