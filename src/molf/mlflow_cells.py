"""A cell's run in MLflow, from the files of results/CELL. All here may raise; tracking.py guards it."""

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.mlflow_store import STEP_METRICS, Store, milliseconds
from molf.paths import BASE_METHOD, RESULTS, Cell, read_json
from molf.records import read_any

if TYPE_CHECKING:
    import pandas as pd

# What a training cost and came to: by its key in summary.json, its name here and the unit that it is divided by.
SUMMARY_METRICS = {
    "train_seconds": ("cost/train_seconds", 1),
    "peak_memory_bytes": ("cost/peak_memory_gb", 10**9),
    "trained_parameters": ("cost/trained_parameters", 1),
    "weights_bytes": ("cost/weights_gb", 10**9),
    "energy_joules": ("cost/energy_joules", 1),
    "other_load": ("cost/other_load", 1),
    "final_loss": ("train/final_loss", 1),
    "steps": ("train/steps", 1),
}
ROUTING_POINTS = 200  # at most, of a curve of one type of module: a page draws no more
SHOWN_ROWS, SHOWN_CHARACTERS = 100, 500  # of the predictions' table; all of them are in predictions.parquet


def complete(store: Store, run_id: str, train: Path) -> None:
    """Brings a run up to the files of results/CELL/train, then ends it: FINISHED means that nothing is missing."""
    run, summary = read_json(train / "run.json"), read_json(train / "summary.json")
    rows = history_rows(train)
    keys = {key for row in rows for key in row if "/" in key}
    logged = {key: store.logged_steps(run_id, key) for key in keys}
    missing = [
        {key: value for key, value in row.items() if key not in keys or row["step"] not in logged[key]} for row in rows
    ]
    started = milliseconds(run["started"])
    store.log_steps(run_id, started, missing)
    store.log_values(run_id, costs(summary))
    store.log_files(run_id, "train", train / "run.json", train / "summary.json", train / "history.parquet")
    if (train / "routing.parquet").exists():
        _log_routing(store, run_id, train, run)
    if (summary.get("adaptation") or {}).get("ranks"):
        _log_ranks(store, run_id, train, Cell(**run["cell"]))
    tags = {
        "molf.warning": next(iter(summary.get("warnings", [])), None),
        "molf.energy_source": summary.get("energy_source"),
        "molf.contended": json.dumps(summary.get("contended")),
        "molf.weights_hash": summary["lineage"]["weights"]["hash"] if "lineage" in summary else None,
    }
    store.set_tags(run_id, tags)
    store.log_data(run_id, "data", run["data"])
    store.client.set_terminated(run_id, "FINISHED", started + round(1000 * summary["train_seconds"]))


def sync(store: Store, results: Path) -> tuple[bool, bool]:
    """Brings a cell's run up to its files.

    Args:
        store: Holds the run, or will.
        results: results/CELL.

    Returns:
        Whether the training's part was logged now, and whether the evaluation's was.
    """
    metrics = read_any(results / "evaluation/metrics.json")
    if (results / "train/summary.json").exists():
        run = read_json(results / "train/run.json")
    elif metrics and metrics["cell"]["method"] == BASE_METHOD:
        run = {"cell": metrics["cell"], "fingerprint": metrics["fingerprint"], **_asked(metrics)}
    else:
        return False, False
    known = store.only(kind="cell", fingerprint=run["fingerprint"])
    found = known if known and known.info.status == "FINISHED" else store.open_cell(run)
    run_id = found.info.run_id
    trained = found.info.status != "FINISHED" and "started" in run
    if trained:
        complete(store, run_id, results / "train")
    # An evaluation of another training must not be shown as this one's.
    fits = metrics and (metrics.get("train_fingerprint") == run["fingerprint"] or "started" not in run)
    evaluated = bool(fits and found.data.tags.get("molf.evaluation") != metrics["fingerprint"])
    if evaluated:
        _log_evaluation(store, run_id, results, metrics)
        if "started" not in run:
            store.client.set_terminated(run_id, "FINISHED")
    elif fits and "damage/forgetting" not in found.data.metrics:
        # The untrained model may have been scored after this cell.
        store.log_values(run_id, damage(metrics, _untrained(results)))
    return trained, evaluated


def costs(row: Mapping[str, Any]) -> dict[str, float]:
    """What a training cost and came to, from summary.json or a method's numbers in comparison.json."""
    found = {name: (row.get(key), unit) for key, (name, unit) in SUMMARY_METRICS.items()}
    return {name: value / unit for name, (value, unit) in found.items() if value is not None}


def history_rows(train: Path) -> list[dict[str, Any]]:
    """The rows of history.parquet under MLflow's names, with what the routing record tells of each step.

    Args:
        train: results/CELL/train.

    Returns:
        Mappings with `step`, `seconds` and metrics, whose names hold a "/".
    """
    import pandas as pd

    history = pd.read_parquet(train / "history.parquet").rename(columns=STEP_METRICS)
    history = history[["step", "seconds", *(name for name in STEP_METRICS.values() if name in history)]]
    if (train / "routing.parquet").exists():
        history = history.join(routing_curves(pd.read_parquet(train / "routing.parquet")), on="step")
    return [{str(key): value for key, value in row.items()} for row in history.to_dict("records")]


def routing_curves(record: "pd.DataFrame") -> "pd.DataFrame":
    """How a training was routed, step by step.

    Args:
        record: As routing.parquet holds it: step, module, expert, score, won, counted.

    Returns:
        Index step, of the counted steps. `routing/share/EXPERT`: its share of the module-steps so far;
        `routing/share/EXPERT/TYPE`: the first expert's among the modules of a type; `routing/score_ratio`: its score
        over the best of the others, as the geometric mean over modules. The last two at `ROUTING_POINTS` steps at most.
    """
    import pandas as pd

    from molf.report.routing_figures import place

    record = record.assign(expert=record["expert"].astype(str), module=record["module"].astype(str))
    experts = list(dict.fromkeys(record["expert"]))
    counted = record[record["counted"]]
    if counted.empty:
        return pd.DataFrame(index=pd.Index([], name="step", dtype="int64"))
    curves = {
        f"routing/share/{expert}": _share_so_far(rows["won"].groupby(rows["step"]))
        for expert, rows in counted.groupby("expert", sort=False)
    }
    first = counted[counted["expert"] == experts[0]]
    if len(experts) > 1:
        scores = counted.pivot_table(index=["step", "module"], columns="expert", values="score")
        ratio = scores[experts[0]] / scores[experts[1:]].max(axis=1)
        ratio = ratio[(ratio > 0) & (ratio < math.inf)]  # an expert whose rate is 0 has no score
        curves["routing/score_ratio"] = _thinned(ratio.map(math.log).groupby("step").mean().map(math.exp))
    for kind, rows in first.groupby(first["module"].map(lambda module: place(module)[0])):
        share = _share_so_far(rows["won"].groupby(rows["step"]))
        curves[f"routing/share/{experts[0]}/{kind}"] = _thinned(share)
    return pd.DataFrame(curves)


def _share_so_far(won: Any) -> "pd.Series":
    return won.sum().cumsum() / won.size().cumsum()


def _thinned(curve: "pd.Series") -> "pd.Series":
    return curve.iloc[spread(len(curve), ROUTING_POINTS)]


def spread(count: int, most: int) -> list[int]:
    """Indices of at most so many of a row of things, the first and the last among them, evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def damage(metrics: Mapping[str, Any], untrained: Mapping[str, Any] | None) -> dict[str, float]:
    """What an evaluation says of the damage done.

    Args:
        metrics: metrics.json of the cell.
        untrained: That of the untrained model, if it was scored.
    """
    found: dict[str, float] = {}
    if general := metrics.get("general"):
        found |= {"damage/general_loss": general["loss"], "damage/bits_per_byte": general["bits_per_byte"]}
        before = (untrained or {}).get("general")
        if before and before["hash"] == general["hash"]:  # on the same texts
            found["damage/forgetting"] = general["loss"] - before["loss"]
    if weights := metrics.get("weights"):
        found |= {f"damage/{key}": weights[key] for key in ("relative_change", "effective_rank", "intruders")}
        found["damage/singular_vectors"] = weights["looked_at"]
    return {key: value for key, value in found.items() if value is not None}


def _log_evaluation(store: Store, run_id: str, results: Path, metrics: Mapping[str, Any]) -> None:
    values = {"primary": metrics["primary"], "n": metrics["n"], **finite(metrics["metrics"])}
    store.log_values(run_id, {f"test/{key}": value for key, value in values.items()})
    store.log_values(run_id, {"cost/evaluation_seconds": metrics["seconds"], **damage(metrics, _untrained(results))})
    folder = results / "evaluation"
    store.log_files(run_id, "evaluation", *sorted(folder.glob("*.*")))
    for name, columns in {
        "predictions": ("example_id", "prompt", "gold", "prediction"),
        "weights": ("module", "base_norm", "change_norm", "effective_rank", "intruders", "top"),
    }.items():
        if (folder / f"{name}.parquet").exists():
            store.log_table(run_id, f"tables/{name}.json", *_first_rows(folder / f"{name}.parquet", columns))
    seen = metrics.get("lineage", {})
    tags = {
        "molf.primary": metrics["primary_name"],
        "molf.predictions_sha256": seen.get("predictions", {}).get("sha256"),
        "molf.evaluated_weights_hash": seen.get("weights", {}).get("hash"),
        "molf.evaluation": metrics["fingerprint"],  # the last: from here on it counts as logged
    }
    store.set_tags(run_id, tags)


def _first_rows(path: Path, columns: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Header and first rows of a Parquet file, its scores behind the columns that are asked for."""
    import pandas as pd

    frame = pd.read_parquet(path).head(SHOWN_ROWS)
    header = [name for name in columns if name in frame]
    if path.stem == "predictions":
        header += [str(name) for name in frame.select_dtypes("number") if name not in columns]
    rows = frame[header].astype(object).where(frame[header].notna(), None).to_numpy().tolist()
    return header, [[_shown(value) for value in row] for row in rows]


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value[:SHOWN_CHARACTERS] if isinstance(value, str) else value


def _log_routing(store: Store, run_id: str, train: Path, run: Mapping[str, Any]) -> None:
    from molf.report.controls import control, named
    from molf.report.routing_figures import read_routing, routing_heat_map
    from molf.report.style import save

    store.log_files(run_id, "routing", train / "routing.parquet")
    routing = read_routing(train)
    if routing.empty:  # no step at a rate above 0
        return
    with tempfile.TemporaryDirectory() as folder:
        path, cell = Path(folder) / "heat_map.png", Cell(**run["cell"])
        name = named({"method": cell.method, "control": control(run["config"]["method"])})
        save(routing_heat_map({name: routing}, f"{cell.name}: where the updates went"), path)
        store.log_files(run_id, "routing", path)


def _log_ranks(store: Store, run_id: str, train: Path, cell: Cell) -> None:
    from molf.report.rank_figures import ranks_figure, read_ranks
    from molf.report.style import save

    table = read_ranks([train])
    assert table is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heat_map.png"
        save(ranks_figure(f"{cell.name}: where the ranks went", {cell.method: table}), path)
        store.log_files(run_id, "ranks", path)


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


def _untrained(results: Path) -> Any:
    """metrics.json of the untrained model on a cell's task, None where it was not scored."""
    model, task = results.parts[-4:-2]
    root = results.parents[len(RESULTS.parts) + 3]
    return read_any(root / Cell(model, task, BASE_METHOD, 0).results / "evaluation/metrics.json")


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among an evaluation's metrics, under names that MLflow allows (a subject may hold "&")."""
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {re.sub(r"[^\w\-. /]", "_", key): value for key, value in numbers.items()}
