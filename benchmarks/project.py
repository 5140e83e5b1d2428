"""A copy of the project for what DVC and Prefect do with it, and programs run there to their last process."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from molf.paths import own_tools
from pipelines import checkout
from pipelines.checkout import git
from pipelines.commands import GUARD


@dataclass(frozen=True)
class Sample:
    """What something took."""

    seconds: float  # of a clock on the wall
    cpu_seconds: float  # of all processes that it started, and of their children
    load: float  # processes that wanted a core in the minute before

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def copy(folder: Path, changes: Mapping[str, Any]) -> None:
    """Makes a git repository of this project's files as they are, with one commit.

    Args:
        folder: Made anew.
        changes: Of params.yaml, by dotted keys.
    """
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("docs/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    checkout.edit(folder / "params.yaml", changes)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder, "start")


def commit(folder: Path, message: str) -> None:
    """Commits all files."""
    git(folder, "add", "--all")
    git(
        folder,
        *("-c", "commit.gpgsign=false", "commit", "--quiet", "--allow-empty", "--no-verify", "-m", message),
        environment=checkout.author(folder),
    )


def environment(folder: Path, **more: str) -> dict[str, str]:
    """In which commands of a copy run: with its molf, and neither the user's MLflow nor his Prefect."""
    found = {**own_tools(), "PYTHONPATH": str(folder / "src"), "PREFECT_HOME": str(folder.parent / "prefect")}
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "MOLF_MICRO_BATCHES"):
        found.pop(name, None)
    return {**found, **more}


def run(
    command: Sequence[str],
    cwd: Path,
    variables: Mapping[str, str] | None = None,
    heard: Callable[[str], object] | None = None,
) -> tuple[Sample, str]:
    """Runs a program and waits until all that it started has ended, whose CPU time counts too.

    Args:
        command: Program and arguments.
        cwd: Folder in which it runs.
        variables: Its environment; None: this process' own.
        heard: Gets each line that it prints as it comes, errors included.

    Returns:
        What it took, and its standard output, with `heard` errors as well.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    load = os.getloadavg()[0]
    lines = []
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), *command],
            cwd=cwd,
            env={**(own_tools() if variables is None else variables), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors if heard is None else subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if heard is not None:
                    heard(line.rstrip())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.stdin.close()  # at which the guard ends what still runs
            process.wait()
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            said = "".join(lines)[-2000:] + errors.read().decode("utf-8", "replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)[:200]}: exit {process.returncode}\n{said}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, load), "".join(lines)


def call(function: Callable[[], object]) -> Sample:
    """Calls a function of this process; its CPU time and that of the programs that it ran."""
    load, before, started = os.getloadavg()[0], os.times(), time.perf_counter()
    function()
    seconds, after = time.perf_counter() - started, os.times()
    return Sample(seconds, sum(after[:4]) - sum(before[:4]), load)


def size(*folders: Path) -> int:
    """Bytes of the files below folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
