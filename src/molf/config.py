"""What params.yaml may hold, checked before anything runs.

No field that shapes a result has a default, so that what a cell was made with stands in params.yaml, where DVC sees it
change. A method's options that came later have one, which means as before.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from molf.blocks import (
    Block,
    Count,
    Fraction,
    Gate,
    GeneralBlock,
    Grid,
    ModelBlock,
    Positive,
    Promotion,
    Seed,
    TaskBlock,
)
from molf.errors import UserError
from molf.method_blocks import MethodBlock
from molf.paths import BASE_METHOD, RATES, Cell, Trial, read_json
from molf.problems import credentials, cross_checks, sentence

if TYPE_CHECKING:
    from ruamel.yaml import YAML

PARAMS = Path("params.yaml")
SOURCES_LOCK = Path("sources.lock")
# A name becomes part of a folder, of a DVC stage and of a Prefect key: the intersection of what these allow.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
TRIAL_SEED = 0  # of every training of a sweep: the same start and order for each method and factor


class Training(Block):
    """The budget of a cell, alike for every method."""

    max_length: Annotated[int, Field(ge=8)]  # tokens; a longer example is dropped and counted
    batch_size: Count  # examples in one forward
    gradient_accumulation: Count  # forwards in one optimizer step
    epochs: Positive
    max_steps: Count | None  # optimizer steps; null lets `epochs` decide
    schedule: Literal["cosine", "linear", "constant"]
    warmup: Fraction  # share of the steps
    max_grad_norm: Positive
    # auto: float32 weights; on CUDA under bfloat16 autocast. bfloat16: nothing else, updates rounded stochastically.
    dtype: Literal["auto", "float32", "bfloat16"]
    moments: Literal["float32", "8bit"]  # precision of AdamW's moments; 8bit: blocks of 256 share a scale
    threads: Count | None  # CPU threads of each process of a cell; null shares out what torch finds
    processes: Count  # that train one cell together
    sharding: Literal["auto", "ddp", "fsdp"]  # auto: ddp where a process's memory holds the whole cell, else fsdp
    keep: Literal["all", "adapter-only", "none"]  # which weights stay after the evaluation

    @model_validator(mode="after")
    def _fits(self) -> "Training":
        if self.gradient_accumulation % self.processes and self.batch_size % self.processes:
            raise ValueError(
                f"processes is {self.processes}; it must divide gradient_accumulation ({self.gradient_accumulation}) "
                f"or batch_size ({self.batch_size}), so that a step sees the same examples as with one process"
            )
        if self.processes > 1 and self.sharding == "fsdp" and self.moments == "8bit":
            raise ValueError("moments: 8bit has blocks that cannot be sharded; use sharding: ddp or moments: float32")
        return self

    def micro_batches(self) -> tuple[int, int]:
        """Rows of one process's micro-batch, and how many of them make its share of an optimizer step."""
        if self.gradient_accumulation % self.processes == 0:
            return self.batch_size, self.gradient_accumulation // self.processes
        return self.batch_size // self.processes, self.gradient_accumulation


class Checkpoint(Block):
    """How a training is kept from loss; changes no result, so a change here re-runs nothing."""

    minutes: Positive | None  # at most so long between two checkpoints
    steps: Count | None  # likewise in optimizer steps; both null: one only when a training is interrupted
    keep: Count  # the newest so many stay


class NewTokens(Block):
    """For each kind of task, how many tokens an answer may have."""

    sql: Count
    med: Count
    fact: Count
    completion: Count
    choice: Count


class WeightChange(Block):
    """How intruder dimensions are counted (Shuttleworth et al. 2024, arXiv 2410.21228)."""

    top: Count  # singular vectors of each trained weight that are looked at, the largest first
    # Best cosine with the base weight's singular vectors below which a vector is an intruder.
    threshold: Annotated[float, Field(gt=0, le=1)]


class Evaluation(Block):
    batch_size: Count
    max_new_tokens: NewTokens
    weights: WeightChange | None  # null: how the weights moved is not measured


class Compare(Block):
    margin: Fraction  # what counts as not worse, absolute
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    bootstrap: Annotated[int, Field(ge=100)]  # resamples
    seed: Seed


class Tracking(Block):
    experiment: str  # name of the MLflow experiment


class Flow(Block):
    """How a flow runs the grid's cells; changes no result, so a change here re-runs nothing."""

    cpu_slots: Count = 1  # cells that run side by side on a machine without GPUs; with GPUs it is one cell a GPU
    retries: Annotated[int, Field(ge=0)] = (
        2  # of a stage that was killed or ran out of memory; other failures are final
    )
    keep_runs: Count = 5  # worktrees of ended runs that stay, the newest ones; their branches stay in any case
    pool: str | None = None  # Prefect's work pool whose workers run the cells; None: this machine does
    lost_after: Annotated[int, Field(ge=20)] = (
        180  # s without a sign of life from a cell in a pool, after which it is given out again; a sixth between signs
    )


class Params(Block):
    grid: Grid
    models: dict[str, ModelBlock]
    tasks: dict[str, TaskBlock]
    methods: dict[str, MethodBlock]
    general: GeneralBlock
    training: Training
    checkpoint: Checkpoint
    evaluation: Evaluation
    compare: Compare
    promotion: Promotion = Promotion()
    tracking: Tracking
    flow: Flow = Flow()  # a params.yaml of an earlier molf has none

    @field_validator("models", "tasks", "methods")
    @classmethod
    def _names(cls, blocks: dict[str, Any]) -> dict[str, Any]:
        bad = [name for name in blocks if not NAME.fullmatch(name)]
        if bad:
            raise ValueError(f"{', '.join(map(repr, bad))}: names are lower-case letters, digits, '-' and '_'")
        if BASE_METHOD in blocks:
            raise ValueError(f"{BASE_METHOD!r} is taken: it names the untrained model in every table")
        return blocks

    def training_for(self, task: str) -> Training:
        """`training` with the task's overrides."""
        return Training.model_validate({**self.training.model_dump(), **self.tasks[task].training})

    def cells(self) -> list[Cell]:
        """The grid's cells, in the order of its lists."""
        return [
            Cell(model, task, method, seed)
            for model in self.grid.models
            for task in self.grid.tasks
            for method in self.grid.methods
            for seed in self.grid.seeds
        ]

    def trial_rows(self, task: str) -> str:
        """The split that a sweep's trainings see: of facts, which are scored on those trained, others than a cell's."""
        return "validation" if self.tasks[task].kind == "fact" else "train"

    def trials(self) -> list[Trial]:
        """The trainings of the grid's sweeps, in the order of its lists; none where `grid.tune` is empty."""
        return [
            Trial(model, task, method, factor)
            for model in self.grid.models
            for task in self.grid.tasks
            for method in self.grid.methods
            for factor in self.grid.tune
        ]


def load_params(path: str | Path = PARAMS) -> Params:
    """Reads and checks params.yaml.

    Raises:
        UserError: Every problem found, each with its key and the file.
    """
    return check_params(read_yaml(Path(path)), str(path))


def read_yaml(path: Path) -> Any:
    """A YAML file's content as plain types, read by the same YAML 1.2 rules as DVC's.

    Raises:
        UserError: The file lacks or does not parse.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run this in the project's root folder") from None
    except MarkedYAMLError as error:  # its own text names no file, shows no line and advises to allow doubled keys
        problem, mark = str(error.problem), error.problem_mark
        if isinstance(error, DuplicateKeyError):
            problem = f"the key {problem.split(chr(34))[1]} stands a second time in one block; keep one of them"
        else:
            problem += "; look at the indent and the brackets there and above"
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{path} is not valid YAML, {where}: {problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def editor() -> "YAML":
    """Reads and writes a YAML file as people wrote it: comments and order stay, null is written out."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def check_params(raw: Any, file: str) -> Params:
    """Checks plain data against the types above and the grid against the blocks.

    Raises:
        UserError: Every problem found, each with its key and `file`.
    """
    problems: list[str] = []
    params = None
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        problems += [f"{file}: {sentence(problem)}" for problem in error.errors()]
    problems += [f"{file}: {problem}" for problem in credentials(raw)]
    if isinstance(raw, dict):
        problems += [f"{file}: {problem}" for problem in cross_checks(raw, Grid.model_fields, Training, Gate)]
    if params is not None and not problems:
        problems += [f"{file}: {problem}" for problem in _unshared(params)]
    if problems or params is None:
        raise UserError(problems)
    return params


def _unshared(params: Params) -> Iterator[str]:
    """Methods of the grid of which several processes cannot share a cell in the way that `training` asks for."""
    for name, task in product(params.grid.methods, params.grid.tasks):
        budget, unfit = params.training_for(task), params.methods[name].unfit()
        way: Literal["ddp", "fsdp"] = "fsdp" if budget.sharding == "fsdp" else "ddp"  # auto falls back to ddp
        if budget.processes > 1 and way in unfit:
            other = "ddp" if way == "fsdp" and "ddp" not in unfit else None
            yield (
                f"methods.{name}: {budget.processes} processes cannot train {task} with it under {way}: {unfit[way]}; "
                f"set training.{f'sharding to {other}, or training.' if other else ''}processes to 1"
            )


def chosen_factor(params: Params, cell: Cell, root: Path = Path()) -> float:
    """By what a cell's learning rates are multiplied: what its sweep chose; 1 where there is none.

    Args:
        params: Their grid says whether there is a sweep.
        cell: Of the grid; any other has no sweep.
        root: Project folder, with results/rates.json.

    Raises:
        UserError: The sweep has not run, or chose nothing.
    """
    grid = params.grid
    if not grid.tune or any(
        (cell.model not in grid.models, cell.task not in grid.tasks, cell.method not in grid.methods)
    ):
        return 1.0
    key = (cell.model, cell.task, cell.method)
    try:
        found = read_json(root / RATES)
        factor = found["chosen"][cell.model][cell.task][cell.method]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{RATES} has no learning rate for {'/'.join(key)}, and grid.tune asks for a sweep: `dvc repro choose` "
            "runs it, `dvc pull choose` brings a teammate's"
        ) from None
    if factor is None:
        why = next(of["why"] for of in found["sweeps"] if (of["model"], of["task"], of["method"]) == key)
        raise UserError(f"{'/'.join(key)}: its sweep chose no learning rate: {why}")
    return float(factor)


def method_block(params: Params, cell: Cell, root: Path = Path()) -> MethodBlock:
    """A cell's method with the learning rates that it is trained at.

    Raises:
        UserError: As `chosen_factor`.
    """
    return params.methods[cell.method].at_factor(chosen_factor(params, cell, root))


def cell_config(params: Params, cell: Cell, root: Path = Path()) -> dict[str, Any]:
    """What params.yaml, and a sweep, say of a cell's training, as plain data, kept in its `run.json`.

    Just what DVC watches for the `train` stage. Data and model enter a fingerprint by their hashes instead, since
    another block may well make the same bytes.

    Args:
        params: All of params.yaml.
        cell: One of its grid.
        root: Project folder, where the sweeps' choices lie.

    Raises:
        UserError: As `chosen_factor`.
    """
    return _config(params, method_block(params, cell, root), cell.task, cell.seed)


def trial_config(params: Params, trial: Trial) -> dict[str, Any]:
    """What params.yaml says of a sweep's training, as `cell_config` of a cell's."""
    return _config(params, params.methods[trial.method].at_factor(trial.factor), trial.task, TRIAL_SEED)


def _config(params: Params, block: MethodBlock, task: str, seed: int) -> dict[str, Any]:
    training = params.training_for(task)
    return {"method": block.model_dump(mode="json"), "training": training.model_dump(mode="json"), "seed": seed}


def fingerprint(*parts: Any) -> str:
    """Hash of plain data: 16 hexadecimal digits that change with any of it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def untrained_fingerprint(model_hash: str) -> str:
    """What stands for a training's fingerprint where there was none: the base model as it came."""
    return fingerprint("untrained", model_hash)


def evaluation_fingerprint(metrics: Mapping[str, Any]) -> str:
    """What an evaluation's numbers depend on, as one hash.

    Args:
        metrics: What evaluation/metrics.json holds, this fingerprint aside.
    """
    asked = metrics["general"]["hash"] if metrics.get("general") else None
    parts = ("train_fingerprint", "data_hash", "evaluation", "code")
    return fingerprint(*(metrics[part] for part in parts), asked)
