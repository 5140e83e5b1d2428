"""`python -m molf.stages.evaluate MODEL TASK METHOD SEED`: scores a cell; with MODEL TASK alone, the base."""

import shutil
import sys
import time

from molf.config import fingerprint, load_params, untrained_fingerprint
from molf.errors import main
from molf.paths import (
    BASE_METHOD,
    PREPARED,
    Cell,
    file_hash,
    read_json,
    remove_leftovers,
    write_json,
    write_parquet,
    write_text,
)


def run() -> None:
    model, task, method, seed = [*sys.argv[1:], BASE_METHOD, "0"][:4]
    cell = Cell(model, task, method, int(seed))
    params = load_params()
    remove_leftovers(but=cell)

    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    import pandas as pd

    from molf import cards, cells, closure, lineage, machine, memory, tracking
    from molf.tasks import TASKS

    block = params.tasks[cell.task]
    data = read_json(PREPARED / cell.task / "summary.json")
    rows = PREPARED / cell.task / "test.parquet"
    asked, began, weights = file_hash(rows), None, cells.weights(cell)
    with memory.explained_by(lambda: f"lower evaluation.batch_size (now {params.evaluation.batch_size})"):
        if cell.method == BASE_METHOD:
            origin = models.describe(weights)
            trained = untrained_fingerprint(origin["hash"])
        else:
            training = read_json(cell.results / "train" / "run.json")
            origin, trained, began = training["model"], training["fingerprint"], training["started"]
        lm = cells.load(cell, weights, params, progress=sys.stderr.isatty())
        started = time.perf_counter()
        scorer = TASKS[block.kind]
        predictions = scorer.predict(lm, pd.read_parquet(rows), params.evaluation)
    scores = scorer.metrics(predictions)
    seconds = time.perf_counter() - started
    evaluation = params.evaluation.model_dump(mode="json")
    code = closure.code_hash("molf.stages.evaluate")
    report = {
        "cell": {"model": cell.model, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "fingerprint": fingerprint(trained, data["data_hash"], evaluation, code),
        "train_fingerprint": trained,
        "train_started": began,
        "data_hash": data["data_hash"],
        "task_kind": block.kind,
        "evaluation": evaluation,
        "code": code,
        "primary": scores.pop("primary"),
        "primary_name": scores.pop("primary_name"),
        "n": scores.pop("n"),
        "left_out": scores.pop("left_out"),
        "metrics": scores,
        "seconds": seconds,
    }
    directory = cell.results / "evaluation"
    shutil.rmtree(directory, ignore_errors=True)
    write_parquet(directory / "predictions.parquet", predictions)
    weights_hash = origin["hash"] if cell.method == BASE_METHOD else models.folder_hash(weights)
    report["lineage"] = lineage.of_evaluation(
        cell, directory / "predictions.parquet", weights_hash, origin, data, asked, machine.git_commit()
    )
    write_json(directory / "metrics.json", report)
    if cell.method != BASE_METHOD:
        made = cards.Made.read(cell, params)
        write_text(directory / "README.md", cards.model_card(made, made.here()))
    tracking.log_evaluation(cell.results, params.tracking.experiment)
    left_out = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items() if count)
    print(
        f"{cell.name}: {report['primary_name']} {report['primary']:.3f} on {report['n']} examples in {seconds:.0f} s"
        + (f" (left out: {left_out})" if left_out else "")
    )


if __name__ == "__main__":
    raise SystemExit(main(run))
