"""`python -m molf.stages.sweep MODEL TASK METHOD FACTOR`: trains at other learning rates, scores on validation rows.

The budget is a cell's own. Facts are trained and scored on the same ones, so here on those of the validation split.
"""

import gc
import math
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.config import TRIAL_SEED, Params, Training, fingerprint, load_params, trial_config
from molf.errors import Diverged, UserError, main
from molf.paths import (
    CHECKPOINTS,
    MODELS,
    PREPARED,
    SCRATCH,
    SWEEPS,
    TRAINER,
    Cell,
    Trial,
    file_hash,
    read_json,
    write_json,
    write_parquet,
)

if TYPE_CHECKING:
    import pandas as pd

    from molf.evaluation import LanguageModel

SCORED_ON = "validation.parquet"


def run() -> None:
    *names, factor = sys.argv[1:]
    params = load_params()
    trial = find(params, names, factor)
    budget = params.training_for(trial.task)

    from molf import models, processes

    models.quiet()  # before the libraries that it quiets are imported
    if processes.started():
        with processes.joined():
            train(trial, params, budget)
        return
    remove_leftovers(but=trial)
    folder = SCRATCH / trial.results
    shutil.rmtree(folder, ignore_errors=True)
    report: dict[str, Any] = {"diverged": None, "steps": None, "train_seconds": None, "peak_memory_bytes": None}
    report |= dict.fromkeys(("score", "primary_name", "n", "left_out", "loss", "seconds"))
    try:
        if budget.processes > 1:
            processes.launch("molf.stages.sweep", sys.argv[1:], budget.processes, budget.threads)
        else:
            train(trial, params, budget)
        report |= read_json(folder / "summary.json") | score(trial, params, budget, folder / "weights")
    except Diverged as error:
        report["diverged"] = str(error)
    shutil.rmtree(trial.results, ignore_errors=True)
    if (folder / "history.parquet").exists():
        trial.results.mkdir(parents=True)
        shutil.copyfile(folder / "history.parquet", trial.results / "history.parquet")
    write_json(trial.record, record(trial, params, budget) | report)
    shutil.rmtree(folder, ignore_errors=True)
    said = f"diverged: {report['diverged']}"
    if report["diverged"] is None:
        said = f"{report['primary_name']} {report['score']:.3f}, loss {report['loss']:.3f} on {report['n']} rows"
    print(f"{trial.name}: {said}")


def find(params: Params, names: list[str], factor: str) -> Trial:
    """The grid's trial of that name.

    Raises:
        UserError: There is none.
    """
    for trial in params.trials():
        if [trial.model, trial.task, trial.method, str(trial.factor)] == [*names, factor]:
            return trial
    raise UserError(f"{'/'.join(names)}, factor {factor}: not in the grid, whose tune is {params.grid.tune}")


def record(trial: Trial, params: Params, budget: Training) -> dict[str, Any]:
    """All that a trial's numbers depend on. Nothing of the test rows is, so that other ones train no trial anew."""
    from molf import closure, machine, models

    files = dict.fromkeys((f"{params.trial_rows(trial.task)}.parquet", SCORED_ON))
    block = params.methods[trial.method]
    method = closure.of_method(block.kind)
    parts: dict[str, Any] = {
        "config": trial_config(params, trial),
        "data": {name: file_hash(PREPARED / trial.task / name) for name in files},
        "model": models.describe(MODELS / trial.model),
        "code": closure.code_hash("molf.stages.sweep", method),
        "versions": machine.versions(budget.moments, getattr(block, "base_bits", None)),
        "evaluation": params.evaluation.model_dump(mode="json", include={"batch_size", "max_new_tokens"}),
    }
    return {
        "trial": {**vars(trial), "seed": TRIAL_SEED},
        "fingerprint": fingerprint(parts | {"model": parts["model"]["hash"]}),
        **parts,
        "git_commit": machine.git_commit(),
        "hardware": machine.hardware(budget.threads, budget.processes),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def train(trial: Trial, params: Params, budget: Training) -> None:
    """Trains into the trial's scratch folder, where score() finds weights, history and summary.

    Raises:
        Diverged: The loss or the gradients were no numbers.
    """
    from molf import checkpoint, collective, memory, models, resume, training
    from molf.batches import read_examples

    base, rows = MODELS / trial.model, PREPARED / trial.task / f"{params.trial_rows(trial.task)}.parquet"
    examples = read_examples(rows)
    if not len(examples):
        raise UserError(f"{rows} has no rows, which grid.tune needs: set tasks.{trial.task}.split or limits.validation")
    split = memory.split(budget, memory.parts_asked())
    parts = budget.micro_batches()[0] // split.micro_batches()[0]
    made = record(trial, params, budget)
    keeper = resume.Keeper(
        checkpoint.Checkpoints(
            CHECKPOINTS / trial.results,
            resume.identity(
                made["config"],
                made["data"][rows.name],
                made["model"]["hash"],
                made["code"],
                made["versions"],
                models.autocast(budget.dtype),
            ),
            params.checkpoint.keep,
        ),
        params.checkpoint.steps,
        params.checkpoint.minutes,
        made["hardware"]["fingerprint"],
    )
    folder, block = SCRATCH / trial.results, params.methods[trial.method].at_factor(trial.factor)
    with keeper.explaining(), memory.explained(base, block, budget, parts):
        outcome = training.train(
            base=base,
            examples_frame=examples,
            block=block,
            training=split,
            seed=TRIAL_SEED,
            weights=folder / "weights",
            scratch=TRAINER / trial.results,
            keeper=keeper,
        )
    if collective.rank() == 0:
        write_parquet(folder / "history.parquet", outcome.history)
        kept = ("steps", "train_seconds", "peak_memory_bytes", "examples", "final_loss", "warnings")
        write_json(folder / "summary.json", {key: outcome.summary[key] for key in kept})


def score(trial: Trial, params: Params, budget: Training, weights: Path) -> dict[str, Any]:
    """The primary score and the loss on validation rows.

    Raises:
        Diverged: The model's answers, or its loss, are no numbers.
    """
    import pandas as pd
    import torch

    from molf import cells, memory
    from molf.tasks import TASKS

    gc.collect()  # what the training held goes before the model is loaded anew
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows, scorer = pd.read_parquet(PREPARED / trial.task / SCORED_ON), TASKS[params.tasks[trial.task].kind]
    started = time.perf_counter()
    with memory.explained_by(lambda: f"lower evaluation.batch_size (now {params.evaluation.batch_size})"):
        cell = Cell(trial.model, trial.task, trial.method, TRIAL_SEED)
        lm = cells.load(cell, weights, params, progress=sys.stderr.isatty())
        scores = scorer.metrics(scorer.predict(lm, rows, params.evaluation))
        loss = validation_loss(lm, rows, budget)
    told = {key: scores[key] for key in ("primary_name", "n", "left_out")}
    return {"score": scores["primary"], **told, "loss": loss, "seconds": time.perf_counter() - started}


def validation_loss(lm: "LanguageModel", rows: "pd.DataFrame", budget: Training) -> float:
    """Mean negative log-likelihood of the completions' tokens, nats, as training counts them.

    Raises:
        Diverged: It is no number.
    """
    import torch

    from molf.batches import Collator, encode_examples
    from molf.encoding import IGNORED
    from molf.methods.sample import completion_loss

    examples = encode_examples(lm.tokenizer, rows, budget.max_length)
    order = sorted(examples.rows, key=lambda row: len(row["prompt"]) + len(row["completion"]))
    collate, size = Collator(lm.tokenizer.pad_token_id), budget.micro_batches()[0]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(order), size):
            batch = {name: value.to(lm.model.device) for name, value in collate(order[start : start + size]).items()}
            total += float(completion_loss(lm.model, batch, 1))
            tokens += int((batch["labels"] != IGNORED).sum())
    if not math.isfinite(total):
        raise Diverged(f"the loss on the validation rows is {total}")
    return total / tokens


def remove_leftovers(but: Trial | None = None) -> None:
    """Removes checkpoints of trials that are done; not at a trial's own end, until which DVC has no outputs of it."""
    for done in SWEEPS.glob("*/*/*/*/trial.json"):
        for folder in (CHECKPOINTS, TRAINER, SCRATCH):
            if but is None or done != but.record:
                shutil.rmtree(folder / done.parent, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main(run))
