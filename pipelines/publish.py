"""What a flow run leaves behind: Prefect's artifacts, and one commit."""

import os
import re
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from molf import tracking
from molf.paths import REPORTS, Cell, read_json, write_text
from molf.report.lacking import Lack
from molf.report.page import markdown_table
from pipelines import checkout
from pipelines.checkout import Place, git

TABLE = REPORTS / "comparison.md"
ARTIFACT = "comparison"  # keys in Prefect; each run adds a version
LINKS = ("report", "mlflow")


def table(place: Place) -> dict[str, Any]:
    """Writes the comparison as Markdown, which git keeps; returns the comparison."""
    comparison: dict[str, Any] = read_json(place.root / REPORTS / "comparison.json")
    write_text(place.root / TABLE, markdown_table(comparison))
    return comparison


def artifacts(place: Place, experiment: str) -> dict[str, str]:
    """Shows the table in Prefect, with links to the report and to the comparison's run in MLflow; returns the links."""
    create_markdown_artifact(
        key=ARTIFACT,
        markdown=(place.root / TABLE).read_text(encoding="utf-8"),
        description="Which method to use, and how sure that is",
    )
    links = {"report": (place.root / REPORTS / "report.html").as_uri()}
    server = re.sub(r"(?<=://)[^/@]*@", "", os.environ.get("MLFLOW_TRACKING_URI", ""))  # without name and password
    page = tracking.comparison_address(place.root / REPORTS, experiment, place.home)
    if page:
        links["mlflow"] = (server if server.startswith("http") else "http://127.0.0.1:5000").rstrip("/") + "/" + page
    texts = {
        "report": "The report: figures, examples and how it was made. A file on the machine that compared.",
        "mlflow": "The comparison's run, which links each method's parent run"
        + ("" if server.startswith("http") else " (`make ui` serves it)"),
    }
    for key, link in links.items():
        create_link_artifact(key=key, link=link, link_text=key, description=texts[key])
    return links


def commit(place: Place, message: str) -> str | None:
    """Commits all that the run changed in its worktree; returns the commit, or None if nothing changed."""
    git(place.root, "add", "--all")
    git(place.root, "add", "--force", str(TABLE))
    if not git(place.root, "status", "--porcelain", "--untracked-files=no"):
        return None
    git(
        place.root,
        *("-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "-m", message),
        environment=checkout.author(place.root),
    )
    return git(place.root, "rev-parse", "HEAD")


def message(comparison: Mapping[str, Any] | None, lacking: Mapping[Cell, Lack], key: str) -> str:
    """The commit's message: the verdict, and which cells lack."""
    sentence = comparison["sentence"] if comparison else "Nothing could be compared"
    lines = [f"Comparison {key}", "", sentence]
    if lacking:
        lines += ["", "Lacking:", *(f"- {cell.name}: {lack.reason}" for cell, lack in lacking.items())]
    return "\n".join(lines)


def push(place: Place, remote: str, key: str) -> None:
    """Sends a run's branch and the commit that its results name to the git remote."""
    git(place.root, "push", "--quiet", remote, f"refs/heads/molf/{key}", checkout.start_ref(key))
