"""From the grid's results to the numbers of the report."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from molf import tuning
from molf.config import Compare, Params
from molf.errors import UserError
from molf.paths import BASE_METHOD, RATES, Cell, read_json
from molf.report import statistics
from molf.report.controls import control, kind_of
from molf.report.lacking import Lack
from molf.report.results import PAPER_SCORES, Loaded, load, provenance
from molf.report.statistics import Combine, Interval, Scores
from molf.report.verdicts import REFERENCE_KINDS, listed, paper_sentence, recommendation, sentence, verdicts
from molf.tasks import TASKS

# Of a method's numbers; not for the flat table, or not as they are.
NESTED = (
    *("control", "per_seed", "metrics", "errors", "routing_share", "ranks", "warnings"),
    *("general", "weights", "over_base"),
)
TOLERANCE = 1e-6  # between metrics.json and the score recomputed from predictions.parquet
NAMED = 3  # cells that a sentence names; more are counted
COSTS = ("train_seconds", "peak_memory_bytes")


def build(params: Params, root: Path) -> dict[str, Any]:
    """Everything that the report shows, as plain data; holds no time of day, so that equal results give equal bytes.

    Args:
        params: Their grid says which cells are read, their blocks what these must have been made with.
        root: Project folder.

    Raises:
        UserError: Every cell that lacks and is not said to (`report.lacking`), that another configuration made, or that
            does not fit its neighbours.
    """
    loaded, bases, absent = load(params, root)
    sweeps = read_json(root / RATES)["sweeps"] if params.grid.tune else []
    lacking = [_lack(params, cell, lack) for cell, lack in absent.items()]
    groups = [
        _group(params, model, task, loaded, base, *(_of(found, model, task) for found in (lacking, sweeps)))
        for (model, task), base in bases.items()
    ]
    tests = [test for group in groups for test in group["tests"]]
    for test, p_holm in zip(tests, statistics.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p_holm
    hardware = {found["run"]["hardware"]["fingerprint"]: found["run"]["hardware"] for found in loaded.values()}
    comparison: dict[str, Any] = {
        **params.compare.model_dump(mode="json"),
        "interval": _interval_label(groups),
        "grid": params.grid.model_dump(mode="json"),
        "generated": any(group["generated"] for group in groups),
        "hardware": list(hardware.values()),
        "costs_comparable": len(hardware) == 1 and all(group["costs_comparable"] for group in groups),
        "lacking_cells": lacking,
        "groups": groups,
        "data": {
            cell.task: {**found["run"]["data"], "license": params.tasks[cell.task].license}
            for cell, found in loaded.items()
        },
        "cells": [provenance(cell, found) for cell, found in loaded.items()],
    }
    return {"sentence": sentence(comparison), **comparison}


def _of(found: Sequence[Mapping[str, Any]], model: str, task: str) -> list[Mapping[str, Any]]:
    return [of for of in found if (of["model"], of["task"]) == (model, task)]


def _lack(params: Params, cell: Cell, lack: Lack) -> dict[str, Any]:
    """A cell that lacks, as comparison.json has it."""
    block: dict[str, Any] = {"kind": BASE_METHOD}
    if cell.method != BASE_METHOD:
        block = params.methods[cell.method].model_dump(mode="json")
    made = {"method_kind": kind_of(block), "control": control(block)}
    return {"cell": cell.name, **vars(cell), **made, "kind": str(lack.kind), "reason": lack.reason}


def _interval_label(groups: Iterable[Mapping[str, Any]]) -> str:
    """What the intervals take as random, most first; those with fewer seeds than the others take less."""
    counts = {len(m["per_seed"]) for group in groups for m in group["methods"]}
    counts |= {len(d["seeds"]) for group in groups for d in group["differences"]}
    most, *fewer = dict.fromkeys(str(statistics.label(count)) for count in sorted(counts, reverse=True))
    return most + (f", but {' or '.join(fewer)} where seeds lack" if fewer else "")


def flat(comparison: Mapping[str, Any]) -> pd.DataFrame:
    """comparison.csv: one row for each model, task and method, the untrained model included."""
    rows = []
    for group in comparison["groups"]:
        place = {key: group[key] for key in ("model", "task", "task_kind", "primary_name", "generated", "examples")}
        base = group["base"]
        paper = {m["method"]: m["mean"] for m in group["paper"]["methods"]} if group["paper"] else {}
        rows.append(
            {
                **place,
                "method": BASE_METHOD,
                "kind": BASE_METHOD,
                **{key: base[key] for key in ("mean", "low", "high")},
                "paper_score": paper.get(BASE_METHOD),
                "general_loss": base["general"]["loss"] if base["general"] else None,
            }
        )
        for method in group["methods"]:
            row = {**place, **{key: method[key] for key in method if key not in NESTED}}
            row["control"] = method["control"]["words"] if method["control"] else None
            row["seeds"] = len(method["per_seed"])
            row["seeds_lacking"] = sum(of["method"] == method["method"] for of in group["lacking"])
            row["paper_score"] = paper.get(method["method"])
            share = method["routing_share"]
            row["routing_share_first"] = next(iter(share.values())) if share else None
            for difference in group["differences"]:
                if difference["method"] == method["method"] and difference["kind_versus"] in REFERENCE_KINDS:
                    row |= {f"vs_{difference['versus']}_{key}": difference[key] for key in ("mean", "low", "high")}
            row |= {f"over_base_{key}": method["over_base"][key] for key in ("mean", "low", "high")}
            general, weights = method["general"], method["weights"]
            row["general_loss"] = general["loss"] if general else None
            row |= {f"general_change_{key}": general[key] if general else None for key in ("mean", "low", "high")}
            for key in ("relative_change", "effective_rank", "intruders"):
                row[f"weights_{key}"] = weights[key] if weights else None
            for of in (of for of in group["sweeps"] if of["method"] == method["method"]):
                row["learning_rate_factor"] = of["chosen"]
            row["costs_comparable"] = group["costs_comparable"]
            row["recommended"] = group["recommendation"]["method"] == method["method"]
            rows.append(row)
    there = {(row["model"], row["task"], row["method"]) for row in rows}
    for of in comparison["lacking_cells"]:  # a method of which nothing is there has a row without numbers
        place = {key: of[key] for key in ("model", "task", "method")}
        if tuple(place.values()) not in there:
            there.add(tuple(place.values()))
            seeds = sum(
                all(other[key] == value for key, value in place.items()) for other in comparison["lacking_cells"]
            )
            rows.append({**place, "kind": of["method_kind"], "seeds": 0, "seeds_lacking": seeds})
    return pd.DataFrame(rows)


def difference(group: Mapping[str, Any], method: str, versus: str) -> Mapping[str, Any] | None:
    """The difference of two methods of a group, `method` minus `versus`; None of a method to itself."""
    found = (d for d in group["differences"] if d["method"] == method and d["versus"] == versus)
    return next(found, None)


class _Rows:
    """Scores of rows of cells, of which some may lack seeds: each number is over the seeds that all it is of have.

    Args:
        rows: A row a method, its cells by seed; equal seeds stand in equal order.
        scores: Makes the scores of rows that all have the same seeds.
    """

    def __init__(self, rows: Sequence[Mapping[int, Loaded]], scores: Callable[[Sequence[Sequence[Loaded]]], Scores]):
        self.rows, self._make = rows, scores
        self._made: dict[tuple[int, ...], tuple[Scores, list[int]]] = {}

    def seeds(self, *rows: int) -> tuple[int, ...]:
        """Those that each of the rows has."""
        first, *others = (self.rows[row] for row in rows)
        return tuple(seed for seed in first if all(seed in other for other in others))

    def _at(self, *rows: int) -> tuple[Scores, list[int]]:
        """Scores over the rows' common seeds, and where the rows are among them."""
        seeds = self.seeds(*rows)
        if seeds not in self._made:
            whole = [i for i, row in enumerate(self.rows) if all(seed in row for seed in seeds)]
            self._made[seeds] = self._make([[self.rows[i][seed] for seed in seeds] for i in whole]), whole
        scores, whole = self._made[seeds]
        return scores, [whole.index(row) for row in rows]

    def interval(self, row: int) -> Interval:
        scores, [at] = self._at(row)
        return scores.interval(at)

    def difference(self, row: int, versus: int) -> Interval:
        scores, [one, other] = self._at(row, versus)
        return scores.difference(one, other)

    def needed(self, row: int, versus: int, margin: float) -> tuple[int | None, int | None]:
        scores, [one, other] = self._at(row, versus)
        return scores.needed(one, other, margin)

    def by_seed(self, row: int) -> list[float]:
        """A row's score of each of its seeds."""
        scores, [at] = self._at(row)
        return [float(score) for score in scores.by_seed[at]]


def _group(
    params: Params,
    model: str,
    task: str,
    loaded: Mapping[Cell, Loaded],
    base: Loaded,
    lacking: Sequence[Mapping[str, Any]],
    sweeps: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One model and task: every method's numbers, their differences and the verdicts."""
    compare, seeds = params.compare, params.grid.seeds
    there = {
        method: {seed: loaded[cell] for seed in seeds if (cell := Cell(model, task, method, seed)) in loaded}
        for method in params.grid.methods
    }
    by_seed = {method: row for method, row in there.items() if row}
    methods, cells = list(by_seed), {method: list(row.values()) for method, row in by_seed.items()}
    every = [found for found_of in cells.values() for found in found_of]
    kinds = {method: kind_of(params.methods[method].model_dump(mode="json")) for method in methods}
    scorer = TASKS[params.tasks[task].kind]
    # The untrained model has one seed, which stands beside each of the others'.
    rows = [*by_seed.values(), dict.fromkeys(seeds, base)]
    scores = _Rows(rows, lambda of: _scores(of, list(scorer.COMPONENTS), scorer.combine, compare))
    _agree([scores.by_seed(i) for i in range(len(rows))], [[f["metrics"] for f in row.values()] for row in rows])
    general = _general_changes(rows, compare)
    differences = _differences(scores, kinds, compare)
    tabled = [
        {
            "method": method,
            "kind": kinds[method],
            "control": control(params.methods[method].model_dump(mode="json")),
            **vars(scores.interval(i)),
            "over_base": vars(scores.difference(i, len(methods))),
            **_method(by_seed[method], seeds),
            "general": general[i],
        }
        for i, method in enumerate(methods)
    ]
    for m in tabled:
        m["warnings"] += [text for of in sweeps if of["method"] == m["method"] for text in tuning.remarks(of)]
    reasons: dict[str, int] = {}
    for found in every:  # methods may differ (an answer that cannot be scored); the most is shown
        for reason, count in found["metrics"]["left_out"].items():
            reasons[reason] = max(reasons.get(reason, 0), count)
    why = _why_not_comparable(cells)
    group: dict[str, Any] = {
        "model": model,
        "task": task,
        "task_kind": params.tasks[task].kind,
        "primary_name": every[0]["metrics"]["primary_name"],
        "generated": every[0]["run"]["generated_data"],
        "examples": min(found["metrics"]["n"] for found in every),
        "left_out": {reason: count for reason, count in reasons.items() if count},
        "base": {
            **vars(scores.interval(len(methods))),
            "metrics": _finite(base["metrics"]["metrics"]),
            "errors": _errors([base]),
            "fingerprint": base["metrics"]["fingerprint"],
            "general": {"loss": base["metrics"]["general"]["loss"]} if base["metrics"].get("general") else None,
        },
        "lacking": list(lacking),
        "sweeps": list(sweeps),
        "methods": tabled,
        "differences": differences,
        "tests": _tests(by_seed, scorer.BINARY),
        "costs_comparable": why is None,
        "why_not_comparable": why,
        "pareto": None if why else {cost: _front(tabled, cost) for cost in COSTS},
    }
    return {
        **group,
        "verdicts": verdicts(group, compare.margin, len(seeds)),
        "recommendation": recommendation(group, compare.margin, len(seeds)),
        "paper": _paper(group, rows, PAPER_SCORES.get(group["task_kind"]), kinds, compare),
    }


def _scores(rows: Sequence[Sequence[Loaded]], names: Sequence[str], combine: Combine, compare: Compare) -> Scores:
    """The scores of rows of cells, one row a method and one cell a seed, from columns of their predictions."""
    values = np.stack([np.stack([found["predictions"][names].to_numpy(float) for found in row]) for row in rows])
    return Scores(values, names, combine, confidence=compare.confidence, resamples=compare.bootstrap, seed=compare.seed)


def _differences(scores: _Rows, kinds: Mapping[str, str], compare: Compare) -> list[dict[str, Any]]:
    """Every ordered pair of methods with a seed in common: the difference, and what would decide an undecided one."""
    found = []
    for i, method in enumerate(kinds):
        for j, versus in enumerate(kinds):
            if i == j or not scores.seeds(i, j):
                continue
            interval = scores.difference(i, j)
            seeds, examples = scores.needed(i, j, compare.margin)
            found.append(
                {
                    "method": method,
                    "versus": versus,
                    "kind_versus": kinds[versus],
                    **vars(interval),
                    "seeds": list(scores.seeds(i, j)),
                    "seeds_needed": seeds,
                    "examples_needed": examples,
                }
            )
    return found


def _paper(
    group: Mapping[str, Any],
    rows: Sequence[Mapping[int, Loaded]],
    metric: str | None,
    kinds: Mapping[str, str],
    compare: Compare,
) -> dict[str, Any] | None:
    """The verdicts on the score that the paper reports for the task; None where it reports none."""
    if metric is None or any(metric not in found["predictions"] for row in rows for found in row.values()):
        return None
    scores = _Rows(rows, lambda of: _scores(of, [metric], lambda means: means[metric], compare))
    beside = {m["method"]: m["control"] for m in group["methods"]}
    found = {
        "metric": metric,
        "methods": [
            {"method": method, "kind": kind, "control": beside.get(method), **vars(scores.interval(i))}
            for i, (method, kind) in enumerate([*kinds.items(), (BASE_METHOD, BASE_METHOD)])
        ],
        "differences": _differences(scores, kinds, compare),
    }
    of = {**group, "methods": found["methods"][:-1], "differences": found["differences"]}
    judged = verdicts(of, compare.margin, len(rows[-1]))
    return {**found, "verdicts": judged, "sentence": paper_sentence(metric, of, judged)}


def _general_changes(rows: Sequence[Mapping[int, Loaded]], compare: Compare) -> list[dict[str, Any] | None]:
    """For each method how its loss on general text differs from the untrained model's, the last of the rows.

    In nats per token, positive where it got worse; texts are random, and seeds where there are several.
    """
    if any(found["general"] is None or not found["metrics"].get("general") for row in rows for found in row.values()):
        return [None] * (len(rows) - 1)

    def scores(of: Sequence[Sequence[Loaded]]) -> Scores:
        return Scores(
            np.stack([np.stack([found["general"][["nll", "tokens"]].to_numpy(float) for found in row]) for row in of]),
            ["nll", "tokens"],
            lambda means: means["nll"] / means["tokens"],
            confidence=compare.confidence,
            resamples=compare.bootstrap,
            seed=compare.seed,
            span=None,
        )

    known, base = _Rows(rows, scores), len(rows) - 1
    return [{"loss": float(np.mean(known.by_seed(i))), **vars(known.difference(i, base))} for i in range(base)]


def _tests(cells: Mapping[str, Mapping[int, Loaded]], metric: str | None) -> list[dict[str, Any]]:
    """McNemar's exact test of every pair of methods under each seed; `p_holm` waits for the other groups'."""
    if metric is None:
        return []
    found = []
    for method, versus in combinations(cells, 2):
        for seed in (seed for seed in cells[method] if seed in cells[versus]):
            first, second = (cells[name][seed]["predictions"][metric].to_numpy(float) for name in (method, versus))
            only_method, only_versus, p = statistics.mcnemar(first, second)
            found.append(
                {
                    "method": method,
                    "versus": versus,
                    "seed": seed,
                    "metric": metric,
                    "only_method": only_method,
                    "only_versus": only_versus,
                    "p": p,
                }
            )
    return found


def _why_not_comparable(cells: Mapping[str, Sequence[Loaded]]) -> str | None:
    """Why the costs of a group's cells cannot be ranked; None if they can, or nothing is known against it."""
    every = [found for row in cells.values() for found in row]
    machines = {found["run"]["hardware"]["fingerprint"]: found["run"]["hardware"] for found in every}
    if len(machines) > 1:
        shown = ", ".join(dict.fromkeys(map(_machine, machines.values())))
        alike = len({h["name"] for h in machines.values()}) == 1
        return f"the cells ran on {'one machine in unlike ways' if alike else 'unlike hardware'} ({shown})"
    contended = [Cell(**f["run"]["cell"]).name for f in every if f["summary"].get("contended")]
    if contended:
        shown = listed(contended) if len(contended) <= NAMED else f"{len(contended)} of {len(every)} cells"
        verb = "was" if len(contended) == 1 else "were"
        return f"other programs kept the machine busy while {shown} {verb} trained"
    return None


def _machine(hardware: Mapping[str, Any]) -> str:
    parts = hardware.get("micro_batches", 1)  # an earlier molf took each batch whole
    hosts = hardware.get("hosts", 1)
    return (
        f"{hardware['name']} with {hardware['threads']} threads"
        + (f", batches in {parts} parts" * (parts > 1))
        + (f", {hosts} such hosts" * (hosts > 1))
    )


def _front(methods: Sequence[Mapping[str, Any]], cost: str) -> list[str]:
    found = statistics.front([m["mean"] for m in methods], [m[cost] for m in methods])
    return [methods[i]["method"] for i in found]


def _method(by_seed: Mapping[int, Loaded], seeds: Sequence[int]) -> dict[str, Any]:
    """A method's cells as one: means over the seeds that are there, of all those of the grid; the peak over them."""
    cells = list(by_seed.values())
    summaries = [found["summary"] for found in cells]
    first = summaries[0]
    metrics = pd.DataFrame([_finite(found["metrics"]["metrics"]) for found in cells]).mean().to_dict()
    routed = [summary["routing"] for summary in summaries if summary["routing"]]
    share = None
    if routed:
        share = {name: float(np.mean([r["share"][name] for r in routed])) for name in routed[0]["experts"]}
    known = [summary.get("contended") for summary in summaries]
    sources = list(dict.fromkeys(summary.get("energy_source") for summary in summaries))
    joules = [summary.get("energy_joules") for summary in summaries]
    measured = len(sources) == 1 and None not in joules  # a socket's energy and a GPU's have no mean
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
            for seed, found in by_seed.items()
        ],
        "metrics": metrics,
        "errors": _errors(cells),
        "steps": first["steps"],
        "train_examples": first["examples"],
        "final_loss": _mean(s["final_loss"] for s in summaries),
        "train_seconds": _mean(s["train_seconds"] for s in summaries),
        "evaluation_seconds": _mean(found["metrics"]["seconds"] for found in cells),
        "tokens_per_second": _mean(s["tokens_per_second"] for s in summaries),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
        "trained_parameters": first["trained_parameters"],
        "total_parameters": first["total_parameters"],
        "weights_bytes": first["weights_bytes"],
        "energy_joules": _mean(joules) if measured else None,
        "energy_source": sources[0] if measured else None,
        "contended": True if True in known else None if None in known else False,
        "weights": _mean_of([found["metrics"].get("weights") for found in cells]),
        "routing_share": share,
        "one_sided": any(r["one_sided"] for r in routed),
        "ranks": _ranks(summaries),
        "warnings": list(
            dict.fromkeys(
                [
                    *_lacking_seeds(by_seed, seeds),
                    *(text for s in summaries for text in s["warnings"]),
                    *_constant_answers(cells),
                ]
            )
        ),
    }


def _ranks(summaries: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Lowest, mean and highest rank of a module at the end, over the seeds; None where a method moves none."""
    found = [(summary.get("adaptation") or {}).get("ranks") or {} for summary in summaries]  # an earlier molf has none
    every = [rank for ranks in found for rank in ranks.values()]
    return {"low": min(every), "mean": float(np.mean(every)), "high": max(every)} if every else None


def _lacking_seeds(there: Iterable[int], seeds: Sequence[int]) -> Iterable[str]:
    known = list(there)
    if len(known) < len(seeds):
        yield (
            f"of seeds {listed(list(map(str, seeds)))} only {listed(list(map(str, known)))} "
            f"{'is' if len(known) == 1 else 'are'} there: its numbers are over what is there, a difference of two "
            "methods over the seeds that both have"
        )


def _errors(cells: Sequence[Loaded]) -> dict[str, float]:
    """How many answers failed, by the kind of failure, where a task tells kinds: the mean over seeds."""
    counts = [found["metrics"]["metrics"].get("errors", {}) for found in cells]
    kinds = sorted({kind for of_cell in counts for kind in of_cell})
    return {kind: _mean(of_cell.get(kind, 0) for of_cell in counts) for kind in kinds}


def _constant_answers(cells: Sequence[Loaded]) -> Iterable[str]:
    """A method that answers everything alike has learnt how often that answer is right, whatever its score."""
    for found in cells:
        answers = found["predictions"]["prediction"]
        if len(answers) > 1 and answers.nunique(dropna=False) == 1:
            told = f"one and the same answer to all {len(answers)} examples"
            # Several components make a score of more than the answers, as fact's of likelihoods.
            of_answers = len(TASKS[found["metrics"]["task_kind"]].COMPONENTS) == 1
            yield f"{told}; the score is how often that is right" if of_answers else told


def _mean_of(rows: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The mean of each key; None where a row lacks."""
    known = [row for row in rows if row is not None]
    return {key: _mean(row[key] for row in known) for key in known[0]} if len(known) == len(rows) else None


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _agree(scores: Sequence[Sequence[float]], metrics: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Holds scores recomputed from predictions, of each method and seed, against those in metrics.json."""
    problems = {
        f"{Cell(**m['cell']).name}: metrics.json says {m['primary']}, predictions.parquet gives {score}": None
        for of_seeds, row in zip(scores, metrics, strict=True)
        for score, m in zip(of_seeds, row, strict=True)
        if not abs(score - m["primary"]) <= TOLERANCE  # a NaN is a problem too
    }
    if problems:
        raise UserError(list(problems))


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
