"""Prefect's server and the nightly deployment from one machine, until interrupted: `python -m pipelines.serve`.

Where PREFECT_API_URL names a server, that one is used and none is started.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
STARTUP = 180  # seconds


def nightly() -> dict[str, Any]:
    """The nightly deployment as prefect.yaml has it."""
    deployments = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return next(deployment for deployment in deployments if deployment["name"] == "nightly")


def start_server(port: int) -> subprocess.Popen[bytes]:
    """Starts Prefect's server on the loopback address and waits until it answers.

    Raises:
        SystemExit: It ended, or did not answer in time.
    """
    prefect = Path(sys.executable).with_name("prefect")
    server = subprocess.Popen(
        [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)], stdin=subprocess.DEVNULL
    )
    end = time.monotonic() + STARTUP
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    server.terminate()
    raise SystemExit(f"failed: Prefect's server does not answer on port {port}; is the port taken? try --port")


def main() -> None:
    """Serves until SIGINT or SIGTERM; then the server that was started here ends too."""
    deployment = nightly()
    schedule = deployment["schedules"][0]
    parser = argparse.ArgumentParser(description="Serve the nightly comparison.")
    parser.add_argument("--cron", default=schedule["cron"], help="when it runs (%(default)s)")
    parser.add_argument("--timezone", default=schedule["timezone"], help="of the schedule (%(default)s)")
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's page (%(default)s)")
    options = parser.parse_args()
    server = None
    if "PREFECT_API_URL" not in os.environ:
        server = start_server(options.port)
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{options.port}/api"
        print(f"Prefect: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    try:
        # Only now, since Prefect reads its settings when it is imported.
        from prefect.schedules import Cron

        from pipelines.flow import compare_methods

        compare_methods.serve(
            name=deployment["name"],
            description=deployment["description"],
            tags=deployment["tags"],
            schedule=Cron(options.cron, timezone=options.timezone),
            limit=1,
        )
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=30)


if __name__ == "__main__":
    main()
