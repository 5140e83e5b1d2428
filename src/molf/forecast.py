"""What the grid needs before it runs: memory, disk and time of each cell, and of all of them together."""

import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf import estimate, machine, sharding
from molf.batches import encode_examples, read_examples, total_steps
from molf.blocks import (
    GgufModel,
    HubModel,
    ModelBlock,
    PathModel,
    TinyModel,
)
from molf.config import Params, Training
from molf.errors import UserError
from molf.estimate import Memory, Shape
from molf.method_blocks import MethodBlock, MolfEfficientMethod, MolfMethod
from molf.methods import ADAPTERS, keeps_weights
from molf.models import folder_bytes
from molf.paths import CHECKPOINTS, MODELS, PREPARED, RESULTS, Cell, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BYTES_PER_CHOICE = 12  # of the routing's record, for each step, module and expert


@dataclass(frozen=True)
class Lengths:
    """Of a task's training examples, in tokens."""

    whole: list[int]
    completion: list[int]


@dataclass(frozen=True)
class StepTime:
    """What a few real steps told."""

    tokens_per_second: float
    start: float  # seconds before and after the steps: imports, loading, the first step's extra


@dataclass
class Need:
    """What one cell needs; None is not known."""

    cell: Cell
    memory: Memory | None = None
    process: int | None = None  # bytes of one process, its imports included unless it is a GPU's
    processes: int = 1
    sharding: str | None = None
    kept: int | None = None  # bytes on disk after the cell
    passing: int | None = None  # and beside them while it trains
    there: int = 0  # of `kept`, what lies on the disk already
    passing_there: int = 0  # of `passing`
    steps: int | None = None
    seconds: float | None = None  # of training
    trial_seconds: float | None = None  # of each training of its method's sweep


@dataclass
class Forecast:
    """All cells' needs, the machine's means, and what is not known and why."""

    needs: list[Need]
    imports: int  # bytes of a process before it trains
    base: int  # bytes of the base models
    memory_free: int | None
    disk_free: int
    cuda: bool
    trials: int = 0  # trainings of the sweeps, in the cells' memory
    evaluation: float | None = None  # seconds of all cells' evaluations, from earlier results
    unknown: list[str] = field(default_factory=list)
    run_first: list[str] = field(default_factory=list)


# --- pure ----------------------------------------------------------------------------------------------------------


def largest(training: Training, lengths: Lengths | None, answer: int) -> Shape:
    """The largest micro-batch of one process.

    Args:
        training: The budget.
        lengths: Of the examples, those over `max_length` left out; None: they are not known yet.
        answer: Tokens that an answer may have, which is what is assumed of the completions when nothing is known.
    """
    rows, _ = training.micro_batches()
    if lengths is None:
        return Shape(rows, training.max_length, min(answer, training.max_length - 1) + 2)
    return Shape(rows, max(lengths.whole), max(lengths.completion) + 1)


def duration(training: Training, lengths: Lengths, timed: StepTime) -> float:
    """Seconds of a cell's training."""
    per_step = statistics.fmean(lengths.whole) * training.batch_size * training.gradient_accumulation
    return timed.start + total_steps(training, len(lengths.whole)) * per_step / timed.tokens_per_second


def need(cell: Cell, params: Params, memory: Memory, lengths: Lengths | None, imports: int) -> Need:
    """What a cell needs, but for its time.

    Args:
        cell: Of the grid.
        params: All of params.yaml.
        memory: Of one process that trains it alone.
        lengths: Of its examples; None: not known yet.
        imports: Bytes of a process before it trains; 0 on a GPU.
    """
    training, block = params.training_for(cell.task), params.methods[cell.method]
    count, shared = training.processes, sharding.of(lambda: memory, block, training)
    steps = None if lengths is None else total_steps(training, len(lengths.whole))
    experts = 0
    if isinstance(block, MolfMethod | MolfEfficientMethod):
        experts = len(block.r) + (block.kind == "molf")  # the full weight is one where it is trained
    record = (steps or training.max_steps or 0) * memory.modules * experts * BYTES_PER_CHOICE
    keeps = keeps_weights(training.keep, block.kind)
    # While the newest is written the older ones are all there.
    checkpoints = (params.checkpoint.keep + 1) * memory.checkpoint
    return Need(
        cell,
        memory,
        imports + estimate.per_process(memory, count, shared),
        count,
        shared,
        kept=record + (memory.saved if keeps else 0),
        passing=checkpoints + (0 if keeps else memory.saved),
        steps=steps,
    )


def table(result: Forecast) -> str:
    """The forecast as text: a line a cell, totals, what is not known, what does not fit."""
    rows = [("cell", "memory", "disk", "time", "the largest parts, GB")]
    for each in result.needs:
        parts = {} if each.memory is None else each.memory.parts
        if not result.cuda and parts:
            parts = {"imports": result.imports, **parts}
        top = sorted(((size, part) for part, size in parts.items()), reverse=True)[:4]
        shown = ", ".join(f"{part} {size / 1e9:.2f}" for size, part in top)
        many = f" x {each.processes} ({each.sharding})" if each.processes > 1 else ""
        rows.append((each.cell.name, gigabytes(each.process) + many, gigabytes(each.kept), span(each.seconds), shown))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    numbers = totals(result)
    lines += [
        "",
        f"{len(result.needs)} cells one after another: {span(numbers['seconds'])} of training, "
        f"{span(result.evaluation)} of evaluation; {gigabytes(numbers['disk'])} on disk with the base models, "
        f"{gigabytes(numbers['passing'])} more while a cell trains; largest memory {gigabytes(numbers['memory'])}",
        *_of_sweeps(result, numbers),
        f"free here: {gigabytes(result.memory_free)} of {'GPU ' if result.cuda else ''}memory, "
        f"{gigabytes(result.disk_free)} of disk",
    ]
    return "\n".join([*lines, *(f"  WARNING: {text}" for text in misfits(result)), *notes(result)])


def _of_sweeps(result: Forecast, numbers: dict[str, Any]) -> list[str]:
    if not result.trials:
        return []
    return [f"before them the sweeps of grid.tune: {result.trials} trainings, {span(numbers['sweep_seconds'])}"]


def notes(result: Forecast) -> list[str]:
    """What is not known, and what to run to know it."""
    lines = [f"  not known: {text}" for text in result.unknown]
    if result.evaluation is None:
        lines.append("  not known: the time of the evaluations; the results of a first cell of each task tell it")
    if result.run_first:
        lines.append(f"  for what is not known, first: dvc repro {' '.join(result.run_first)}")
    return lines


def totals(result: Forecast) -> dict[str, Any]:
    """What all cells need together, in bytes and seconds; None is not known.

    memory: of the largest; disk: what all leave, with the base models; passing: beside it; to_write: of both what does
    not lie on the disk already; seconds; sweep_seconds of the sweeps' trainings.
    """
    needs = result.needs
    # Seeds share their method's sweep.
    of_methods = {(each.cell.model, each.cell.task, each.cell.method): each.trial_seconds for each in needs}
    factors, each_trial = result.trials // max(1, len(of_methods)), list(of_methods.values())
    memory = [each.process * each.processes for each in needs if each.process is not None]
    seconds = [each.seconds for each in needs]
    return {
        "memory": max(memory, default=None),
        "disk": result.base + sum(each.kept or 0 for each in needs),
        "passing": max((each.passing or 0 for each in needs), default=0),
        # The base models are counted once they are there.
        "to_write": sum(max(0, (each.kept or 0) - each.there) for each in needs)
        + max((max(0, (each.passing or 0) - each.passing_there) for each in needs), default=0),
        "seconds": None if None in seconds else sum(each for each in seconds if each is not None),
        "sweep_seconds": None
        if factors and None in each_trial
        else factors * sum(each for each in each_trial if each is not None),
    }


def misfits(result: Forecast) -> list[str]:
    """A sentence for each thing that this machine has too little for."""
    found = []
    for each in result.needs:
        # A GPU each; on the host all share one memory.
        wanted = None if each.process is None else each.process * (1 if result.cuda else each.processes)
        if wanted is not None and result.memory_free is not None and wanted > result.memory_free:
            found.append(
                f"{each.cell.name} needs {gigabytes(wanted)} of memory, {gigabytes(result.memory_free)} are free; "
                "lower training.batch_size and raise gradient_accumulation, or training.max_length"
            )
    wanted = totals(result)["to_write"]
    if wanted > result.disk_free:
        found.append(
            f"the grid has {gigabytes(wanted)} to write at most, {gigabytes(result.disk_free)} of disk are free; "
            "training.keep: adapter-only or none keeps less"
        )
    return found


def plain(result: Forecast) -> dict[str, Any]:
    """The forecast as plain data: bytes and seconds, None where unknown."""
    return {
        "cells": [
            {
                "cell": each.cell.name,
                "process_bytes": each.process,
                "processes": each.processes,
                "sharding": each.sharding,
                "disk_bytes": each.kept,
                "passing_disk_bytes": each.passing,
                "disk_bytes_there": each.there + each.passing_there,
                "steps": each.steps,
                "seconds": each.seconds,
                "trial_seconds": each.trial_seconds,
                "phases": None if each.memory is None else each.memory.phases,
            }
            for each in result.needs
        ],
        "totals": totals(result),
        "trials": result.trials,
        "evaluation_seconds": result.evaluation,
        "import_bytes": result.imports,
        "base_bytes": result.base,
        "memory_free_bytes": result.memory_free,
        "disk_free_bytes": result.disk_free,
        "unknown": result.unknown,
        "run_first": result.run_first,
        "warnings": misfits(result),
    }


def gigabytes(size: int | None) -> str:
    """`3.1 GB`, or `?`."""
    if size is None:
        return "?"
    return f"{size / 1e9:.2f} GB" if size < 10e9 else f"{size / 1e9:.0f} GB"


def span(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.4 h`, or `?`."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


# --- files and processes at the edge ---------------------------------------------------------------------------------


def forecast(params: Params, timed_steps: int | None, watch: Callable[[list[Any]], Iterable[Any]] = iter) -> Forecast:
    """Looks at params.yaml, at what is built already, and at this machine.

    Args:
        params: All of params.yaml.
        timed_steps: Optimizer steps to run for the time of each model, task and method; None times nothing.
        watch: Wraps the list of timed trainings, for a progress bar.
    """
    import torch

    _import_as_a_cell_does(params)
    cuda = torch.cuda.is_available()
    result = Forecast([], resident(), 0, machine.memory_free(), shutil.disk_usage(".").free, cuda, len(params.trials()))
    result.evaluation = evaluation_seconds(params)
    configs: dict[str, PretrainedConfig | None] = {}
    for name in params.grid.models:
        configs[name] = architecture(name, params.models[name])
        if configs[name] is None:
            result.unknown.append(f"model {name} is not here yet, so nothing of its cells is known")
        if not built(name):
            result.run_first.append(f"base@{name}")
        result.base += folder_bytes(MODELS / name) if built(name) else 0
    lengths = {
        (model, task): task_lengths(model, task, params.training_for(task).max_length)
        for model in params.grid.models
        for task in params.grid.tasks
    }
    result.run_first += [f"prepare@{task}" for task in params.grid.tasks if not prepared(task)]
    memories: dict[tuple[str, str, Training, Shape], Memory | None] = {}
    for cell in params.cells():
        config, budget, block = configs[cell.model], params.training_for(cell.task), params.methods[cell.method]
        if config is None:
            result.needs.append(Need(cell))
            continue
        answer = getattr(params.evaluation.max_new_tokens, params.tasks[cell.task].kind)
        shape = largest(budget, lengths[cell.model, cell.task], answer)
        key = (cell.model, cell.method, budget, shape)
        if key not in memories:
            memories[key] = _memory(config, block, budget, shape, cuda, cell, result.unknown)
        memory = memories[key]
        imports = 0 if cuda else result.imports
        known = lengths[cell.model, cell.task]
        each = Need(cell) if memory is None else need(cell, params, memory, known, imports)
        each.there = folder_bytes(cell.weights) + folder_bytes(cell.results / "train")
        each.passing_there = folder_bytes(CHECKPOINTS / cell.name)
        result.needs.append(each)
    if timed_steps is not None:
        _add_times(result, params, lengths, timed_steps, watch)
    return result


def _import_as_a_cell_does(params: Params) -> None:
    modules = ["molf.training", "molf.tracking", "accelerate"]
    modules += ["peft"] * any(params.methods[name].kind in ADAPTERS - {"molf-e"} for name in params.grid.methods)
    for module in modules:
        importlib.import_module(module)


def _memory(
    config: "PretrainedConfig",
    block: MethodBlock,
    training: Training,
    shape: Shape,
    cuda: bool,
    cell: Cell,
    unknown: list[str],
) -> Memory | None:
    stored = sum(path.stat().st_size for path in (MODELS / cell.model).glob("*.safetensors"))
    try:
        return estimate.cell_memory(config, block, training, shape, cuda=cuda, stored=stored)
    except UserError as error:
        _once(unknown, f"{cell.model}, {cell.method}: {error}")
        return None


def _add_times(
    result: Forecast,
    params: Params,
    lengths: dict[tuple[str, str], Lengths | None],
    steps: int,
    watch: Callable[[list[Any]], Iterable[Any]],
) -> None:
    """Times each model, task and method whose base and data are here and that fits this machine."""
    wanted: dict[tuple[str, str, str], list[Need]] = {}
    for each in result.needs:
        cell = each.cell
        if lengths[cell.model, cell.task] is None or each.process is None:
            continue
        if each.processes > 1:
            _once(result.unknown, "time with training.processes above 1 is not measured")
        elif result.memory_free is not None and each.process > result.memory_free:
            _once(result.unknown, f"{cell.model}/{cell.task}/{cell.method} does not fit this machine: not timed")
        else:
            wanted.setdefault((cell.model, cell.task, cell.method), []).append(each)
    for key in watch(list(wanted)):
        try:
            told = step_time(key, steps)
        except UserError as error:
            result.unknown.append(f"time of {'/'.join(key)}: {error}")
            continue
        model, task, _ = key
        budget, known, split = params.training_for(task), lengths[model, task], params.trial_rows(task)
        assert known is not None
        tried = known if split == "train" else task_lengths(model, task, budget.max_length, split)
        for each in wanted[key]:
            each.seconds = duration(budget, known, told)
            each.trial_seconds = duration(budget, tried, told) if tried and params.grid.tune else None


def _once(messages: list[str], message: str) -> None:
    if message not in messages:
        messages.append(message)


def built(model: str) -> bool:
    """Whether the `base` stage has made a model."""
    return (MODELS / model / "config.json").is_file()


def prepared(task: str) -> bool:
    """Whether the `prepare` stage has made a task's examples."""
    return (PREPARED / task / "train.parquet").is_file()


def architecture(name: str, block: ModelBlock) -> "PretrainedConfig | None":
    """The model's config: of its folder, of the one it comes from, or made from params.yaml; None: it is not here."""
    from transformers import AutoConfig

    match block:
        case TinyModel():
            from molf import tiny

            return tiny.architecture(block.layers, block.width, block.heads, block.vocabulary)
        case PathModel():
            folder = MODELS / name if built(name) else Path(block.path)
        case GgufModel() | HubModel():
            folder = MODELS / name
    if not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models.{name}: {folder}/config.json is none that transformers reads: {error}") from None


def task_lengths(model: str, task: str, max_length: int, split: str = "train") -> Lengths | None:
    """Of a split's examples under a model's tokenizer; None while one of the two is not made yet."""
    if not (built(model) and prepared(task)):
        return None
    from molf.models import load_tokenizer

    frame = read_examples(PREPARED / task / f"{split}.parquet")
    rows = encode_examples(load_tokenizer(MODELS / model), frame, max_length).rows
    return Lengths(
        [len(row["prompt"]) + len(row["completion"]) for row in rows], [len(row["completion"]) for row in rows]
    )


def resident() -> int:
    """Bytes of this process that lie in memory now; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    except (OSError, StopIteration):
        return 0


def evaluation_seconds(params: Params) -> float | None:
    """Seconds that all evaluations take together, by earlier ones of the same model and task; None if some has none."""
    total = 0.0
    for model in params.grid.models:
        for task in params.grid.tasks:
            files = (RESULTS / model / task).glob("*/*/evaluation/metrics.json")
            told = [read_json(file) for file in files]
            seconds = [float(metrics["seconds"] + metrics.get("damage_seconds", 0)) for metrics in told]
            if not seconds:
                return None
            cells = len(params.grid.methods) * len(params.grid.seeds) + 1  # the untrained model is one more
            total += cells * statistics.median(seconds)
    return total


def step_time(key: tuple[str, str, str], steps: int) -> StepTime:
    """Trains a few steps of a model, task and method in a process of their own.

    Raises:
        UserError: They failed; the last line of what they said.
    """
    with tempfile.TemporaryDirectory(prefix="molf-") as folder:
        file = Path(folder) / "time.json"
        command = [sys.executable, "-m", "molf.steptime", *key, str(steps), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}"))
        told = json.loads(file.read_text(encoding="utf-8"))
    return StepTime(told["tokens"] / told["seconds"], told["start"])
