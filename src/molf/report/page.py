"""A comparison in words: the page, and its tables for the terminal and for Markdown."""

import base64
import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molf.errors import plain
from molf.paths import Cell
from molf.report import controls, markdown, quality, sheets
from molf.report.examples import as_json
from molf.report.markdown import literal
from molf.report.sheets import Sheet, aligned, seconds

TEMPLATE = "page.html"
WIDTH = 100  # columns of the terminal
SETTINGS = ("grid", "margin", "confidence", "bootstrap", "seed")  # of params.yaml, as the comparison keeps them
SEEN = (  # where a reader goes from the terminal
    "where to look next:",
    "  reports/report.html   verdict, figures, examples and how it was made, in one page",
    "  make ui               every run side by side in MLflow",
    "  molf lineage CELL     from a score back to its source; a cell is MODEL/TASK/METHOD/seed-S",
)


# --- the page --------------------------------------------------------------------------------------------------------


def render(
    comparison: Mapping[str, Any],
    figures: Sequence[Mapping[str, str]],
    folder: Path,
    limits: list[str],
    examples: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The report as one HTML page that loads nothing; all text from data is escaped.

    Args:
        comparison: As `comparison.build` gives it.
        figures: As `figures.draw` gives them.
        folder: Where the figures' files lie.
        limits: What the comparison is too small to show, in sentences.
        examples: As `examples.collect` gives them; none, and the page has no browser of examples.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("molf.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    # The figures' files are ours, their texts escaped when they were written.
    drawn = [
        {**figure, "svg": Markup((folder / figure["file"]).with_suffix(".svg").read_text(encoding="utf-8"))}
        for figure in figures
    ]
    known = {(of["model"], of["task"]): {**of, "json": Markup(as_json(of))} for of in examples}
    groups = [
        _section(group, [f for f in drawn if _place(f) == _place(group)], known.get(_place(group)))
        for group in comparison["groups"]
    ]
    data = [
        {**of_task, "task": task, "origin": quality.origin(of_task.get("source")), "tables": quality.tables(of_task)}
        for task, of_task in comparison["data"].items()
    ]
    cells = [
        {
            **cell,
            "place": vars(Cell.parse(cell["cell"])),
            "command": f"dvc repro evaluate@{'-'.join(map(str, vars(Cell.parse(cell['cell'])).values()))}",
            "hashes": hashes(cell),
            "rest": {key: cell[key] for key in ("config", "model", "versions", "hardware")},
        }
        for cell in comparison["cells"]
    ]
    lead, dot, rest = comparison["sentence"].partition(". ")
    style, script = (Path(__file__).with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    return environment.get_template(TEMPLATE).render(
        c=comparison,
        lead=f"{lead}{dot}".rstrip(),
        rest=rest,
        unlike=list(dict.fromkeys(g["why_not_comparable"] for g in comparison["groups"] if g["why_not_comparable"]))[
            :1
        ],
        lacking=lacking(comparison),
        glance=sheets.glance(comparison),
        overview=[f for f in drawn if _place(f) == ("", "")],
        groups=groups,
        limits=limits,
        data=data,
        cells=cells,
        commands=commands(comparison),
        settings={key: comparison[key] for key in SETTINGS},
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _place(of: Mapping[str, Any]) -> tuple[str, str]:
    return of["model"], of["task"]


def _section(
    group: Mapping[str, Any], figures: Sequence[Mapping[str, Any]], examples: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the page shows of one model and task."""
    names = {figure["name"] for figure in figures}
    return {
        **group,
        "scores": sheets.scores(group),
        "costs": sheets.costs(group),
        "rates": sheets.rates(group),
        "damage": sheets.damage(group),
        "more": sheets.more(group),
        "warnings": warnings(group),
        "controls": controls.said(group),
        "figures": figures,
        "routed": "routing" in names,
        "ranked": "ranks" in names,
        "moved": "moved" in names,
        "examples_of": examples,
    }


def commands(comparison: Mapping[str, Any]) -> list[str]:
    """What to type to make the comparison again, with the hashes that tell whether it is the same."""
    commits = list(dict.fromkeys(cell["git_commit"] or "unknown" for cell in comparison["cells"]))
    models = dict.fromkeys((cell["model"]["name"], cell["model"]["hash"]) for cell in comparison["cells"])
    lines = [f"git checkout {commit}" for commit in commits[:1]]
    lines += [f"# some cells were trained at {commit}" for commit in commits[1:]]
    lines += [f"# data {task}: {data['hash']}" for task, data in comparison["data"].items()]
    lines += [f"# model {name}: {known}" for name, known in models]
    return [
        *lines,
        "make                # the environment",
        "dvc pull            # data, models and results that were pushed; or nothing, and the next line makes them",
        "dvc repro compare   # what lacks, and this page",
        "molf show           # its tables in the terminal",
    ]


def hashes(cell: Mapping[str, Any]) -> dict[str, str]:
    """What a cell was made of and with, each by its hash; a dash for what an earlier molf did not note."""
    found = {
        "training": cell["fingerprint"],
        "weights": cell["weights"],
        "data": cell["data"],
        "base model": f"{cell['model']['hash']} ({cell['model']['name']})",
        "training code": cell["code"],
        "evaluation": cell["evaluation"],
        "evaluation code": cell["evaluation_code"],
        "predictions (sha256)": cell["predictions"],
        "git commit": cell["git_commit"],
    }
    return {name: value or "-" for name, value in found.items()}


def warnings(group: Mapping[str, Any]) -> list[str]:
    """What the methods' cells warned of, each text once with the methods that it holds for."""
    by_text: dict[str, list[str]] = {}
    for m in group["methods"]:
        for text in m["warnings"]:
            by_text.setdefault(text, []).append(m["method"])
    return [f"{', '.join(methods)}: {text}" for text, methods in by_text.items()]


# --- the terminal and Markdown ---------------------------------------------------------------------------------------


def tables(group: Mapping[str, Any]) -> list[Sheet]:
    """A group's tables for a reader in a hurry: scores, costs, and forgetting and sweeps where there are any."""
    found = [sheets.scores(group, over_base=False), sheets.costs(group), sheets.damage(group), sheets.rates(group)]
    return [sheet for sheet in found if sheet]


def lacking(comparison: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Why cells lack, and the names of those that lack for it; nothing where none does."""
    found: dict[str, list[str]] = {}
    for of in comparison.get("lacking_cells", []):
        found.setdefault(f"{of['kind']}: {of['reason']}", []).append(of["cell"])
    return list(found.items())


def terminal_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as plain text: what lacks, a block for each model and task, the verdict, where to look next."""
    lines = []
    for why, cells in lacking(comparison):
        lines += _wrapped(f"LACKING: {', '.join(cells)} ({plain(why)})")
    lines += [""] * bool(lines)
    for group in comparison["groups"]:
        lines += _wrapped(heading(group))
        for sheet in tables(group):
            lines += [f"  {line}" for line in aligned(sheet.texts(), WIDTH - 2)] + [""]
        lines += _wrapped(f"USE: {_advice(group)}", "  ")
        for verdict in group["verdicts"]:
            lines += _wrapped(f"{verdict['outcome'].upper()}: {_with_needs(verdict)}", "  ")
        for text in controls.said(group):
            lines += _wrapped(f"BESIDE: {text}", "  ")
        for text in warnings(group):
            lines += _wrapped(f"WARNING: {text}", "  ")
        if group["why_not_comparable"]:
            lines += _wrapped(f"NOT COMPARABLE: times and memory; {group['why_not_comparable']}", "  ")
        lines.append("")
    lines += [*_wrapped(comparison["sentence"]), *_wrapped(_meaning(comparison))]
    return "\n".join([*lines, "", *SEEN])


def markdown_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown: the verdict, what lacks, then the tables of each model and task."""
    lines = [f"**{literal(comparison['sentence'])}**", ""]
    lines += [f"- **lacking**: {literal(', '.join(cells))} ({literal(why)})" for why, cells in lacking(comparison)]
    lines += [""] * (len(lines) > 2)
    for group in comparison["groups"]:
        lines += [f"### {literal(heading(group))}", "", f"**{literal(_advice(group))}.**", ""]
        for sheet in tables(group):
            header, *rows = [list(map(literal, row)) for row in sheet.texts()]
            lines += [*markdown.table(header, rows), ""]
        for verdict in group["verdicts"]:
            lines.append(f"- **{verdict['outcome']}**: {literal(_with_needs(verdict))}")
        lines += [f"- **beside**: {literal(text)}" for text in controls.said(group)]
        lines += [f"- **warning**: {literal(text)}" for text in warnings(group)]
        if group["why_not_comparable"]:
            lines.append(f"- **not comparable**: times and memory; {literal(group['why_not_comparable'])}")
        lines.append("")
    return "\n".join([*lines, literal(_meaning(comparison)), ""])


def published_readme(comparison: Mapping[str, Any]) -> str:
    """What is committed beside a published comparison: the tables, the time of each cell, figures and limits."""
    from molf.report.verdicts import limits

    lines = [
        markdown_table(comparison),
        "## Too small to show",
        "",
        *(f"- {literal(t)}" for t in limits(comparison)),
        "",
    ]
    lines += ["## Time of each cell", "", *markdown.table(["cell", "training", "evaluation", "steps"], [])]
    total = 0.0
    for group in comparison["groups"]:
        for m in group["methods"]:
            for seed in m["per_seed"]:
                name = Cell(group["model"], group["task"], m["method"], seed["seed"]).name
                times = [seed["train_seconds"], seed["evaluation_seconds"]]
                total += sum(times)
                lines.append(markdown.row([name, *map(seconds, times), str(m["steps"])]))
    lines += ["", f"All cells together: {seconds(total)}."]
    machines = "; ".join(
        f"{h['name']}, threads: {h['threads']}"
        + (f" in each of {h['processes']} processes" if h.get("processes", 1) > 1 else "")
        + (f" on {h['hosts']} such hosts" if h.get("hosts", 1) > 1 else "")
        for h in comparison["hardware"]
    )
    lines += ["", f"Made on: {literal(machines)}.", ""]
    for group in comparison["groups"]:
        kept = {
            "score": True,
            "cost": bool(group["pareto"]),
            "routing": any(m["routing_share"] for m in group["methods"]),
            "ranks": any(m.get("ranks") for m in group["methods"]),
            "forgetting": any(m["general"] for m in group["methods"]),
            "rates": bool(group.get("sweeps")),
        }
        for name in (name for name, there in kept.items() if there):
            lines += [f"![{group['task']}: {name}](figures/{group['model']}-{group['task']}-{name}.png)", ""]
    return "\n".join(lines)


def heading(group: Mapping[str, Any]) -> str:
    """What a group's table shows, with its number of examples and of those left out."""
    left_out = ", ".join(f"{number} left out: {reason}" for reason, number in group["left_out"].items())
    return (
        f"{group['model']} / {group['task']}: {group['primary_name']} on {group['examples']} examples"
        + (f" ({left_out})" if left_out else "")
        + (", generated data" if group["generated"] else "")
    )


def _advice(group: Mapping[str, Any]) -> str:
    return _with_needs(group["recommendation"])


def _with_needs(found: Mapping[str, Any]) -> str:
    """A verdict's or a recommendation's sentence, and what would decide it if it is open."""
    return found["sentence"] + (f"; to decide it: {found['needs']}" if found["needs"] else "")


def _wrapped(text: str, indent: str = "") -> list[str]:
    """A sentence on lines of the terminal's width, words whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  " if indent else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _meaning(comparison: Mapping[str, Any]) -> str:
    percent = f"{100 * comparison['confidence']:g} %"
    return (
        f"[low, high]: {percent} interval, {comparison['interval']}; vs: difference to that method; time: training of "
        "one seed; routed: updates to the first expert; forgotten: change of the loss on general text."
    )
