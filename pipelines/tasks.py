"""Prefect's tasks: one brings a stage up to date, one a cell in a worktree of its own."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from molf import hosts
from molf.config import PARAMS
from molf.errors import plain
from molf.models import ELSEWHERE
from molf.paths import SCRATCH, file_hash, read_json, write_json
from molf.report.lacking import Kind, Lack
from pipelines import checkout, exchange, locks
from pipelines.checkout import Place
from pipelines.commands import CommandFailed, stream
from pipelines.graph import Job

SPLIT = SCRATCH / "micro_batches.json"  # of a worktree: in how many parts its next try takes a batch, and why


class NotSetUp(ValueError):
    """What a flow was asked for needs something that is not there."""


@dataclass(frozen=True)
class Slots:
    """How many cells a machine runs side by side.

    Args:
        folder: Where its locks lie.
        gpus: As CUDA_VISIBLE_DEVICES names them; with any, each is a slot.
        cpu: Slots of a machine without.
        hosts: That train a cell together, this machine the head (`molf.hosts`); each takes its share of a cell.
    """

    folder: Path
    gpus: tuple[str, ...]
    cpu: int
    hosts: int = 1

    @property
    def count(self) -> int:
        return len(self.gpus) or self.cpu

    @classmethod
    def here(cls, folder: Path, cpu: int) -> "Slots":
        """Those of this machine, by its GPUs and its environment."""
        group = hosts.asked()
        return cls(folder, tuple(locks.gpus()), cpu, group.hosts if group else 1)

    def share(self, count: int) -> int:
        """GPUs of this machine that a cell of `count` processes takes."""
        return -(-count // self.hosts)

    def check(self, count: int) -> None:
        """Refuses a cell that would wait forever.

        Raises:
            NotSetUp: It takes more GPUs than there are.
        """
        if 0 < len(self.gpus) < self.share(count):
            raise NotSetUp(
                f"training.processes: a cell takes {count} GPUs, "
                + (f"{self.share(count)} of each of {self.hosts} hosts, " if self.hosts > 1 else "")
                + f"this machine has {len(self.gpus)} ({', '.join(self.gpus)}); set it to "
                f"{self.hosts * len(self.gpus)} or less, or run on a larger machine"
            )

    @contextlib.contextmanager
    def hold(self, count: int, waiting: Callable[[], object]) -> Iterator[tuple[list[int], dict[str, str]]]:
        """Waits for a cell's GPUs, or a slot without; yields descriptors that hold them, and the environment."""
        names = self.gpus or tuple(map(str, range(self.cpu)))
        paths = [self.folder / f"{'gpu' if self.gpus else 'cpu'}-{name}" for name in names]
        with locks.any_of(paths, self.share(count) if self.gpus else 1, waiting) as (held, places):
            if self.gpus:
                yield held, {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[place] for place in places)}
            elif self.cpu > 1 and "OMP_NUM_THREADS" not in os.environ:
                yield held, {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.cpu))}
            else:
                yield held, {}


def may_pass(_task: object, _run: object, state: Any) -> bool:
    """Prefect's question whether to try again: only what can pass, a killed stage or one that ran out of memory."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, CommandFailed) and error.may_pass


def why(error: Any) -> Lack:
    """Why a cell lacks, by the error that ended it."""
    reason = plain(" ".join(str(error).split())) or type(error).__name__
    kind = Kind.INPUT if isinstance(error, NotSetUp) else Kind.FAILED
    if isinstance(error, CommandFailed):
        reason = error.reason
        if error.out_of_memory:
            kind = Kind.MEMORY
        elif error.may_pass:
            kind = Kind.LOST
        elif error.stage_code == 2:
            kind = Kind.INPUT
    return Lack(kind, reason)


@task(task_run_name="{stage}", cache_policy=NO_CACHE, retry_delay_seconds=1, retry_condition_fn=may_pass)
def reproduce(
    stage: str,
    place: Place,
    log: Path,
    slots: Slots,
    count: int,
    held: Sequence[int],
    extra: dict[str, str],
    force: bool = False,
) -> None:
    """Brings one stage up to date with `dvc repro -s`; DVC is the cache.

    Args:
        stage: Its name.
        place: Where it runs.
        log: File that gets its lines as well.
        slots: The machine's.
        count: GPUs that it takes.
        held: Locks that must not be free before its last process has ended.
        extra: Environment beside the place's.
        force: Runs it although it is up to date.

    Raises:
        CommandFailed: It failed. After want of memory the next try trains in micro-batches of half the size.
    """
    logger = get_run_logger()
    environment = {**place.environment(), **extra}
    if (parts := _split(place)["parts"]) > 1:
        environment["MOLF_MICRO_BATCHES"] = str(parts)
    with slots.hold(count, lambda: logger.info("waits for a free slot")) as (more, pinned):
        try:
            stream(
                ["dvc", "repro", "--single-item", *(["--force"] if force else []), stage],
                place.root,
                logger.info,
                {**environment, **pinned},
                log,
                [*held, *more],
            )
        except CommandFailed as error:
            _note_failure(place, error)
            raise


def _split(place: Place) -> dict[str, Any]:
    """In how many `parts` a batch is to be taken, after how many `kills`; of other `params` nothing is known."""
    params = file_hash(place.root / PARAMS)
    path = place.root / SPLIT
    noted: dict[str, Any] = read_json(path) if path.exists() else {}
    return noted if noted.get("params") == params else {"params": params, "parts": 1, "kills": 0}


def _note_failure(place: Place, error: CommandFailed) -> None:
    """Halves the micro-batches of the next try if memory ran out, as a second kill in a row suggests as well."""
    noted = _split(place)
    noted["kills"] += error.killed
    if error.out_of_memory or noted["kills"] > 1:
        noted["parts"] *= 2
    write_json(place.root / SPLIT, noted)


TRANSFER: Any = {"cache_policy": NO_CACHE, "retries": 3, "retry_delay_seconds": 10}  # for networks that fail at times


@task(task_run_name="find", **TRANSFER)
def find(place: Place, jobs: Sequence[Job], kept: Sequence[str]) -> set[str]:
    """Writes into dvc.lock what any machine has finished of cells; returns those stages, and those kept."""
    return exchange.find(place, jobs, kept, get_run_logger().debug)


@task(task_run_name="offer", **TRANSFER)
def offer(place: Place, jobs: Sequence[Job], kept: Sequence[str]) -> None:
    """Sends the remote what cells are made from."""
    exchange.offer(place, jobs, kept, get_run_logger().debug)


@task(task_run_name="bring", **TRANSFER)
def bring(place: Place, stages: Sequence[str], below: Path) -> None:
    """Brings the outputs of stages that lie below a folder."""
    exchange.bring(place, stages, below, get_run_logger().debug)


@task(task_run_name="take {job.key}", **TRANSFER)
def take(job: Job, place: Place, log: Path, held: Sequence[int]) -> set[str]:
    """Brings what a cell needs from the remote; returns the stages that another machine has finished."""
    return exchange.take(place, job, get_run_logger().info, log, held)


@task(task_run_name="send {stage}", **TRANSFER)
def send(stage: str, place: Place, log: Path, held: Sequence[int]) -> None:
    """Sends what a stage has made to the remote."""
    exchange.send(place, stage, get_run_logger().info, log, held)


@task(task_run_name="{job.key}", cache_policy=NO_CACHE)
def cell(
    job: Job,
    commit: str,
    home: Path,
    logs: Path,
    slots: Slots,
    count: int,
    retries: int,
    extra: dict[str, str],
    remote: bool = False,
) -> None:
    """Brings a cell's stages up to date, one after another, in a worktree of its own that is removed when all are.

    Args:
        job: The cell.
        commit: What it is made from.
        home: The checkout whose cache and locks are used.
        logs: Folder for each stage's lines.
        slots: The machine's.
        count: GPUs that it takes.
        retries: Of a stage.
        extra: Environment beside the place's.
        remote: Whether what it needs comes from DVC's default remote, and what it makes goes there.

    Raises:
        CommandFailed: A stage failed; the worktree and its checkpoint stay for the next run.
    """
    logger = get_run_logger()
    mine = home / checkout.FLOW / "locks" / job.key
    with locks.lock(mine, lambda: logger.info("another run is at this cell; waits for it")) as held:
        place = checkout.cell_worktree(home, commit, job)
        finished: set[str] = set()
        if remote:
            finished = take(job, place, logs / f"{job.key}.log", [held])
        else:
            stream(
                ["dvc", "checkout", "--quiet", "--force", "--with-deps", "--allow-missing", *job.stages],
                place.root,
                logger.info,
                place.environment(),
                held=[held],
            )
        for stage in job.stages:
            if stage in finished:
                logger.info(f"{stage} was finished before")
                continue
            run = partial(
                reproduce.with_options(retries=retries), place=place, slots=slots, count=count, held=[held], extra=extra
            )
            try:
                run(stage, log=logs / f"{stage}.log")
            except CommandFailed:
                first = job.stages[0]
                if stage == first or not _weights_gone(place, job):
                    raise
                logger.info(f"the weights of {first} were not kept; it runs again")
                run(first, log=logs / f"{first}.log", force=True)
                run(stage, log=logs / f"{stage}.log")
            if remote:
                send(stage, place, logs / f"{job.key}.log", [held])
        checkout.remove_worktree(home, place.root)


def _weights_gone(place: Place, job: Job) -> bool:
    """Whether a training's weights, by `training.keep` no output of it, lay in a worktree that is removed."""
    note = place.root / job.cell.weights / ELSEWHERE
    return note.exists() and not (place.root / read_json(note)["path"]).exists()
