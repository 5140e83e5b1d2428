"""A comparison in MLflow: its own run, the methods' runs that make its table, and views of both. All here may raise.

What the views hold is what MLflow's page itself keeps when a user saves one (3.17, checked in a browser by
tests/test_mlflow_page.py).
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molf import mlflow_cells
from molf.mlflow_store import MAX_TAG_LENGTH, NOTE, Store, milliseconds, slug
from molf.paths import BASE_METHOD, Cell, read_json
from molf.report.verdicts import references

PAGE = "#/experiments/{experiment}/runs?workflowType=machine_learning"  # as MLflow's page calls trainings
VIEW = "mlflow.sharedViewState."  # tag of the experiment that holds a saved view
COLOUR = "mlflow.runColor"
POINTS = 250  # at most, of a method's curve: the mean over its seeds
MOVED = ("relative_change", "effective_rank", "intruders")
COLUMNS = (  # of the view of a task's scores, by what stands in them
    *("metrics.`test/primary`", "metrics.`test/primary_low`", "metrics.`test/primary_high`"),
    *("metrics.`cost/train_seconds`", "metrics.`cost/peak_memory_gb`", "metrics.`damage/forgetting`"),
    *("tags.`molf.verdict`", "tags.`molf.recommended`"),
)
WIDTH = 140  # of a column, in CSS pixels
VIEWS = {  # of each model and task: what it is called, and the charts that it shows
    "scores": ("scores and costs", None),
    "training": ("training by step", "train/(loss|learning_rate|grad_norm|tokens)"),
    "routing": ("routing by step", "routing/.*"),
}
GUIDE = """\
How to read this experiment: a run named MODEL/TASK/METHOD is a method; its metrics are means over its seeds, its curves
too, and the seeds lie below it (the plus sign). `base` is the model before any fine-tuning. Metrics: `test/` scores on
test examples (`test/primary` is what methods are judged by, with its interval), `cost/`, `damage/` what was forgotten,
`train/` and `routing/` by step (`routing/share/full`: the share of updates that went to the full weight). A run named
comparison holds the report, its figures and its tables."""


def sync(store: Store, reports: Path, root: Path) -> bool:
    """Logs reports/ as a run of its own unless this very comparison has one; returns whether it was logged now.

    The runs of its methods are filled too: they show the last comparison that was logged.
    """
    from molf.config import fingerprint

    comparison = read_json(reports / "comparison.json")
    key = fingerprint(comparison)
    found = store.only(kind="comparison", fingerprint=key)
    if found is not None and found.info.status == "FINISHED":
        return False
    if found is None:
        tags = {"molf.kind": "comparison", "molf.fingerprint": key}
        found = store.client.create_run(store.experiment_id, tags=tags, run_name="comparison")
    run_id = found.info.run_id
    links: dict[str, str] = {}
    cells: dict[str, str] = {}
    for group in comparison["groups"]:
        parents, children = _sync_group(store, group, comparison, root)
        links |= parents
        cells |= children
    for task, data in comparison["data"].items():
        store.log_data(run_id, f"data/{task}", data)
    scores = {
        f"comparison/{group['model']}/{group['task']}/{row['method']}": row["mean"]
        for group in comparison["groups"]
        for row in group["methods"]
    }
    store.log_values(run_id, scores)
    store.log_params(run_id, {"margin": comparison["margin"], "confidence": comparison["confidence"]})
    files = ("comparison.json", "comparison.csv", "report.html")
    store.log_files(run_id, None, *(reports / name for name in files))
    store.log_files(run_id, "figures", *sorted((reports / "figures").glob("*.*")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.json"
        path.write_text(json.dumps({**links, **cells}, indent=2), encoding="utf-8")
        store.log_files(run_id, None, path)
    for name, (header, rows) in tables(comparison).items():
        store.log_table(run_id, f"tables/{name}.json", header, rows)
    store.set_tags(run_id, {NOTE: note(comparison, links, store.experiment_id)})
    store.describe(describe(comparison, run_id, store.experiment_id))
    store.client.set_terminated(run_id, "FINISHED")
    return True


def _sync_group(
    store: Store, group: Mapping[str, Any], comparison: Mapping[str, Any], root: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Brings the runs of one model and task up to a comparison; returns the ids of its methods' and its cells' runs."""
    from molf.report.style import GREY, styles

    looks = styles([(m["method"], m["kind"]) for m in group["methods"]])
    palette = {BASE_METHOD: GREY, **{method: look.colour for method, look in looks.items()}}
    base = {**group["base"], "method": BASE_METHOD}
    base["per_seed"] = [{"seed": 0, "train_fingerprint": base["fingerprint"], "score": base["mean"]}]
    parents: dict[str, str] = {}
    every: dict[str, str] = {}
    for row in (base, *group["methods"]):
        cells = [Cell(group["model"], group["task"], row["method"], seed["seed"]) for seed in row["per_seed"]]
        children = {}
        for cell, seed in zip(cells, row["per_seed"], strict=True):
            mlflow_cells.sync(store, root / cell.results)
            if child := store.find(kind="cell", fingerprint=seed["train_fingerprint"]):
                children[cell] = child.info.run_id
                store.set_tags(child.info.run_id, {COLOUR: palette[row["method"]]})
        parent = _fill(store, group, row, comparison, children, root)
        store.set_tags(parent, {COLOUR: palette[row["method"]]})
        place = cells[0].name.rpartition("/")[0]
        parents[place] = parent
        every |= {cell.name: run for cell, run in children.items()}
    return parents, every


def _fill(
    store: Store,
    group: Mapping[str, Any],
    row: Mapping[str, Any],
    comparison: Mapping[str, Any],
    children: Mapping[Cell, str],
    root: Path,
) -> str:
    """Fills the run of a method with means over its seeds; returns its id."""
    from molf.config import fingerprint

    trained = [seed["train_fingerprint"] for seed in row["per_seed"]]
    cell, key = Cell(group["model"], group["task"], row["method"], 0), fingerprint(trained)
    parent = store.parent(cell)
    if parent.data.tags.get("molf.seeds", key) != key:
        parent = store.new_parent(cell, parent.info.run_id)
    run_id = str(parent.info.run_id)
    for child in children.values():
        store.set_tags(child, {"mlflow.parentRunId": run_id})
    store.log_values(run_id, values(group, row))
    if "molf.seeds" not in parent.data.tags and row["method"] != BASE_METHOD:
        trains = [root / cell.results / "train" for cell in children]
        known = {name: store.logged_steps(run_id, name) for name in parent.data.metrics}  # a kill left some
        store.log_steps(run_id, milliseconds(read_json(trains[0] / "run.json")["started"]), mean_rows(trains, known))
    outcome = {v["method"]: v["outcome"] for v in group["verdicts"]}.get(row["method"], "none")
    tags = {
        NOTE: method_note(group, row, comparison, children, store.experiment_id),
        "molf.verdict": outcome,
        "molf.control": f"{row['control']['kind']}: {row['control']['words']}" if row.get("control") else None,
        "molf.recommended": json.dumps(row["method"] == group["recommendation"]["method"]),
        "molf.primary": group["primary_name"],
        "molf.generated_data": json.dumps(group["generated"]),
        "molf.seeds": key,  # the last: from here on its curves count as logged
    }
    store.set_tags(run_id, tags)
    lasted = round(1000 * row.get("train_seconds", 0))  # as one seed's
    store.client.set_terminated(run_id, "FINISHED", parent.info.start_time + lasted)
    return run_id


def values(group: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """A method's numbers in a comparison under the names that its seeds' runs use, with intervals and differences.

    To five digits: all of them are in comparison.json.

    Args:
        group: Of comparison.json.
        row: One of its methods, or its base.
    """
    found = {"test/primary": row["mean"], "test/primary_low": row["low"], "test/primary_high": row["high"]}
    found |= {f"test/{name}": value for name, value in mlflow_cells.finite(row["metrics"]).items()}
    found |= {"test/n": group["examples"], "test/seeds": len(row["per_seed"])}
    found |= mlflow_cells.costs(row)
    if "evaluation_seconds" in row:
        found["cost/evaluation_seconds"] = row["evaluation_seconds"]
    if general := row.get("general"):
        found["damage/general_loss"] = general["loss"]
        if "mean" in general:
            found |= {"damage/forgetting": general["mean"]}
            found |= {f"damage/forgetting_{end}": general[end] for end in ("low", "high")}
    found |= {f"damage/{key}": row["weights"][key] for key in MOVED if row.get("weights")}
    for d in group["differences"]:
        if d["method"] == row["method"]:
            found[f"difference/{d['versus']}"] = d["mean"]
            found |= {f"difference/{d['versus']}_{end}": d[end] for end in ("low", "high")}
    return {key: float(f"{value:.5g}") for key, value in found.items()}  # a table's cell is narrow


def mean_rows(trains: Sequence[Path], known: Mapping[str, set[int]]) -> list[dict[str, Any]]:
    """A method's curves: the mean over its seeds at each of at most `POINTS` steps.

    Args:
        trains: results/CELL/train of each seed.
        known: By metric, the steps that are logged already and left out.
    """
    import pandas as pd

    frames = [pd.DataFrame(mlflow_cells.history_rows(train)) for train in trains]
    mean = pd.concat(frames).groupby("step").mean()
    curves = {name: curve.dropna() for name, curve in mean.items() if name != "seconds"}
    thinned = {name: curve.iloc[mlflow_cells.spread(len(curve), POINTS)] for name, curve in curves.items()}
    chosen = pd.DataFrame(thinned).join(mean["seconds"]).reset_index()
    return [
        {str(key): value for key, value in row.items() if row["step"] not in known.get(str(key), ())}
        for row in chosen.to_dict("records")
    ]


def tables(comparison: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The report's tables for MLflow's page, by path: header and rows."""
    from molf.report import page, sheets

    found = {"at_a_glance": sheets.glance(comparison)}
    for group in comparison["groups"]:
        for sheet in [*page.tables(group), *sheets.more(group)]:
            found[f"{group['model']}/{group['task']}/{slug(sheet.title)}"] = sheet
    return {path: (sheet.header, sheet.texts()[1:]) for path, sheet in found.items()}


def note(comparison: Mapping[str, Any], links: Mapping[str, str], experiment: str) -> str:
    """A comparison's description: the verdict, where to look, and as much of the tables as MLflow takes.

    Args:
        comparison: comparison.json.
        links: {MODEL/TASK/METHOD: its run's id}.
        experiment: MLflow's id of it.
    """
    from molf.report import page
    from molf.report.markdown import literal

    verdict, _, rest = page.markdown_table(comparison).partition("\n")
    lines = [verdict, ""]
    for group in comparison["groups"]:
        place = f"{group['model']}/{group['task']}"
        runs = [f"[{literal(m)}](#/experiments/{experiment}/runs/{i})" for m, i in _of(links, place).items()]
        lines += [f"- {literal(place)}: {literal(group['recommendation']['sentence'])}"]
        lines += [f"  Its runs: {', '.join(runs)}; {_view_links(group, experiment)}"]
    lines += ["", "The whole report, figures and tables: under Artifacts.", "", rest.strip()]
    return _cut("\n".join(lines), "\n\nThe rest is in report.html, under Artifacts.")


def _of(links: Mapping[str, str], place: str) -> dict[str, str]:
    return {name.rpartition("/")[2]: run for name, run in links.items() if name.rpartition("/")[0] == place}


def method_note(
    group: Mapping[str, Any],
    row: Mapping[str, Any],
    comparison: Mapping[str, Any],
    children: Mapping[Cell, str],
    experiment: str,
) -> str:
    """A method's description: its row of the table, its verdict, its seeds."""
    from molf.report import controls, page
    from molf.report.markdown import literal, table

    name = row["method"]
    own = [
        (key, value)
        for header, *rows in (sheet.texts() for sheet in page.tables(group))
        for cells in rows
        if cells[0] == name
        for key, value in zip(header[1:], cells[1:], strict=True)
        if value
    ]
    lines = [f"**{literal(name)}** on {literal(page.heading(group))}; interval: {literal(comparison['interval'])}.", ""]
    said = controls.said({"methods": [row]})
    said += [f"{v['outcome']}: {v['sentence']}" for v in group["verdicts"] if v["method"] == name]
    if group["recommendation"]["method"] == name:
        said.append(f"recommended: {group['recommendation']['sentence']}")
    lines += [f"- {literal(text)}" for text in said]
    lines += ["", *table(["", literal(name)], [[literal(key), literal(value)] for key, value in own]), ""]
    scores = {seed["seed"]: seed["score"] for seed in row["per_seed"]}
    seeds = [
        f"[seed {cell.seed}](#/experiments/{experiment}/runs/{run}) {scores[cell.seed]:.3f}"
        for cell, run in children.items()
    ]
    lines += [f"Seeds: {', '.join(seeds)}. All methods: {_view_links(group, experiment)}"]
    return _cut("\n".join(lines), "")


def describe(comparison: Mapping[str, Any], run_id: str, experiment: str) -> dict[str, str]:
    """Tags of the experiment: its description, and the saved views of each model and task.

    Args:
        comparison: comparison.json.
        run_id: Of the comparison's run.
        experiment: MLflow's id of it.
    """
    from molf.report.markdown import literal

    lines = [
        f"**{literal(comparison['sentence'])}**",
        "",
        f"[The comparison](#/experiments/{experiment}/runs/{run_id})",
    ]
    found = {}
    for group in comparison["groups"]:
        place = f"{group['model']}/{group['task']}"
        lines.append(f"- {literal(place)}: {_view_links(group, experiment)}")
        for kind, (said, _) in VIEWS.items():
            # A view has no time of its own: the same comparison gives the same tags.
            view = {
                "name": f"{place}: {said}",
                "createdAt": 0,
                "updatedAt": 0,
                "state": json.dumps(_state(group, kind)),
            }
            found[VIEW + _view(group, kind)] = json.dumps(view)
    return {NOTE: "\n".join([*lines, "", GUIDE]), **found}


def _state(group: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What MLflow's page keeps of a view, where it differs from a fresh one's."""
    where = {"kind": "method", "model": group["model"], "task": group["task"]}
    asked = [f"tags.`molf.{key}` = '{value}'" for key, value in where.items()]
    state = {"orderByKey": COLUMNS[0], "orderByAsc": False, "runsHiddenMode": "SHOW_ALL"}
    charts = VIEWS[kind][1]
    if charts is None:
        columns = [*COLUMNS, *(f"metrics.`difference/{name}`" for name in references(group))]
        state |= {"selectedColumns": columns, "columnOrder": columns, "columnWidths": dict.fromkeys(columns, WIDTH)}
    else:
        asked.append(f"tags.`molf.method` != '{BASE_METHOD}'")  # which has no steps
        state |= {"chartsSearchFilter": charts}
    return {"searchFilter": " AND ".join(asked), **state}


def _view(group: Mapping[str, Any], kind: str) -> str:
    return re.sub(r"[^\w.-]", "-", f"molf-{group['model']}-{group['task']}-{kind}")


def _view_links(group: Mapping[str, Any], experiment: str) -> str:
    return ", ".join(
        f"[{said}]({PAGE.format(experiment=experiment)}&viewStateShareKey={_view(group, kind)}"
        + ("&compareRunsMode=CHART)" if charts else ")")
        for kind, (said, charts) in VIEWS.items()
    )


def _cut(text: str, end: str) -> str:
    """A text that is at most as long as MLflow takes, ended after a whole line."""
    if len(text) <= MAX_TAG_LENGTH:
        return text
    return text[: MAX_TAG_LENGTH - len(end)].rpartition("\n")[0] + end
