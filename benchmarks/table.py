"""What was measured, as the table that is printed and the file that is kept."""

import re
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from benchmarks.measure import Result, Row, Settings, Unit
from molf import machine

HEADER = ("what", "against", "ratio, median (min to max)", "must reach", "met", "medians")


def environment(settings: Settings) -> dict[str, Any]:
    """Hardware, threads, versions, commit and date."""
    found = machine.hardware(settings.threads)
    return {
        "hardware": found["name"],
        "device": settings.device.type,
        "threads": settings.threads,
        "versions": machine.versions(),
        "git_commit": machine.git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": settings.rounds,
        "quick": settings.quick,
    }


def heading(facts: Mapping[str, Any]) -> str:
    """The environment for a reader."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['hardware']}; {facts['threads']} threads; {facts['device']}; {facts['rounds']} rounds",
        f"{versions}; commit {facts['git_commit'] or 'unknown'}; {facts['date']}",
    ]
    return "\n".join(lines + ["tiny sizes (--quick): these numbers say nothing about speed"] * facts["quick"])


def markdown(rows: list[Row]) -> str:
    """The table, one line a row, columns aligned."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def document(facts: Mapping[str, Any], results: Mapping[str, Result], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Everything measured, as plain data."""
    cases = {
        name: {"rows": [row.as_json() for row in result.rows], "notes": result.notes, "data": result.data}
        for name, result in results.items()
    }
    return {"environment": dict(facts), "cases": cases, "skipped": dict(skipped)}


def slug(facts: Mapping[str, Any]) -> str:
    """A file's name from the hardware's; quick runs have their own, so that they never replace a measurement."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{facts['hardware']}-{facts['threads']}-threads".lower()).strip("-")
    return f"quick-{name}" if facts["quick"] else name


def _cells(row: Row) -> tuple[str, ...]:
    ratios = row.ratios
    reach = "reported" if row.limit is None else f"at {'least' if row.at_least else 'most'} {row.limit:.2f}"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    medians = [_amount(statistics.median(samples), row.unit) for samples in (row.samples, row.reference)]
    spread = f"{row.ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return row.what, row.against, spread, reach, met, " : ".join(medians)


def _amount(value: float, unit: Unit) -> str:
    match unit:
        case "s":
            return f"{value:.3f} s" if value >= 0.1 else f"{value * 1000:.2f} ms"
        case "B":
            return f"{value / 1e6:,.1f} MB"
        case _:
            return f"{value:,.1f} tokens/s"
