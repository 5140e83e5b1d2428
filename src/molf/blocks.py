"""The blocks that params.yaml may hold below `grid`, `models`, `tasks`, `general` and `promotion`."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

SHA = re.compile(r"[0-9a-f]{40}")

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Block(BaseModel):
    """A mapping in params.yaml: an unknown key is a mistake, and text is never taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _factor(value: Any) -> Any:
    """As it was written: 1 and 1.0 are one number, but two names of stages and folders."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-4 <= value <= 1e4:
        raise ValueError(f"{value!r} is no factor of a learning rate; allowed: numbers from 0.0001 to 10000")
    return value


Factor = Annotated[float, PlainValidator(_factor)]


# --- grid ----------------------------------------------------------------------------------------------------------


class Grid(Block):
    """Every combination of these is one cell; each name must have a block below the section of the same name."""

    models: Annotated[list[str], Field(min_length=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    # Of every method's learning rates, alike for all; the best on validation rows is taken. Empty: rates as they stand.
    tune: list[Factor]

    @model_validator(mode="after")
    def _no_repeats(self) -> "Grid":
        for axis, values in self:
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"{axis} repeats {', '.join(repeated)}; each may stand once")
        if len(self.tune) == 1:
            raise ValueError(
                f"tune holds {self.tune[0]} alone, which leaves nothing to choose; write two factors or more, such as "
                "[0.3, 1.0, 3.0], or [] for rates as they stand in the methods' blocks"
            )
        return self


# --- models --------------------------------------------------------------------------------------------------------


class ModelBase(Block):
    """What every model block may hold."""

    license: str = "unknown"  # of the weights, in the hub's spelling; shapes no result, but stands in every card


class TinyModel(ModelBase):
    """A model that the `base` stage builds and pretrains on generated text."""

    kind: Literal["tiny"]
    path: str  # the builder, which DVC watches
    seed: Seed
    layers: Count
    width: Count
    heads: Count
    vocabulary: Annotated[int, Field(ge=300)]  # tokens, the 256 bytes included
    steps: Count  # pretraining steps

    @model_validator(mode="after")
    def _heads_fit(self) -> "TinyModel":
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}, heads is {self.heads}: a head's width must be whole and even")
        if self.heads > 1 and self.heads % 2:
            raise ValueError(f"heads is {self.heads}; allowed: 1 or an even number (two share their keys and values)")
        return self


class PathModel(ModelBase):
    """A folder in the format of transformers: config.json, *.safetensors, tokenizer files."""

    kind: Literal["path"]
    path: str


class GgufModel(ModelBase):
    """A GGUF file, from a local path or from an installed package that assembles it."""

    kind: Literal["gguf"]
    path: str  # the .gguf file; with `package`, sources.lock, which holds the file's sha256
    package: str | None = None  # import name of the package that carries the file


class HubModel(ModelBase):
    """A model on the Hugging Face hub; a revision that is not a commit is pinned in sources.lock by `molf pin`."""

    kind: Literal["hub"]
    path: Literal["sources.lock"]
    id: str
    revision: str


ModelBlock = Annotated[TinyModel | PathModel | GgufModel | HubModel, Field(discriminator="kind")]


# --- tasks ---------------------------------------------------------------------------------------------------------

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
Names = str | Annotated[list[str], Field(min_length=1)]


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


class GeneratedSource(Block):
    """Rows made by the built-in generator."""

    kind: Literal["generated"]
    path: str  # the generator, which DVC watches
    seed: Seed
    rows: dict[Split, Count]


class FileSource(Block):
    """A local file, or a folder with a file for each split."""

    kind: Literal["file"]
    path: str  # file or folder, relative to the project's root; DVC watches all of it
    files: dict[Split, Names] = {}  # file names in the folder; empty when `path` is the one file

    def locations(self) -> dict[str, list[str]]:
        """Where each given split lies: {split: paths}."""
        if not self.files:
            return {"train": [self.path]}
        return {split: [str(Path(self.path) / name) for name in _listed(names)] for split, names in self.files.items()}


class UrlSource(Block):
    """Files behind any URL that fsspec reads; their sha256 are pinned in sources.lock by `molf pin`."""

    kind: Literal["url"]
    path: Literal["sources.lock"]
    files: Annotated[dict[Split, Names], Field(min_length=1)]

    def locations(self) -> dict[str, list[str]]:
        """Where each given split lies: {split: URLs}."""
        return {split: _listed(urls) for split, urls in self.files.items()}


class HubSource(Block):
    """A data set on the Hugging Face hub; a revision that is not a commit is pinned in sources.lock by `molf pin`."""

    kind: Literal["hub"]
    path: Literal["sources.lock"]
    id: str
    revision: str
    config: str | None = None
    splits: Annotated[dict[Split, str], Field(min_length=1)]  # our split -> the data set's split


Source = Annotated[GeneratedSource | FileSource | UrlSource | HubSource, Field(discriminator="kind")]


class SplitRule(Block):
    """How splits are cut off the train rows where the source has none of them; all draws follow the seed."""

    validation: Fraction  # share of the rows; a limit of that split goes before it
    test: Fraction
    seed: Seed
    group: str | None  # column whose equal values stay on one side, such as the author or the document; null: none


class Duplicates(Block):
    """What counts as a copy, and what happens to one that stands in two splits."""

    # Shared part of the 5-character pieces from which two rows are near copies; null: only equal rows are copies.
    similarity: Annotated[float, Field(ge=0.5, lt=1)] | None
    across: Literal["fail", "drop", "keep"]  # drop: the copy leaves train for validation's sake, both for test's


class Limits(Block):
    """The most rows that a split keeps, drawn by `split.seed`; null keeps all."""

    train: Count | None
    validation: Count | None
    test: Count | None


class NoOptions(Block):
    """A task without options of its own."""


class SqlOptions(Block):
    databases: str | None = None  # folder or .tar.gz with DB/DB.sqlite, for Spider rows
    must_run: bool  # whether a row is rejected whose query SQLite cannot parse or run, or kept and only counted


class MedOptions(Block):
    first_option: Literal[0, 1]  # how `cop` counts: MedMCQA's files from 1, the hub's copy from 0


class CompletionOptions(Block):
    """Columns of a prompt and its answer, or of a conversation.

    `prompt` and `completion` each name a column, or are a template such as `Translate: {source}` over columns. A name
    may be a path into a column of objects or lists, such as `answers.text.0`.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None  # column with a list of {role, content}; instead of the two above

    @model_validator(mode="after")
    def _one_form(self) -> "CompletionOptions":
        pair = (self.prompt is not None, self.completion is not None)
        if not (all(pair) and self.messages is None or not any(pair) and self.messages is not None):
            raise ValueError("name prompt and completion, or messages alone")
        return self


class ChoiceOptions(Block):
    """Columns of a question, its options and the right one, or paths into columns, such as `choices.text`."""

    question: str  # a column, or a template over columns
    options: str | Annotated[list[str], Field(min_length=2, max_length=26)]  # one column with lists, or a column each
    answer: str  # a column
    answer_is: Literal["letter", "index0", "index1", "text"]  # A, B, ...; counted from 0 or 1; the option itself
    subject: str | None = None  # a column by which accuracy is also told apart


class TaskBase(Block):
    source: Source
    license: str  # of the data, in the hub's spelling, such as apache-2.0; or unknown
    limits: Limits
    split: SplitRule
    duplicates: Duplicates
    max_rejected: Fraction  # share of raw rows that may be bad before `prepare` fails
    training: dict[str, Any]  # overrides of `training` for this task, alike for every method


class SqlTask(TaskBase):
    kind: Literal["sql"]
    options: SqlOptions


class MedTask(TaskBase):
    kind: Literal["med"]
    options: MedOptions


class FactTask(TaskBase):
    kind: Literal["fact"]
    options: NoOptions


class CompletionTask(TaskBase):
    kind: Literal["completion"]
    options: CompletionOptions


class ChoiceTask(TaskBase):
    kind: Literal["choice"]
    options: ChoiceOptions


TaskBlock = Annotated[SqlTask | MedTask | FactTask | CompletionTask | ChoiceTask, Field(discriminator="kind")]


# --- general -------------------------------------------------------------------------------------------------------


class GeneralBase(Block):
    """Held-out text that is no task's: how much worse a model predicts it after training is what it forgot."""

    license: str = "unknown"  # of the text, in the hub's spelling; shapes no result
    rows: Count | None  # most texts that are asked, from the first on; null: all
    max_length: Annotated[int, Field(ge=8)]  # tokens; of a longer text the beginning counts


class GeneratedText(GeneralBase):
    """Text made by the built-in generator."""

    kind: Literal["generated"]
    path: str  # the generator, which DVC watches
    seed: Seed
    rows: Count


class FileText(GeneralBase):
    """A local file: plain text, whose paragraphs are the texts, or a table with a column of texts."""

    kind: Literal["file"]
    path: str  # .txt, or JSONL, JSON, CSV, TSV, Parquet; relative to the project's root
    column: str | None  # null: plain text

    @model_validator(mode="after")
    def _column_fits(self) -> "FileText":
        plain = self.path.lower().endswith(".txt")
        if plain and self.column is not None:
            raise ValueError(f"column is {self.column!r}, but {self.path} is plain text; write column: null")
        if not plain and self.column is None:
            raise ValueError(f"column is null; name the column of {self.path} that holds the texts (a .txt has none)")
        return self


class HubText(GeneralBase):
    """A split of a data set on the Hugging Face hub; pinned as a task's is."""

    kind: Literal["hub"]
    path: Literal["sources.lock"]
    id: str
    revision: str
    config: str | None
    split: str  # the data set's own name of it
    column: str


class NoText(Block):
    """Nothing is asked: what a training forgot is not measured."""

    kind: Literal["none"]
    path: Literal["sources.lock"]  # DVC wants a file to watch for every kind


GeneralBlock = Annotated[GeneratedText | FileText | HubText | NoText, Field(discriminator="kind")]


# --- promotion -----------------------------------------------------------------------------------------------------


class Gain(Block):
    """What a model must be better than, in points of the primary score; null asks for nothing."""

    untrained: Fraction | None = 0.0  # the lower bound of the gain over the untrained model must reach it
    champion: Fraction = 0.0  # the model's own score must exceed the champion's, and by at least so much


class CostLimits(Block):
    """The most that a method may cost; null: no limit."""

    peak_memory_gb: Positive | None = None  # of any of its seeds, 1 GB = 10^9 bytes
    train_seconds: Positive | None = None  # mean over seeds
    weights_gb: Positive | None = None  # of the whole weights, or of an adapter alone


class Gate(Block):
    """What a method must show before a model of it may become its task's champion."""

    # Non-inferiority to every other method of its model, at compare.margin.
    verdict: Literal["holds", "not-fails", "any"] = "not-fails"
    score: Fraction | None = None  # the lower bound of the primary score's interval must reach it; null: any
    gain: Gain = Gain()
    cost: CostLimits = CostLimits()
    # The upper bound of the rise of the loss on the general text, nats per token, may not exceed it; null: no limit.
    forgetting: NotNegative | None = None


class Promotion(Gate):
    """When a model becomes its task's champion (docs/promotion.md); shapes no result, so a change re-runs nothing."""

    tasks: dict[str, dict[str, Any]] = {}  # overrides for a task, as {task: {score: 0.5, cost: {weights_gb: 1}}}

    def gate(self, task: str) -> Gate:
        """The gate with a task's overrides.

        Raises:
            ValidationError: The overrides do not fit; `check_params` has said so before.
        """
        return Gate.model_validate(overlaid(self.model_dump(exclude={"tasks"}), self.tasks.get(task, {})))


def overlaid(block: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A block with the keys of another on top, block by block."""
    return {
        **block,
        **{
            key: overlaid(block[key], value) if isinstance(block.get(key), dict) and isinstance(value, dict) else value
            for key, value in top.items()
        },
    }
