"""`python -m molf.stages.evaluate MODEL TASK METHOD SEED`: scores a cell; with MODEL TASK alone, the base."""

import shutil
import sys
import time

from molf.config import evaluation_fingerprint, load_params, untrained_fingerprint
from molf.errors import main
from molf.paths import (
    BASE_METHOD,
    GENERAL,
    MODELS,
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

    from molf import cards, cells, closure, damage, machine, memory, notes, tracking
    from molf.tasks import TASKS

    block = params.tasks[cell.task]
    data = read_json(PREPARED / cell.task / "summary.json")
    rows = PREPARED / cell.task / "test.parquet"
    asked, examples, began, weights = file_hash(rows), pd.read_parquet(rows), None, cells.weights(cell)
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
        predictions = scorer.predict(lm, examples, params.evaluation)
        scores = scorer.metrics(predictions)
        scored = time.perf_counter()
        base = None if cell.method == BASE_METHOD else MODELS / cell.model
        tables, told = damage.measure(lm, GENERAL, base, params.evaluation.weights)
    report = {
        "cell": {"model": cell.model, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "train_fingerprint": trained,
        "train_started": began,
        "data_hash": data["data_hash"],
        "task_kind": block.kind,
        "evaluation": params.evaluation.model_dump(mode="json"),
        "code": closure.code_hash("molf.stages.evaluate"),
        "primary": scores.pop("primary"),
        "primary_name": scores.pop("primary_name"),
        "n": scores.pop("n"),
        "left_out": scores.pop("left_out"),
        "metrics": scores,
        **told,
        "seconds": scored - started,
        "damage_seconds": time.perf_counter() - scored,
    }
    report["fingerprint"] = evaluation_fingerprint(report)
    # As asked, and what was right: the report shows them beside the answers.
    tables["predictions"] = predictions.assign(
        prompt=examples["prompt"].to_numpy(), gold=examples["completion"].str.strip().to_numpy()
    )
    directory = cell.results / "evaluation"
    shutil.rmtree(directory, ignore_errors=True)
    for name, table in tables.items():
        write_parquet(directory / f"{name}.parquet", table)
    weights_hash = origin["hash"] if cell.method == BASE_METHOD else models.folder_hash(weights)
    report["lineage"] = notes.of_evaluation(cell, weights_hash, origin, data, asked, machine.git_commit())
    write_json(directory / "metrics.json", report)
    if cell.method != BASE_METHOD:
        made = cards.Made.read(cell, params)
        write_text(directory / "README.md", cards.model_card(made, made.here()))
    tracking.log_evaluation(cell.results, params.tracking.experiment)
    left_out = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items() if count)
    print(
        f"{cell.name}: {report['primary_name']} {report['primary']:.3f} on {report['n']} examples "
        f"in {report['seconds']:.0f} s"
        + (f" (left out: {left_out})" if left_out else "")
        + (f"; general loss {told['general']['loss']:.3f}" if told["general"] else "")
    )
    if base is not None and params.evaluation.weights is not None and told["weights"] is None:
        print(f"{cell.name}: {base} names its weights in another way, so their moves were not measured")


if __name__ == "__main__":
    raise SystemExit(main(run))
