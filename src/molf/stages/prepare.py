"""`python -m molf.stages.prepare TASK`: checks and splits a task's rows into data/prepared/TASK; writes its card."""

import sys

from molf.config import load_params
from molf.errors import main
from molf.paths import CARDS, PREPARED, RAW, write_text


def run() -> None:
    name = sys.argv[1]
    params = load_params()

    from molf.cards import data_card
    from molf.data import describe, prepare

    summary = prepare(name, params.tasks[name], RAW / name, PREPARED / name)
    write_text(CARDS / name / "README.md", data_card(summary, params.tasks[name].license))
    print(describe(summary))


if __name__ == "__main__":
    raise SystemExit(main(run))
