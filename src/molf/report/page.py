"""A comparison in words: the page, and its tables for the terminal and for Markdown."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molf.paths import BASE_METHOD, Cell
from molf.report import markdown, quality
from molf.report.markdown import literal

TEMPLATE = "page.html"
SEEN = (  # where a reader goes from the terminal
    "where to look next:",
    "  reports/report.html   table, figures and how it was made, in one page",
    "  make ui               every run side by side in MLflow",
    "  molf lineage CELL     from a score back to its source; a cell is MODEL/TASK/METHOD/seed-S",
)


def render(comparison: Mapping[str, Any], figures: Sequence[Mapping[str, str]], folder: Path, limits: list[str]) -> str:
    """The report as one HTML page that loads nothing; all text from data is escaped.

    Args:
        comparison: As `comparison.build` gives it.
        figures: As `figures.draw` gives them.
        folder: Where the figures' files lie.
        limits: What the comparison is too small to show, in sentences.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("molf.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        seconds=seconds, size=size, count=count, pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    )
    embedded = [
        {**figure, "png": base64.b64encode((folder / figure["file"]).read_bytes()).decode()} for figure in figures
    ]
    groups = [
        {
            **group,
            "table": table(group),
            "warnings": warnings(group),
            "figures": [f for f in embedded if (f["model"], f["task"]) == (group["model"], group["task"])],
        }
        for group in comparison["groups"]
    ]
    data = [
        {**known, "task": task, "origin": quality.origin(known.get("source")), "tables": quality.tables(known)}
        for task, known in comparison["data"].items()
    ]
    cells = [{**cell, "hashes": hashes(cell), "rest": _rest(cell)} for cell in comparison["cells"]]
    return environment.get_template(TEMPLATE).render(c=comparison, groups=groups, limits=limits, data=data, cells=cells)


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


def _rest(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in ("config", "model", "versions", "hardware")}


def table(group: Mapping[str, Any]) -> list[list[str]]:
    """A group's rows as text, the header first: score, differences to fft and lora, costs, routing."""
    against = [m["method"] for m in group["methods"] if m["kind"] in ("fft", "lora")]
    rows = [["method", "score", *(f"vs {name}" for name in against), "time", "memory", "trained", "routed"]]
    if group["base"]:
        rows.append([BASE_METHOD, _score(group["base"]), *[""] * (len(against) + 4)])
    differences = {(d["method"], d["versus"]): d for d in group["differences"]}
    for m in group["methods"]:
        rows.append(
            [
                m["method"],
                _score(m),
                *(_difference(differences.get((m["method"], name))) for name in against),
                seconds(m["train_seconds"]),
                size(m["peak_memory_bytes"]),
                count(m["trained_parameters"]),
                _routed(m),
            ]
        )
    return rows


def warnings(group: Mapping[str, Any]) -> list[str]:
    """What the methods' cells warned of, each text once with the methods that it holds for."""
    by_text: dict[str, list[str]] = {}
    for m in group["methods"]:
        for text in m["warnings"]:
            by_text.setdefault(text, []).append(m["method"])
    return [f"{', '.join(methods)}: {text}" for text, methods in by_text.items()]


def terminal_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as plain text: a block for each model and task, the verdict, and where to look next."""
    lines = []
    for group in comparison["groups"]:
        rows = table(group)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines.append(heading(group))
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"  {verdict['outcome'].upper()}: {verdict['sentence']}" for verdict in group["verdicts"]]
        lines += [f"  WARNING: {text}" for text in warnings(group)]
        lines.append("")
    lines += [comparison["sentence"], _meaning(comparison)]
    why = dict.fromkeys(g["why_not_comparable"] for g in comparison["groups"] if g["why_not_comparable"])
    lines += [f"Times and memory are not comparable: {reason}." for reason in why]
    return "\n".join([*lines, "", *SEEN])


def markdown_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown: the verdict, then a table for each model and task."""
    lines = [f"**{literal(comparison['sentence'])}**", ""]
    for group in comparison["groups"]:
        header, *rows = [list(map(literal, row)) for row in table(group)]
        lines += [
            f"### {literal(heading(group))}",
            "",
            *markdown.table(header, rows),
            "",
        ]
        for verdict in group["verdicts"]:
            lines.append(f"- **{verdict['outcome']}**: {literal(verdict['sentence'])}")
        lines += [f"- **warning**: {literal(text)}" for text in warnings(group)]
        lines.append("")
    return "\n".join([*lines, _meaning(comparison), ""])


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
        for h in comparison["hardware"]
    )
    lines += ["", f"Made on: {literal(machines)}.", ""]
    for group in comparison["groups"]:
        for name in ("score", "routing"):
            file = f"figures/{group['model']}-{group['task']}-{name}.png"
            if name == "score" or any(m["routing_share"] for m in group["methods"]):
                lines += [f"![{group['task']}: {name}]({file})", ""]
    return "\n".join(lines)


def heading(group: Mapping[str, Any]) -> str:
    """What a group's table shows, with its number of examples and of those left out."""
    left_out = ", ".join(f"{number} left out: {reason}" for reason, number in group["left_out"].items())
    return (
        f"{group['model']} / {group['task']}: {group['primary_name']} on {group['examples']} examples"
        + (f" ({left_out})" if left_out else "")
        + (", generated data" if group["generated"] else "")
    )


def seconds(value: float) -> str:
    """A duration: "48 s", "3 min 05 s", "2 h 10 min"."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    """A number of bytes: "820 MB", "2.14 GB"."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def count(value: float) -> str:
    """A number of parameters: "850 k", "1.72 M", "1.54 B"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _difference(row: Mapping[str, Any] | None) -> str:
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if row else "-"


def _routed(method: Mapping[str, Any]) -> str:
    """Share of the updates that went to the first expert; a star says that routing stayed on one side."""
    if not method["routing_share"]:
        return "-"
    expert, share = next(iter(method["routing_share"].items()))
    return f"{100 * share:.0f} % {expert}" + ("  ONE-SIDED" if method["one_sided"] else "")


def _meaning(comparison: Mapping[str, Any]) -> str:
    percent = f"{100 * comparison['confidence']:g} %"
    return (
        f"[low, high]: {percent} interval, {comparison['interval']}; vs: difference to that method; "
        "routed: updates to the first expert."
    )
