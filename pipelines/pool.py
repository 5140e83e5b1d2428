"""Cells on other machines: the coordinator gives each to a Prefect work pool, a worker runs it in its own clone.

Both sides share three addresses: Prefect's server, git's `origin` and DVC's default remote. The coordinator knows a
cell to be finished when its run cache entries are in the remote, whatever became of the flow run that was to run it;
so nothing is lost or repeated when either side is killed, and two runs of one cell do no harm.
"""

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.types.entrypoint import EntrypointType

from molf.config import PARAMS, load_params
from molf.report.lacking import Kind, Lack
from pipelines import blocks, checkout, locks, runs
from pipelines.checkout import FLOW, git
from pipelines.commands import ended_together
from pipelines.form import HOME
from pipelines.graph import Job
from pipelines.tasks import NotSetUp, Slots, cell, why

OPEN = 1000  # flow runs at once that are given out and not ended; more than a pool has slots, or those stand idle
POLL = 2.0  # seconds between two looks at them
PAGE = 200  # flow runs that Prefect's server tells at once
SIGN = "molf.alive"  # a flow run's label that its cell renews
_Answer = TypeVar("_Answer")


# --- the worker's side ---------------------------------------------------------------------------------------------


RUNNER: Any = ThreadPoolTaskRunner(max_workers=1)  # a cell's tasks come one after another


@flow(name="run-cell", task_runner=RUNNER)
def run_cell(job: Job, commit: str, key: str, gpus: int, retries: int, sign: float) -> State[None]:
    """Runs one cell in this machine's clone, with what it needs from the remote, and sends there what it made.

    Args:
        job: The cell.
        commit: What it is made from, to be fetched from git's `origin` by the run's ref.
        key: Of the coordinator's run.
        gpus: That it takes.
        retries: Of a stage.
        sign: Seconds between two signs of life.

    Returns:
        Whether it is done; if not, `KIND: REASON` as the comparison says it.
    """
    runs.outlive_output()
    try:
        os.environ.update(blocks.from_blocks())
        _run_cell(job, commit, key, gpus, retries, sign)
    except runs.Cancel:
        return runs.cancelled()
    except Exception as error:
        get_run_logger().error(f"{job.key} failed: {error}")
        lack = why(error)
        return Failed(message=f"{lack.kind}: {lack.reason}")
    return Completed()


def _run_cell(job: Job, commit: str, key: str, gpus: int, retries: int, sign: float) -> None:
    home = checkout.home(HOME)
    cpu = load_params(home / PARAMS).flow.cpu_slots  # the machine's own, not the coordinator's
    slots = Slots.here(home / FLOW / "slots", cpu)
    slots.check(gpus)
    with runs.cancellable(), ended_together(), _alive(sign):
        ref = checkout.start_ref(key)
        with locks.lock(home / FLOW / "locks" / "git"):
            git(home, "fetch", "--quiet", "--no-write-fetch-head", "origin", f"+{ref}:{ref}")
        cell(job, commit, home, home / FLOW / "logs" / key, slots, gpus, retries, {}, remote=True)


@contextlib.contextmanager
def _alive(sign: float) -> Iterator[None]:
    """Gives signs of life to Prefect's server: a machine that is gone cannot say so."""
    ended = threading.Event()
    name = UUID(runtime.flow_run.id)

    def beat() -> None:
        with get_client(sync_client=True) as client:
            while not ended.wait(sign):
                with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError):
                    client.update_flow_run_labels(name, {SIGN: datetime.now(UTC).isoformat()})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


# --- the coordinator's side ----------------------------------------------------------------------------------------


def check(name: str) -> None:
    """Says before any work that a pool cannot be used.

    Raises:
        NotSetUp: No server that others reach, or no such pool.
    """
    if not PREFECT_API_URL.value():
        raise NotSetUp(f"flow.pool is {name}, but no Prefect server is set: PREFECT_API_URL=http://HOST:4200/api")
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            raise NotSetUp(
                f"flow.pool is {name}, but Prefect's server has no such work pool; start a worker for it, which makes "
                f"one: make worker POOL={name}"
            ) from None


def run_cells(
    pool: str,
    home: Path,
    key: str,
    lock: str,
    commit: str,
    jobs: Mapping[Job, int],
    retries: int,
    lost_after: float,
    finished: Callable[[Sequence[Job]], Collection[Job]],
) -> dict[Job, Lack]:
    """Has a pool's workers run cells.

    Args:
        pool: Its name.
        home: The coordinator's checkout.
        key: Of this run.
        lock: That it holds in `home` as long as it lives.
        commit: What the cells are made from; origin has it by the run's ref.
        jobs: The cells, with the GPUs that each takes.
        retries: How many more times a cell is given out whose worker was lost.
        lost_after: Seconds without a sign of life after which it is.
        finished: Tells which of some cells have their results in the remote.

    Returns:
        The cells that failed, with the reason.
    """
    with get_client(sync_client=True) as client:
        given = _Given(client, pool, home, key, lock, commit, retries, lost_after)
        try:
            return given.run(jobs, finished)
        except BaseException:
            given.cancel()
            raise


def _lack(state: State[Any]) -> Lack:
    """Why a cell lacks, by the state in which its flow run ended."""
    message = " ".join((state.message or state.type).split())
    if state.is_cancelled():
        return Lack(Kind.STOPPED, f"its flow run was cancelled: {message}")
    kind, _, reason = message.partition(": ")
    return Lack(Kind(kind), reason) if kind in list(Kind) else Lack(Kind.FAILED, message)


class _Given:
    """Cells that were given out, by the flow run of each."""

    def __init__(
        self,
        client: SyncPrefectClient,
        pool: str,
        home: Path,
        key: str,
        lock: str,
        commit: str,
        retries: int,
        lost_after: float,
    ) -> None:
        self.client, self.home, self.key, self.lock, self.commit = client, home, key, lock, commit
        self.retries, self.lost_after = retries, lost_after
        self.log = get_run_logger()
        self.open: dict[UUID, Job] = {}
        self.signs: dict[UUID, tuple[object, float]] = {}  # a flow run's last change, and when it was seen here
        self.tries: Counter[Job] = Counter()
        # The tree, not the commit: a run that was killed and started again makes another commit of the same files.
        self.tree = git(home, "rev-parse", f"{commit}^{{tree}}")
        deployment: Any = run_cell.to_deployment(
            name=pool,
            work_pool_name=pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
            description="A cell of a comparison's grid; given out by flows with flow.pool, not to be started by hand",
        )
        self.deployment: UUID = self._ask(deployment.apply)

    def run(self, jobs: Mapping[Job, int], finished: Callable[[Sequence[Job]], Collection[Job]]) -> dict[Job, Lack]:
        lacking: dict[Job, Lack] = {}
        self._take_over(jobs)
        waiting = [job for job in jobs if job not in set(self.open.values())]
        while waiting or self.open:
            while waiting and len(self.open) < OPEN:
                job = waiting.pop(0)
                self._give(job, jobs[job])
            time.sleep(POLL)
            completed = []
            for run in self._runs(list(self.open)):
                job, state = self.open[run.id], run.state
                assert state is not None
                reason = self._lost(run) if not state.is_final() else None
                if not state.is_final() and reason is None:
                    continue
                del self.open[run.id]
                if state.is_completed():
                    completed.append(job)
                elif state.is_failed() or state.is_cancelled():
                    lacking[job] = _lack(state)
                    self.log.error(f"{job.key} failed: {lacking[job].reason}")
                else:
                    self._again(job, reason or state.message or state.type, waiting, lacking)
            if completed:
                done = finished(completed)
                self.log.info(f"{len(jobs) - len(waiting) - len(self.open)} of {len(jobs)} cells have ended")
                for job in completed:
                    if job not in done:
                        self._again(job, "it completed, but the remote lacks its results", waiting, lacking)
        return lacking

    def cancel(self) -> None:
        """Cancels what still runs; the workers keep the checkpoints."""
        for name in self.open:
            with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError):
                self.client.set_flow_run_state(name, Cancelling(message="its comparison has ended"))

    def _give(self, job: Job, gpus: int) -> None:
        self.tries[job] += 1
        run = self._ask(
            lambda: self.client.create_flow_run_from_deployment(
                self.deployment,
                name=job.key,
                parameters={
                    "job": {"key": job.key, "values": job.values, "narrowed": job.narrowed, "stages": job.stages},
                    "commit": self.commit,
                    "key": self.key,
                    "gpus": gpus,
                    "retries": self.retries,
                    "sign": self.lost_after / 6,
                },
                tags=[*self._mine(), self._cell(job)],
            )
        )
        self.open[run.id] = job
        self.log.info(f"{job.key} is given to the pool")

    def _again(self, job: Job, reason: str, waiting: list[Job], lacking: dict[Job, Lack]) -> None:
        """Puts a cell back, unless it was given out often enough."""
        reason = " ".join(reason.split())[:500]
        if self.tries[job] > self.retries:
            lacking[job] = Lack(Kind.LOST, f"given out {self.tries[job]} times, lastly: {reason}")
            self.log.error(f"{job.key} failed: {lacking[job].reason}")
        else:
            self.log.warning(f"{job.key} is given out again: {reason}")
            waiting.append(job)

    def _lost(self, run: FlowRun) -> str | None:
        """Why a flow run is taken for lost: it was started, and nothing of it has changed for too long."""
        assert run.state is not None
        change, now = run.updated, time.monotonic()
        if run.state.is_scheduled() or self.signs.get(run.id, (None, now))[0] != change:
            self.signs[run.id] = change, now
            return None
        if now - self.signs[run.id][1] < self.lost_after:
            return None
        reason = f"no sign of life for {self.lost_after:.0f} s"
        self._ask(lambda: self.client.set_flow_run_state(run.id, Crashed(message=reason), force=True))
        return reason

    def _take_over(self, jobs: Mapping[Job, int]) -> None:
        """Goes on with the flow runs of coordinators of this checkout that were killed, or cancels them."""
        wanted = {self._cell(job): job for job in jobs}
        mine = FlowRunFilterTags(all_=[self._from()])
        living = FlowRunFilterStateType(
            any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
        )
        for run in self._pages(FlowRunFilter(tags=mine, state=FlowRunFilterState(type=living))):
            theirs = next((tag.removeprefix("lock:") for tag in run.tags if tag.startswith("lock:")), self.lock)
            if theirs != self.lock and locks.is_held(self.home / FLOW / "locks" / theirs):
                continue  # their coordinator lives
            job = next((wanted[tag] for tag in run.tags if tag in wanted), None)
            if job is None or job in self.open.values():
                self._ask(partial(self.client.set_flow_run_state, run.id, Cancelling()))
            else:
                tags = [*self._mine(), self._cell(job)]
                self._ask(partial(self.client.update_flow_run, run.id, tags=tags))
                self.open[run.id] = job
                self.tries[job] += 1
                self.log.info(f"{job.key} runs since an earlier run that was killed; goes on with it")

    def _from(self) -> str:
        return f"from:{socket.gethostname()}:{self.home}"

    def _mine(self) -> list[str]:
        return [self._from(), f"run:{self.key}", f"lock:{self.lock}"]

    def _cell(self, job: Job) -> str:
        return f"cell:{self.tree}:{job.key}"

    def _runs(self, names: Sequence[UUID]) -> Iterator[FlowRun]:
        for start in range(0, len(names), PAGE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=list(names[start : start + PAGE])))
            yield from self._pages(some)

    def _pages(self, which: FlowRunFilter) -> list[FlowRun]:
        found: list[FlowRun] = []
        deployment = DeploymentFilter(id=DeploymentFilterId(any_=[self.deployment]))
        while True:
            ask = partial(self.client.read_flow_runs, flow_run_filter=which, deployment_filter=deployment)
            page = self._ask(partial(ask, limit=PAGE, offset=len(found)))
            found += page
            if len(page) < PAGE:
                return found

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Asks Prefect's server, as often as it takes to be back."""
        told = False
        while True:
            try:
                return question()
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                    raise
                if not told:
                    self.log.warning(f"Prefect's server does not answer; waits for it ({error})")
                    told = True
                time.sleep(POLL)
