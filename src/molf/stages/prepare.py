"""`python -m molf.stages.prepare TASK`: checks and splits a task's rows into data/prepared/TASK."""

import sys

from molf.config import load_params
from molf.errors import main
from molf.paths import PREPARED, RAW


def run() -> None:
    name = sys.argv[1]
    params = load_params()

    from molf.data import describe, prepare

    print(describe(prepare(name, params.tasks[name], RAW / name, PREPARED / name)))


if __name__ == "__main__":
    raise SystemExit(main(run))
