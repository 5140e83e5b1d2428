"""Prefect's server and all deployments from one machine, until interrupted: `python -m pipelines.serve`.

Where PREFECT_API_URL names a server, that one is used and none is started. Whatever ends this process, none of those
that it started is left, flow runs and their trainings included.
"""

import argparse
import contextlib
import os
import signal
import sys
import time

from pipelines.form import ROOT
from pipelines.server import NoServer, guarded, server


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve the deployments of prefect.yaml.")
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's page (%(default)s)")
    parser.add_argument("--cron", help="when the nightly comparison runs, instead of prefect.yaml's")
    parser.add_argument("--watch-cron", help="when the data watch looks, likewise")
    parser.add_argument("--timezone", help="of both, likewise")
    options = vars(parser.parse_args())
    port = options.pop("port")
    schedules = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
    for number in (signal.SIGTERM, signal.SIGINT):  # of SIGINT too: a shell's background job ignores it
        signal.signal(number, signal.default_int_handler)
    api = os.environ.get("PREFECT_API_URL")
    try:
        with contextlib.ExitStack() as stack:
            if api is None:
                api = stack.enter_context(server(port))
            command = [sys.executable, "-m", "pipelines.deployments", *schedules]
            runner = stack.enter_context(guarded(command, {"PREFECT_API_URL": api}, cwd=ROOT))
            stack.callback(_deaf)
            print(f"Prefect: {api.removesuffix('/api')} (Ctrl-C ends it)", flush=True)
            while runner.poll() is None:
                time.sleep(0.2)
            raise SystemExit(runner.returncode)
    except NoServer as error:
        raise SystemExit(f"failed: {error}") from None
    except KeyboardInterrupt:
        print("ended", flush=True)


def _deaf() -> None:
    """A second Ctrl-C must not leave behind what the first one ends."""
    print("ending", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
