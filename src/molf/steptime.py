"""`python -m molf.steptime MODEL TASK METHOD STEPS FILE`: trains a few steps of a cell, to know how long one takes."""

import json
import sys
import tempfile
import time
from pathlib import Path

from molf.config import load_params
from molf.errors import main
from molf.paths import MODELS, PREPARED


def run() -> None:
    """Writes `seconds` and `tokens` of the fastest of STEPS steps, and the `start` seconds of all else, into FILE."""
    started = time.perf_counter()
    model, task, method, steps, file = sys.argv[1:]
    params = load_params()

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import batches, training
    from molf.methods import METHODS

    block = params.methods[method].brief()
    # The first step compiles and fills caches; it counts as a part of the start.
    budget = params.training_for(task).model_copy(update={"max_steps": int(steps) + 1})
    METHODS[block.kind].save = lambda *_: None  # type: ignore[attr-defined]  # gigabytes that nobody will read
    METHODS[block.kind].proof = None  # type: ignore[attr-defined]  # so few steps need not show it
    with tempfile.TemporaryDirectory(prefix="molf-steptime-") as folder:
        outcome = training.train(
            base=MODELS / model,
            examples_frame=batches.read_examples(PREPARED / task / "train.parquet"),
            block=block,
            training=budget,
            seed=0,
            weights=Path(folder) / "weights",
            scratch=Path(folder) / "scratch",
        )
    history = outcome.history
    timed = history.assign(seconds=history["seconds"].diff()).iloc[1:]
    # The fastest: what else the machine does now slows the others, and would be taken for the cell's own.
    best = timed.iloc[int((timed["tokens"] / timed["seconds"]).argmax())]
    report = {
        "seconds": float(best["seconds"]),
        "tokens": int(best["tokens"]),
        "start": time.perf_counter() - started - float(timed["seconds"].sum()),
    }
    Path(file).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(run))
