"""A look at a task's gradients before any training, in minutes: which method will win, and which rank suffices.

`spectra` and `rule` are the mathematics, `gradients` and `choices` what a model is asked, `page` what is shown, `hits`
how often the forecasts were right.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from molf.config import Params
from molf.errors import UserError
from molf.paths import MODELS, PREPARED, REPORTS, read_json, write_json

FOLDER = REPORTS / "probe"
BATCHES = 32
STEPS = 4

Watch = Callable[[Sequence[Any], str], Iterable[Any]]


def unwatched(items: Sequence[Any], words: str) -> Iterable[Any]:
    """No progress bar."""
    return items


def chosen(params: Params, model: str | None, task: str | None) -> list[tuple[str, str]]:
    """The grid's pairs of model and task that are asked for, all of them there.

    Raises:
        UserError: One is not in the grid, or the stages before it have not run; with the command that runs them.
    """
    from molf.forecast import built, prepared

    grid = params.grid
    wrong = [
        f"--{axis} {given}: the grid has {', '.join(there)}"
        for axis, given, there in (("model", model, grid.models), ("task", task, grid.tasks))
        if given is not None and given not in there
    ]
    if wrong:
        raise UserError(wrong)
    models, tasks = [model] if model else grid.models, [task] if task else grid.tasks
    lacking = [f"base@{name}" for name in models if not built(name)]
    lacking += [f"prepare@{name}" for name in tasks if not prepared(name)]
    if lacking:
        raise UserError(
            f"the probe asks a base model about prepared rows, and {', '.join(lacking)} did not run yet; type: "
            f"dvc repro {' '.join(lacking)} && molf probe"
        )
    return [(name, of) for name in models for of in tasks]


def probe(
    params: Params,
    model_name: str,
    task: str,
    batches: int = BATCHES,
    steps: int = STEPS,
    every: int = 1,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Probes one model and task, and writes reports/probe/MODEL/TASK.json and a heat map beside it.

    Args:
        params: All of params.yaml; the methods of its grid are forecast.
        model_name: Of the grid.
        task: Likewise.
        batches: Micro-batches whose gradients are summed; fewer where the task has fewer.
        steps: Optimizer steps whose routing is looked at; 0: none.
        every: Of the model's layers each so many-th is looked at.
        watch: Wraps what takes long, for progress bars.

    Returns:
        What the file holds.

    Raises:
        UserError: Too few rows, or a method does not fit the model.
    """
    import torch

    from molf.batches import Collator, SeededBatches, SeededOrder, encode_examples, read_examples, total_steps
    from molf.methods import METHODS
    from molf.methods.sample import Sample
    from molf.models import describe, load_model, load_tokenizer, to_device
    from molf.probe import gradients, page, rule
    from molf.probe.choices import first_choices
    from molf.report.style import save

    started = time.perf_counter()
    base, prepared, training = MODELS / model_name, PREPARED / task, params.training_for(task)
    blocks = {name: params.methods[name] for name in params.grid.methods}
    tokenizer = load_tokenizer(base)
    examples = encode_examples(tokenizer, read_examples(prepared / "train.parquet"), training.max_length)
    rows = min(training.batch_size, len(examples) // gradients.FOLDS)
    if not rows:
        raise UserError(f"{task} has {len(examples)} rows to train on; the probe needs {gradients.FOLDS} at least")
    seed, pad = params.grid.seeds[0], int(tokenizer.pad_token_id)
    # Whole batches of the first epoch, as many in each fold.
    whole = min(batches, len(examples) // rows) // gradients.FOLDS * gradients.FOLDS
    seen = min(
        len(examples), total_steps(training, len(examples)) * training.batch_size * training.gradient_accumulation
    )
    share = min(1.0, whole * rows / 2 / seen)
    excluded = sorted({name for block in blocks.values() for name in getattr(block, "exclude_modules", [])})
    model = load_model(base, torch.float32)
    to_device(model, training.threads)
    model.eval()
    try:
        modules = gradients.targets(model, excluded, every)
    except ValueError as error:
        raise UserError(f"{model_name}: {error}") from None
    order = SeededBatches(SeededOrder(len(examples), seed), rows)
    looked = Sample(order, examples.rows, Collator(pad), model, 1).batches(whole)
    sums = gradients.measure(model, modules, looked, watch=lambda items: watch(items, "gradients"))
    del model
    ranks = rule.ranks_of(blocks)
    told = [gradients.look(sums, name, ranks, share) for name in watch(list(modules), "singular values")]
    del sums, modules
    choices: dict[str, Any] = {}
    routed = [name for name, block in blocks.items() if METHODS[block.kind].routed(block)] if steps else []
    for name in watch(routed, "first steps"):
        try:
            choices[name] = first_choices(base, blocks[name], training, examples, pad, seed, steps)
        except ValueError as error:
            raise UserError(f"method {name} does not fit {model_name}: {error}") from None
    by_module = {name: of["share_by_module"] for name, of in choices.items()}
    forecast = rule.forecast({of.module: of.errors for of in told}, blocks, by_module, params.compare.margin)
    forecast["sentence"] = rule.sentence(forecast)
    found = {
        "model": model_name,
        "task": task,
        "seed": seed,
        "batches": whole,
        "rows": whole * rows,
        "training_rows": seen,
        "every": every,
        "ranks": ranks,
        "data_hash": read_json(prepared / "summary.json")["data_hash"],
        "model_hash": describe(base)["hash"],
        "methods": {name: block.model_dump(mode="json") for name, block in blocks.items()},
        "modules": [_plain(of, ranks) for of in told],
        "errors": _curve(rule.summed([of.errors for of in told])),
        "choices": choices,
        "forecast": forecast,
        "seconds": time.perf_counter() - started,
    }
    write_json(path(model_name, task), found)
    save(page.heat_map(found), path(model_name, task).with_suffix(".png"))
    return read_json(path(model_name, task))  # type: ignore[no-any-return]


def path(model: str, task: str) -> Path:
    """The probe's file."""
    return FOLDER / model / f"{task}.json"


def _plain(of: Any, ranks: Sequence[int]) -> dict[str, Any]:
    """A module's numbers as plain data; its errors at the grid's ranks and the full one."""
    from molf.probe.rule import best_rank

    mean = of.errors.mean(dim=0)
    last = len(mean) - 1
    return {
        "module": of.module,
        "type": of.type,
        "layer": of.layer,
        "shape": list(of.shape),
        "effective_rank": of.effective_rank,
        "stable_rank": of.stable_rank,
        "energy": {str(rank): x for rank, x in of.energy.items()},
        "step_effective_rank": of.step_effective_rank,
        "step_energy": {str(rank): x for rank, x in of.step_energy.items()},
        "noise_share": of.noise_share,
        "signal": float(mean[0]),
        "error": {str(rank): float(mean[min(rank, last)]) for rank in ranks} | {"full": float(mean[last])},
        "best_rank": best_rank(of.errors),
    }


def _curve(errors: Any) -> dict[str, list[float]]:
    """The error of all modules together at ranks 0, 1, 2, 4 ... and the full one, mean over the halvings."""
    mean = errors.mean(dim=0)
    last = len(mean) - 1
    ranks = [0, *(2**i for i in range(last.bit_length()) if 2**i < last), last]
    return {"rank": ranks, "error": [float(mean[rank]) for rank in ranks]}
