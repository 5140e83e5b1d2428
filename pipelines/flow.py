"""The comparison as a Prefect flow: the graph is DVC's, Prefect runs its cells side by side and shows what they say.

`python -m pipelines.flow` runs it once; without a Prefect server set up, it starts one for as long as it runs.
The checkout stays as it is: the flow works in git worktrees below .molf/flow and ends with one commit on a branch.
"""

import argparse
import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

# A first start makes the server's database, which takes longer than Prefect's own limit on a small machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
# While the server is away, a request waits 2, 4, 8 ... seconds: a run outlasts eight minutes, with Prefect's 5 one.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "8")

import httpx
from prefect import flow, get_run_logger
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from molf.config import PARAMS, SOURCES_LOCK, Params, load_params, read_yaml
from molf.errors import UserError
from molf.paths import RESULTS, SWEEPS
from molf.report import lacking as lacking_cells
from molf.report.lacking import Kind, Lack
from pipelines import blocks, checkout, graph, locks, pool, publish, runs, versions
from pipelines.checkout import FLOW, Place, git
from pipelines.commands import CommandFailed, ended_together, stream
from pipelines.form import HOME, NONE, NOTHING, Methods, Models, Others, Preset, Seeds, Tasks
from pipelines.graph import Graph, Job
from pipelines.server import HOST, NoServer, server
from pipelines.tasks import NotSetUp, Slots, bring, cell, find, offer, reproduce, why

NEXT = "the next run goes on from the checkpoints"
RUNNER: Any = ThreadPoolTaskRunner(max_workers=1024)  # how many run at once, the slots say


class CellsLack(RuntimeError):
    """Cells failed; what the others say was compared and published."""


@flow(name="compare-methods", flow_run_name="compare-methods", task_runner=RUNNER)
def compare_methods(
    preset: Preset | None = None,
    models: Models = NONE,
    tasks: Tasks = NONE,
    methods: Methods = NONE,
    seeds: Seeds = NONE,
    params: Others = NOTHING,
    pin: bool = False,
    push: bool = False,
    promote: bool = False,
    in_place: bool = False,
) -> Any:
    """Brings a grid up to date, its cells side by side, compares, and publishes the comparison.

    What is left empty is as params.yaml says.

    Args:
        preset: Of `molf preset`, applied to params.yaml first.
        models: The grid's models.
        tasks: The grid's tasks.
        methods: The grid's methods.
        seeds: The grid's seeds.
        params: Any other keys of params.yaml with dots, and their values: {"training.epochs": 2}.
        pin: First pins hub revisions and URLs anew in sources.lock, as `molf pin` does.
        push: Also sends results to DVC's default remote and the branch to git's `origin`.
        promote: Also lets the best cell that passes params.yaml's gate become the champion.
        in_place: Works in the checkout itself, without a branch and a commit.

    Returns:
        The comparison's verdict in one sentence; Prefect's state Cancelled if the run was cancelled.

    Raises:
        CommandFailed: params.yaml has mistakes, or a command that all cells need failed.
        CellsLack: Cells failed; the comparison of the others is published.
        NotSetUp: There is no remote to push to, no such work pool, or fewer GPUs than a cell takes.
    """
    log = get_run_logger()
    os.environ.update(blocks.from_blocks())  # for all commands; and `concealed` knows them
    home = checkout.home(HOME)
    if push:
        _check_remotes(home, "push was asked for")
    key = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    runs.begin(home)
    mine = home / FLOW / "locks" / (runs.IN_PLACE if in_place else f"run-{key}")
    root = home if in_place else home / FLOW / "runs" / key
    try:
        with (
            runs.cancellable(),
            ended_together(),
            locks.lock(mine, lambda: log.info("another run works in this checkout; waits for it")),
            runs.noted(mine, root),
        ):
            changes = _changes(models, tasks, methods, seeds, params)
            # Before the run takes the files: of one that changes in between, at worst the watch starts a run too many.
            seen = None if preset or changes else _seen(home)
            place = Place(home, home) if in_place else _worktree(home, key)
            log.info(f"run {key} in {place.root}")
            sentence = _compare(place, key, changes, preset, pin, push, promote, seen)
    except runs.Cancel:
        return runs.cancelled()
    return sentence


def _compare(
    place: Place,
    key: str,
    changes: Mapping[str, Any],
    preset: str | None,
    pin: bool,
    push: bool,
    promote: bool,
    made_from: Mapping[str, Any] | None,
) -> str:
    """All steps of a run, in their order; it notes for the data watch what it was `made_from`."""
    log = get_run_logger()
    logs = place.flow / "logs" / key

    def run(*command: str, quiet: bool = False) -> str:
        show = log.debug if quiet else log.info
        return stream(command, place.root, show, place.environment(), logs / "flow.log")

    if preset is not None:
        run("molf", "preset", preset)
    if changes:
        try:
            checkout.edit(place.root / PARAMS, changes)
        except KeyError as error:
            raise NotSetUp(f"params: {error.args[0]} lies in a block that params.yaml does not have") from None
    if pin:
        run("molf", "pin")
    if place.root != place.home:
        checkout.link_outside(place, read_yaml(place.root / PARAMS))
    run("molf", "check")  # after the links, since it looks for the files
    settings = load_params(place.root / PARAMS)
    if settings.flow.pool is not None:
        _check_remotes(place.home, f"flow.pool is {settings.flow.pool}")
        pool.check(settings.flow.pool)
    stages = graph.read(place.root, run("dvc", "dag", "--dot", "compare", quiet=True))
    slots = Slots.here(place.flow / "slots", settings.flow.cpu_slots)
    failed = _before(place, stages, logs, slots, settings.flow.retries)

    def bring_up(jobs: Sequence[Job], what: str, below: Path, lost: Mapping[Job, Lack]) -> dict[Job, Lack]:
        """Runs jobs and brings their results here; those that earlier ones lack, or stages before, lack too."""
        done, failures = _jobs(place, key, jobs, what, stages, settings, slots, logs, failed, lost)
        if done and settings.flow.pool is not None:  # dvc.lock has them; weights stay in the remote
            bring(place, done, below)
            run(sys.executable, "-m", "pipelines.restore", "--allow-missing", *done)
        elif done:  # brings them from the run cache, and their hashes into dvc.lock
            run(sys.executable, "-m", "pipelines.restore", *done)
        for job in failures:  # what an earlier configuration left of it
            shutil.rmtree(place.root / job.results, ignore_errors=True)
        return failures

    lost: dict[Job, Lack] = {}
    if stages.trials:
        lost = bring_up(stages.trials, "trainings of sweeps", SWEEPS, {})
        for stage in stages.choose:  # also where trials lack: other methods' are there
            failed |= _bring_before(place, stage, logs, slots, settings.flow.retries)
    lacking = {job.cell: lack for job, lack in bring_up(stages.jobs, "cells", RESULTS, lost).items()}
    lacking_cells.write(lacking, place.root)
    for stage in stages.after:
        run("dvc", "repro", "--single-item", stage)
    comparison = publish.table(place)
    run("molf", "track")
    for what, link in publish.artifacts(place, settings.tracking.experiment).items():
        log.info(f"{what}: {link}")
    if place.root != place.home:
        commit = publish.commit(place, publish.message(comparison, lacking, key))
        log.info(f"branch molf/{key}: {'nothing changed' if commit is None else commit[:12]}")
    if promote:  # after the commit, which the champion's record names
        if settings.flow.pool is not None:  # from whose workers only results came
            bring(place, [stage for job in stages.jobs if job.cell not in lacking for stage in job.stages], Path())
        try:
            run("molf", "promote")
        except CommandFailed as error:
            if error.code != 1:
                raise
            log.warning(f"no champion was made of a task or of all: {error.reason}")
    if push:
        run("dvc", "push", "--run-cache")
        if place.root != place.home:
            publish.push(place, "origin", key)
    _tidy(place, settings.flow.keep_runs)
    log.info(comparison["sentence"])
    if lacking:
        raise CellsLack(
            f"{len(lacking)} of {len(stages.jobs)} cells lack; the others are compared: "
            + "; ".join(f"{cell.name}: {lack.reason}" for cell, lack in lacking.items())
        )
    if made_from is not None:
        versions.record({**made_from, **versions.pinned(settings, place.root / SOURCES_LOCK)}, pin)
    if place.root != place.home:
        last = "checkout" if settings.flow.pool is None else "pull"
        first = "commit or stash your changes, then " if checkout.uncommitted(place.home) else ""
        log.info(f"next: git diff HEAD...molf/{key}; {first}git merge molf/{key} && dvc {last} --with-deps compare")
    sentence: str = comparison["sentence"]
    return sentence


def _before(place: Place, stages: Graph, logs: Path, slots: Slots, retries: int) -> dict[str, str]:
    """Brings data and base models up to date; returns the stages that failed or need one that did, with the reason."""
    failed: dict[str, str] = {}
    for stage in stages.before:
        reason = next((failed[name] for name in sorted(stages.needs[stage]) if name in failed), None)
        if reason is not None:
            failed[stage] = reason
        elif stage.endswith(".dvc") and place.root != place.home:
            if reason := _added(place, stage):
                failed[stage] = reason
        else:
            failed |= _bring_before(place, stage, logs, slots, retries)
    return failed


def _bring_before(place: Place, stage: str, logs: Path, slots: Slots, retries: int) -> dict[str, str]:
    """Brings a stage up to date that cells need; returns it with the reason if it failed."""
    waiting = partial(get_run_logger().info, f"another run is at {stage}; waits for it")
    with locks.lock(place.flow / "locks" / stage, waiting) as held:
        done = reproduce.with_options(retries=retries)(
            stage, place, logs / f"{stage}.log", slots, 1, [held], {}, return_state=True
        )
    return {} if done.is_completed() else {stage: f"{stage} failed: {_lack(done).reason}"}


def _added(place: Place, stage: str) -> str | None:
    """Brings a file that DVC keeps since `dvc add`; returns what is wrong with it, if anything."""
    log = get_run_logger()
    there = Place(place.home, place.home)
    changed = stream(["dvc", "status", "--json", stage], there.root, lambda line: None, there.environment())
    if '"modified"' in changed.splitlines()[-1]:
        name = stage.removesuffix(".dvc")
        return f"{name} has changed since it was added; type `dvc add {name}`"
    for command in ("checkout", "pull"):
        try:
            stream(["dvc", command, "--quiet", stage], place.root, log.info, place.environment())
            return None
        except CommandFailed as error:
            reason = f"{stage}: {error.reason}"
    return reason


def _seen(home: Path) -> dict[str, Any] | None:
    """What the checkout's sources are at this moment; None where params.yaml has mistakes, which the check names."""
    try:
        return versions.local(load_params(home / PARAMS), home, versions.hashes(home))
    except UserError:
        return None


def _worktree(home: Path, key: str) -> Place:
    """The run's worktree; says which files of the checkout go into it that git does not know."""
    new = [line[3:] for line in checkout.uncommitted(home) if line.startswith("??")]
    if new:
        shown = ", ".join(new[:10]) + (f" and {len(new) - 10} more" if len(new) > 10 else "")
        get_run_logger().warning(
            f"files that git does not know go into the run's first commit, and to origin with push or a pool: {shown}; "
            "what must not, belongs into .gitignore"
        )
    return checkout.run_worktree(home, key)


def _jobs(
    place: Place,
    key: str,
    jobs: Sequence[Job],
    what: str,
    stages: Graph,
    settings: Params,
    slots: Slots,
    logs: Path,
    failed: Mapping[str, str],
    lost: Mapping[Job, Lack],
) -> tuple[list[str], dict[Job, Lack]]:
    """Runs the jobs that are not up to date, as many side by side as there are slots.

    Args:
        what: They are, for messages.
        failed: Stages before them that failed, with the reason.
        lost: Trials that failed; a job that needs one lacks as well.

    Returns:
        The stages that are up to date now and were not before, and the jobs that failed, with the reason.
    """
    log = get_run_logger()
    lacking: dict[Job, Lack] = {}
    stale = []
    old = _stale(place, jobs)
    for job in jobs:
        needed = _needed(job, stages)
        reasons = [failed[name] for name in sorted(needed) if name in failed]
        reasons += [
            f"{trial.stages[0]} failed: {lack.reason}"
            for trial, lack in lost.items()
            if not needed.isdisjoint(stages.choose) and job.of_method(trial)
        ]
        if reasons:
            lacking[job] = Lack(Kind.BEFORE, reasons[0])
        elif not old.isdisjoint(job.stages):
            stale.append(job)
    where = f"{slots.count} side by side" if settings.flow.pool is None else f"by the pool {settings.flow.pool}"
    log.info(f"{len(jobs)} {what}: {len(stale)} to bring up to date, {where}")
    if not stale:
        return [], lacking
    gpus = {job: _gpus(job, settings) for job in stale}
    commit = checkout.start(place.root, key)
    if settings.flow.pool is not None:
        failures = _in_pool(place, key, commit, gpus, old, settings)
        lacking |= failures
        return [stage for job in stale if job not in failures for stage in job.stages], lacking
    for count in gpus.values():
        slots.check(count)
    free = threading.BoundedSemaphore(slots.count)
    futures: dict[Job, PrefectFuture[None]] = {}
    for job in stale:
        free.acquire()
        futures[job] = cell.submit(job, commit, place.home, logs, slots, gpus[job], settings.flow.retries, {})
        futures[job].add_done_callback(lambda _: free.release())
    done: list[str] = []
    for job, future in futures.items():
        future.wait()
        if future.state.is_completed():
            done += job.stages
        else:
            lacking[job] = _lack(future.state)
            log.error(f"{job.name} failed: {lacking[job].reason}")
    return done, lacking


def _in_pool(
    place: Place, key: str, commit: str, gpus: Mapping[Job, int], old: set[str], settings: Params
) -> dict[Job, Lack]:
    """Has a pool's workers run the cells that no machine has finished, and writes the others' hashes into dvc.lock.

    Returns:
        The cells that failed, with the reason.
    """
    log = get_run_logger()
    assert settings.flow.pool is not None
    kept = {stage for job in gpus for stage in job.stages} - old

    def finished(jobs: Sequence[Job]) -> list[Job]:
        found = find(place, jobs, [stage for job in jobs for stage in job.stages if stage in kept])
        return [job for job in jobs if found.issuperset(job.stages)]

    done = set(finished(list(gpus)))
    left = {job: count for job, count in gpus.items() if job not in done}
    log.info(f"{len(done)} of them are in the remote already")
    if not left:
        return {}
    offer(place, list(left), [stage for job in left for stage in job.stages if stage in kept])
    git(place.root, "push", "--quiet", "origin", f"{commit}:{checkout.start_ref(key)}")
    lock = runs.IN_PLACE if place.root == place.home else f"run-{key}"
    flow = settings.flow
    return pool.run_cells(
        settings.flow.pool, place.home, key, lock, commit, left, flow.retries, flow.lost_after, finished
    )


def _stale(place: Place, jobs: Sequence[Job]) -> set[str]:
    """Their stages that DVC would run."""
    said: list[str] = []
    environment = place.environment()
    try:
        stream(["dvc", "checkout", "--quiet", "--allow-missing"], place.root, said.append, environment)
    except CommandFailed as error:  # in place: it overwrites nothing that the cache lacks
        get_run_logger().warning(f"some results stay as they lie here: {error.reason}")
    # Without names, for DVC's time grows with their number times that of all stages.
    answer = stream(["dvc", "status", "--json"], place.root, lambda line: None, environment)
    return set(json.loads(answer.splitlines()[-1])).intersection(name for job in jobs for name in job.stages)


def _needed(job: Job, stages: Graph) -> set[str]:
    return {name for stage in job.stages for name in stages.needs[stage]}


def _gpus(job: Job, settings: Params) -> int:
    """GPUs that a cell takes, by its task's training."""
    task = next(value for _, key, value in job.narrowed if key == "tasks")
    return settings.training_for(str(task)).processes


def _lack(state: Any) -> Lack:
    """Why a task failed."""
    return why(state.result(raise_on_failure=False))


def _changes(
    models: Sequence[str] | None,
    tasks: Sequence[str] | None,
    methods: Sequence[str] | None,
    seeds: Sequence[int] | None,
    params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Keys of params.yaml that the flow's parameters set."""
    grid = {"models": models, "tasks": tasks, "methods": methods, "seeds": seeds}
    return {**{f"grid.{name}": list(values) for name, values in grid.items() if values}, **(params or {})}


def _check_remotes(home: Path, why: str) -> None:
    """Says before hours of work that their results could not be pushed.

    Raises:
        NotSetUp: git has no `origin`, or DVC no default remote.
    """
    from dvc.config import Config

    lacking = []
    if "origin" not in git(home, "remote").split():
        lacking.append("git has no remote `origin`: git remote add origin ADDRESS")
    if not Config(str(home / ".dvc"))["core"].get("remote"):
        lacking.append("DVC has no default remote: dvc remote add --default NAME ADDRESS")
    if lacking:
        raise NotSetUp(f"{why}, but " + "; ".join(lacking))


def _tidy(place: Place, keep: int) -> None:
    """Removes the worktrees of old runs, so that `keep` are left with this one's."""
    if place.root != place.home:
        for path in checkout.old_runs(place.home, keep - 1):
            checkout.remove_worktree(place.home, path)
            checkout.drop_unused_branch(place.home, path.name)


def main() -> None:
    """Runs the flow from the command line."""
    parser = argparse.ArgumentParser(description="Run the comparison as a Prefect flow.")
    parser.add_argument("--preset", help="of `molf preset`, applied first")
    for axis in ("models", "tasks", "methods"):
        parser.add_argument(f"--{axis}", nargs="+", help="instead of grid's in params.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, help="likewise")
    parser.add_argument("--pin", action="store_true", help="pin hub revisions and URLs anew first, for this run")
    parser.add_argument("--push", action="store_true", help="send results to DVC's remote and the branch to origin")
    parser.add_argument("--promote", action="store_true", help="let the best cell that passes the gate be champion")
    parser.add_argument("--in-place", action="store_true", help="work in this checkout, without a branch and a commit")
    options = vars(parser.parse_args())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    signal.signal(signal.SIGTERM, _terminated)  # to which Prefect hands on what it catches during the run
    try:
        if not PREFECT_API_URL.value():
            _start_server()
        compare_methods(**options)
    except (CommandFailed, CellsLack, NotSetUp, NoServer, checkout.GitFailed, OSError) as error:
        raise SystemExit(f"failed: {error}") from None
    except CancelledRun:
        raise SystemExit(f"cancelled; {NEXT}") from None
    except (httpx.TransportError, RuntimeError) as error:
        if not isinstance(error, httpx.TransportError) and not str(error).startswith("Failed to reach API"):
            raise
        raise SystemExit(
            f"failed: Prefect's server at {PREFECT_API_URL.value()} does not answer ({error}); start it (make serve), "
            f"or unset PREFECT_API_URL for one that lives as long as the run; {NEXT}"
        ) from None
    except KeyboardInterrupt:
        print(f"interrupted; {NEXT}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _start_server() -> None:
    """Starts Prefect's server for as long as this process lives.

    Not Prefect's own temporary one: a Ctrl-C would end it before the run has told it of its end, and a kill leave it.
    """
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
    log = checkout.home(HOME) / FLOW / "logs" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starts a Prefect server for this run ({log})", flush=True)
    stack = contextlib.ExitStack()
    atexit.register(stack.close)  # not sooner: what Prefect sends behind the run's back would wait for it in vain
    output = stack.enter_context(log.open("wb"))
    api = stack.enter_context(server(port, {"PREFECT_UI_ENABLED": "0"}, output))
    stack.enter_context(temporary_settings({PREFECT_API_URL: api}))


def _terminated(number: int, _frame: object) -> None:
    print(f"ended by signal {number}; {NEXT}", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
