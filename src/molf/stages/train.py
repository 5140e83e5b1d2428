"""`python -m molf.stages.train MODEL TASK METHOD SEED`: trains one cell of the grid."""

import contextlib
import shutil
import sys
from datetime import UTC, datetime
from typing import Any

from molf.config import Params, Training, cell_config, fingerprint, load_params, method_block
from molf.errors import main
from molf.paths import (
    CHECKPOINTS,
    MODELS,
    PREPARED,
    TRAINER,
    UNKEPT,
    Cell,
    file_hash,
    read_json,
    write_json,
    write_parquet,
)


def run() -> None:
    model_name, task, method, seed = sys.argv[1:]
    cell = Cell(model_name, task, method, int(seed))
    params = load_params()
    budget = params.training_for(cell.task)

    from molf import processes

    if budget.processes > 1 and not processes.started():
        processes.launch("molf.stages.train", sys.argv[1:], budget.processes, budget.threads)
        return
    with processes.joined():
        train_cell(cell, params, budget)


def train_cell(cell: Cell, params: Params, budget: Training) -> None:
    """Trains it; of several processes the first alone writes results, logs and speaks."""
    from molf import models

    models.quiet()  # before the libraries that it quiets are imported
    from molf import (
        checkpoint,
        closure,
        collective,
        machine,
        memory,
        methods,
        notes,
        resume,
        tracking,
        training,
    )
    from molf.batches import read_examples

    base = MODELS / cell.model
    prepared = PREPARED / cell.task
    data = read_json(prepared / "summary.json")
    config, split = cell_config(params, cell), memory.split(budget, memory.parts_asked())
    rows = budget.micro_batches()[0]
    parts = rows // split.micro_batches()[0]
    model, own = models.describe(base), closure.of_method(params.methods[cell.method].kind)
    code = closure.code_hash("molf.stages.train", own)
    versions = machine.versions(budget.moments, getattr(params.methods[cell.method], "base_bits", None))
    record: dict[str, Any] = {
        "cell": {"model": cell.model, "task": cell.task, "method": cell.method, "seed": cell.seed},
        "fingerprint": fingerprint(config, data["data_hash"], model["hash"], code, versions),
        "config": config,
        "data": notes.data_record(data, params.tasks[cell.task].license),
        "model": model,
        "code": code,
        "shared_code": closure.code_hash("molf.stages.train"),  # of all methods alike
        "git_commit": machine.git_commit(),
        "versions": versions,
        "hardware": machine.hardware(budget.threads, budget.processes, parts, collective.hosts()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "generated_data": data["generated"],
    }
    keeper = resume.Keeper(
        checkpoint.Checkpoints(
            CHECKPOINTS / cell.name,
            resume.identity(config, data["data_hash"], model["hash"], code, versions, models.autocast(budget.dtype)),
            params.checkpoint.keep,
        ),
        params.checkpoint.steps,
        params.checkpoint.minutes,
        record["hardware"]["fingerprint"],
    )
    first = collective.rank() == 0
    results, weights = cell.results / "train", cell.weights
    block, trained_on = method_block(params, cell), file_hash(prepared / "train.parquet")
    kept = methods.keeps_weights(budget.keep, block.kind)
    target = weights if kept else UNKEPT / cell.name
    for directory in (results, weights, target) if first else ():
        shutil.rmtree(directory, ignore_errors=True)
    live_run = tracking.live_run(record, params.tracking.experiment) if first else contextlib.nullcontext()
    with live_run as live, keeper.explaining(), memory.explained(base, block, budget, parts):
        outcome = training.train(
            base=base,
            examples_frame=read_examples(prepared / "train.parquet"),
            block=block,
            training=split,
            seed=cell.seed,
            weights=target,
            scratch=TRAINER / cell.name,
            listener=live,
            keeper=keeper,
        )
        if live is None:
            return
        if not kept:
            write_json(weights / models.ELSEWHERE, {"path": str(target), "hash": models.folder_hash(target)})
        if len(keeper.hardware) > 1:  # whose cost is like no other cell's
            record["hardware"]["fingerprint"] = fingerprint(record["fingerprint"], keeper.hardware)
        write_parquet(results / "history.parquet", outcome.history)
        if outcome.routing is not None:
            write_parquet(results / "routing.parquet", outcome.routing)
        summary = {
            "cell": cell.name,
            "fingerprint": record["fingerprint"],
            **outcome.summary,
            "micro_batches": parts,
            "warnings": [
                *outcome.summary["warnings"],
                *([_split(rows, parts, memory.MICRO_BATCHES)] if parts > 1 else []),
            ],
            "lineage": notes.of_training(record, target, kept, trained_on, results, live.run_id),
        }
        write_json(results / "summary.json", summary)
        write_json(results / "run.json", record)
        live.finish(cell.results)
    print(
        f"{cell.name}: {summary['steps']} steps in {summary['train_seconds']:.0f} s, loss {summary['final_loss']:.3f}, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, peak {summary['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if summary["routing"]:
        decided_by, share = summary["routing"]["decided_by"], summary["routing"]["share"]
        print(
            "  routing: "
            + ", ".join(f"{name} {part:.0%}" for name, part in share.items())
            + (f" (a control, winners: {decided_by})" if decided_by != "scores" else "")
        )
    if summary["energy_joules"]:
        print(f"  energy {summary['energy_joules'] / 1000:,.1f} kJ, {summary['energy_source']}")
    if summary["contended"]:
        load = f"{summary['other_load'] or 0:.1f} cores"
        print(f"  other processes computed meanwhile ({load}): its time and energy compare with no other cell's")
    if summary["resumed_at_steps"]:
        print(f"  resumed after steps {', '.join(map(str, summary['resumed_at_steps']))}")
    for warning in summary["warnings"]:
        print(f"  WARNING: {warning}")


def _split(rows: int, parts: int, name: str) -> str:
    return (
        f"each batch of {rows} rows was taken as {parts} of {rows // parts} ({name}): the same steps but for "
        "rounding and dropout; time and memory compare with no cell's that was not"
    )


if __name__ == "__main__":
    raise SystemExit(main(run))
