"""The comparison as a Prefect flow: the graph is DVC's, Prefect runs its stages and shows what they say.

`python -m pipelines.flow` runs it once; without a Prefect server set up, Prefect starts one for as long as it runs.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

# A first start makes the server's database, which takes longer than Prefect's own limit on a small machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from molf.paths import own_tools, read_json
from molf.report.page import markdown_table

ROOT = Path(__file__).resolve().parents[1]
ARTIFACT = "comparison"  # its key in Prefect


class StageFailed(RuntimeError):
    """A command of the pipeline ended with another exit code than 0."""


def stream(command: list[str], show: Callable[[str], object]) -> str:
    """Runs a command in the project's root and hands on each line that it prints as soon as it is there.

    The command and all that it starts end with this process or its cancellation: nothing trains on unseen.

    Args:
        command: Program and arguments.
        show: Takes one line, errors included.

    Returns:
        All lines.

    Raises:
        StageFailed: The command did not exit with 0.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**own_tools(), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if lines[-1]:
                show(lines[-1])
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise StageFailed(f"`{' '.join(command)}` ended with exit code {code}; last line: {(lines or ['(none)'])[-1]}")
    return "\n".join(lines)


def order(dot: str) -> list[str]:
    """Stage names of DVC's graph, each after all that it needs.

    Args:
        dot: What `dvc dag --dot` prints: a line `"name";` for a stage, `"from" -> "to";` for a dependency.
    """
    graph: TopologicalSorter[str] = TopologicalSorter()
    for names in (re.findall(r'"([^"]+)"', line) for line in dot.splitlines()):
        if names:
            graph.add(names[-1], *names[:-1])
    return list(graph.static_order())


@task(task_run_name="{stage}", cache_policy=NO_CACHE)  # DVC is the cache
def reproduce(stage: str) -> None:
    """Brings one stage up to date."""
    stream(["dvc", "repro", "--single-item", stage], get_run_logger().info)


@flow(name="compare-methods", flow_run_name="compare-methods")
def compare_methods() -> str:
    """Brings the grid of params.yaml up to date, stage by stage, and publishes the comparison as an artifact.

    Returns:
        The comparison's verdict in one sentence.

    Raises:
        StageFailed: params.yaml has mistakes, or a stage failed.
    """
    log = get_run_logger()
    stream(["molf", "check"], log.info)
    for stage in order(stream(["dvc", "dag", "--dot", "compare"], log.debug)):
        reproduce(stage)
    comparison = read_json(ROOT / "reports" / "comparison.json")
    create_markdown_artifact(
        key=ARTIFACT, markdown=markdown_table(comparison), description="Which method to use, and how sure that is"
    )
    sentence: str = comparison["sentence"]
    log.info(sentence)
    return sentence


if __name__ == "__main__":
    try:
        compare_methods()
    except StageFailed as error:
        raise SystemExit(f"failed: {error}") from None
    print("next: open reports/report.html, or make ui")
