"""`python -m molf.stages.fetch TASK`: brings a task's raw rows into data/raw/TASK."""

import sys

from molf.config import load_params
from molf.errors import main
from molf.paths import RAW


def run() -> None:
    name = sys.argv[1]
    params = load_params()

    from molf.raw import fetch

    info = fetch(name, params.tasks[name], RAW / name)
    for split, files in info["files"].items():
        for file in files:
            print(f"task {name}, {split}: {file['rows']:,} {'generated ' * info['generated']}rows from {file['from']}")


if __name__ == "__main__":
    raise SystemExit(main(run))
