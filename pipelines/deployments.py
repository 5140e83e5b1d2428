"""The deployments of prefect.yaml, served by this process: `python -m pipelines.deployments`, as `make serve` does.

What prefect.yaml says is all there is: with work pools `prefect deploy --all` reads the same file.
"""

import argparse
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from molf.config import read_yaml
from pipelines.form import ROOT

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

FILE = ROOT / "prefect.yaml"
SERVED = {"name", "description", "entrypoint", "tags", "schedules", "concurrency_limit", "parameters", "work_pool"}


def read() -> dict[str, dict[str, Any]]:
    """What prefect.yaml says of each deployment, by its name.

    Raises:
        ValueError: It says something that `make serve` would leave out.
    """
    found = {deployment["name"]: deployment for deployment in read_yaml(FILE)["deployments"]}
    for name, deployment in found.items():
        if unknown := sorted(set(deployment) - SERVED):
            raise ValueError(f"{FILE.name}: {name} has {', '.join(unknown)}; `make serve` knows {', '.join(SERVED)}")
    return found


def load(deployment: Mapping[str, Any]) -> Any:
    """The flow that a deployment names."""
    module, _, function = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), function)


def made(deployment: Mapping[str, Any]) -> "RunnerDeployment":
    """A deployment that this process can serve; of a work pool it needs nothing."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.flows import EntrypointType
    from prefect.schedules import Cron

    limit = deployment.get("concurrency_limit")
    found: RunnerDeployment = load(deployment).to_deployment(
        name=deployment["name"],
        description=deployment["description"],
        tags=deployment["tags"],
        parameters=deployment.get("parameters"),
        schedules=[
            Cron(schedule["cron"], timezone=schedule["timezone"]) for schedule in deployment.get("schedules", ())
        ],
        concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return found


def main() -> None:
    """Serves all deployments until a signal ends it."""
    parser = argparse.ArgumentParser(description="Serve the deployments of prefect.yaml from this process.")
    parser.add_argument("--cron", help="when the nightly comparison runs, instead of prefect.yaml's")
    parser.add_argument("--watch-cron", help="when the data watch looks, likewise")
    parser.add_argument("--timezone", help="of both, likewise")
    options = parser.parse_args()
    from prefect import serve

    deployments = read()
    for name, cron in (("nightly", options.cron), ("hourly", options.watch_cron)):
        schedule = deployments[name]["schedules"][0]
        schedule["cron"] = cron or schedule["cron"]
        schedule["timezone"] = options.timezone or schedule["timezone"]
    serve(*map(made, deployments.values()))


if __name__ == "__main__":
    main()
