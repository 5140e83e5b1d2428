"""The data watch: a comparison starts when a source has changed since the last one, and only then."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.states import Crashed
from pydantic import Field

from molf.config import PARAMS, SOURCES_LOCK, fingerprint, load_params
from molf.errors import UserError
from pipelines import checkout, runs, versions
from pipelines.form import HOME

DEPLOYMENT = "compare-methods/on-demand"
PENDING = timedelta(minutes=10)  # after so long a run that a worker took and did not begin is taken for lost
TAG = "data-watch"  # of the comparisons that it starts


class GaveUp(RuntimeError):
    """The comparison of this very data failed too often."""


@flow(name="watch-data", flow_run_name="watch-data")
def watch_data(
    pin: bool = False,
    push: bool = False,
    promote: bool = False,
    tries: Annotated[int, Field(ge=1)] = 3,
) -> str:
    """Looks at each source of the grid, and starts the on-demand comparison if one has changed since the last one.

    Local files count by their content; hub repositories and URLs by what sources.lock pins. That they moved beyond
    it is told, and with `pin` it counts.

    Args:
        pin: A hub revision or URL that has moved starts a comparison too, which pins it anew in its own sources.lock.
        push: The comparison sends its results to DVC's default remote and its branch to git's origin.
        promote: The comparison lets the best cell that passes the gate become the champion.
        tries: How often a comparison of the same data may fail before the watch starts no other.

    Returns:
        What it found, in one sentence.

    Raises:
        GaveUp: A source has changed, but `tries` comparisons of it came to nothing.
        UserError: params.yaml has mistakes.
    """
    log = get_run_logger()
    home = checkout.home(HOME)
    runs.begin(home)  # a comparison that was killed is under way no longer
    params = load_params(home / PARAMS)
    hashes = versions.hashes(home)
    now = versions.local(params, home, hashes)
    held = versions.pinned(params, home / SOURCES_LOCK)
    try:
        moved = versions.looked_up(params, home, hashes)
    except UserError as error:
        log.warning(f"hub and URLs are left out this time: {error}")
        moved = {} if pin else held
    now |= moved if pin else held
    for key in (key for key in moved if not pin and moved[key] != held[key]):
        log.warning(
            f"{key} has moved to {moved[key]}, but sources.lock pins {held[key]}, which comparisons use: "
            "run `molf pin` and commit sources.lock, or set the watch's parameter `pin`"
        )
    before = versions.last(pin)
    changed = [key for key in now if before.versions.get(key) != now[key]]
    if before.id and not changed:
        sentence = f"nothing changed: {len(now)} sources are as they were at the last comparison"
        log.info(sentence)
        return sentence
    if not before.id:
        log.info("no whole comparison is known yet")
    for key in changed:
        log.info(f"{key}: {before.versions.get(key, 'not compared yet')} -> {now[key]}")
    return _start(before, now, {"pin": pin, "push": push, "promote": promote}, tries)


def _start(before: versions.Record, now: Mapping[str, str], parameters: dict[str, Any], tries: int) -> str:
    """Starts the comparison unless one that was started here is under way, or too many came to nothing."""
    log = get_run_logger()
    change = f"{TAG}-{fingerprint(before.id, dict(now))}"
    with get_client(sync_client=True) as client:
        runs: Any = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(any_=[TAG])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
        for run in runs:
            if run.state is not None and run.state.is_pending() and run.state.timestamp < datetime.now(UTC) - PENDING:
                log.warning(f"the comparison {run.name} was never begun: what should begin it has ended")
                run.state = client.set_flow_run_state(run.id, Crashed(message="It was never begun"), force=True).state
    under_way = [run for run in runs if run.state is None or not run.state.is_final()]
    if under_way:
        sentence = f"the comparison {under_way[0].name} is under way; the next look is after it"
        log.info(sentence)
        return sentence
    ended = [run for run in runs if change in run.tags]
    if len(ended) >= tries:
        raise GaveUp(
            f"{len(ended)} comparisons of this data came to nothing, the last with: {ended[0].state.name}. "
            f"Look at the flow runs tagged {change}, mend what they say and start {DEPLOYMENT} by hand"
        )
    # The key lets two looks at the same moment start one run, not two.
    started: Any = run_deployment(
        DEPLOYMENT,
        parameters=parameters,
        timeout=0,
        tags=[TAG, change],
        idempotency_key=f"{change}-{len(ended)}",
        as_subflow=False,
    )
    sentence = f"a comparison is started: {started.name}"
    log.info(sentence)
    return sentence
