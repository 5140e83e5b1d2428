"""Prefect's server and the nightly deployment from one machine, until interrupted: `python -m pipelines.serve`.

Where PREFECT_API_URL names a server, that one is used and none is started.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
STARTUP = 180  # seconds
GRACE = 20  # seconds that a process has to end by itself


def nightly() -> dict[str, Any]:
    """The nightly deployment as prefect.yaml has it."""
    deployments = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return next(deployment for deployment in deployments if deployment["name"] == "nightly")


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Starts Prefect's server on the loopback address; `wait_for` tells when it answers."""
    prefect = Path(sys.executable).with_name("prefect")
    return subprocess.Popen(
        [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)], stdin=subprocess.DEVNULL
    )


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Returns once the server answers.

    Raises:
        SystemExit: It ended, or did not answer in time.
    """
    end = time.monotonic() + STARTUP
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"failed: Prefect's server does not answer on port {port}; is the port taken? try --port")


def run_deployment(cron: str, timezone: str) -> None:
    """Registers the nightly deployment and runs what its schedule fires; a process group of its own."""
    os.setsid()
    # Only now, since Prefect reads its settings when it is imported.
    from prefect.schedules import Cron

    from pipelines.flow import compare_methods

    deployment = nightly()
    compare_methods.serve(
        name=deployment["name"],
        description=deployment["description"],
        tags=deployment["tags"],
        schedule=Cron(cron, timezone=timezone),
        limit=1,
    )


def end(runner: SpawnProcess) -> None:
    """Ends the runner and the flow runs that it started: SIGTERM, by which a flow ends its stages, then SIGKILL."""
    if runner.pid is None:  # never started
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Prefect's runner at times never comes back from a SIGTERM that meets the end of a flow run.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, number)
        runner.join(GRACE)
        if not runner.is_alive():
            return


def main() -> None:
    """Serves until SIGINT or SIGTERM; then the server that was started here ends too."""
    schedule = nightly()["schedules"][0]
    parser = argparse.ArgumentParser(description="Serve the nightly comparison.")
    parser.add_argument("--cron", default=schedule["cron"], help="when it runs (%(default)s)")
    parser.add_argument("--timezone", default=schedule["timezone"], help="of the schedule (%(default)s)")
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's page (%(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = None
    runner = multiprocessing.get_context("spawn").Process(
        target=run_deployment, args=(options.cron, options.timezone), name="runner"
    )
    try:
        if "PREFECT_API_URL" not in os.environ:
            server = start_server(options.port)
            wait_for(server, options.port)
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{options.port}/api"
            print(f"Prefect: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
        runner.start()
        runner.join()
        raise SystemExit(runner.exitcode)
    except KeyboardInterrupt:
        print("ending", flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end(runner)
        if server is not None:
            server.terminate()
            server.wait(timeout=GRACE)


if __name__ == "__main__":
    main()
