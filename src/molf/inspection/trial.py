"""A guessed block put to the test: prepared like any other, in a folder of its own; lengths in a model's tokens."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molf import data
from molf.blocks import SPLITS, PathModel, TaskBlock
from molf.config import Params, check_params
from molf.errors import UserError, first_line
from molf.paths import MODELS
from molf.raw import extract_databases

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

DRAWN = 10_000  # examples whose tokens are counted
BYTES_PER_TOKEN = 4  # of English, in most tokenizers
ALL_BUT_ALL = 0.999999  # so large a share of rejected rows is still described


@dataclass
class Trial:
    """What `prepare` makes of a block.

    Attributes:
        summary: summary.json, or None where it stops.
        stopped: Why it stops, in lines.
        first: The example of the file's first good row, or None.
        prepared: Its folder.
    """

    summary: dict[str, Any] | None
    stopped: list[str]
    first: dict[str, Any] | None
    prepared: Path


@dataclass
class Lengths:
    """Tokens of the examples.

    Attributes:
        prompts, completions: Of each drawn example; a conversation's prompt ends before its first answer.
        rows: Examples that there are.
        model: Whose tokenizer counted; None: estimated from bytes.
        why: Why it is estimated, and what to type.
    """

    prompts: np.ndarray
    completions: np.ndarray
    rows: int
    model: str | None = None
    why: str = ""

    @property
    def total(self) -> np.ndarray:
        return self.prompts + self.completions


def checked(params: Params, name: str, block: dict[str, Any]) -> TaskBlock:
    """The block, as params.yaml with it is checked.

    Raises:
        UserError: It is not valid there.
    """
    raw = params.model_dump(mode="json")
    raw["tasks"] = {name: block}
    raw["grid"]["tasks"] = [name]
    return check_params(raw, "the block").tasks[name]


def attempt(name: str, block: TaskBlock, raw: Path, directory: Path) -> Trial:
    """Prepares rows by a block; many bad rows and copies across its splits are described instead of refused."""
    across = "keep" if block.duplicates.across == "fail" and len(list(raw.glob("*.parquet"))) > 1 else None
    changes: dict[str, Any] = {"max_rejected": ALL_BUT_ALL}
    if across:
        changes["duplicates"] = block.duplicates.model_copy(update={"across": across})
    try:
        if block.kind == "sql" and block.options.databases is not None:
            extract_databases(Path(block.options.databases), raw / "databases", f"tasks.{name}.options.databases")
        summary = data.prepare(name, block.model_copy(update=changes), raw, directory)
    except UserError as error:
        lines = [line for problem in error.problems for line in problem.splitlines()]
        return Trial(None, [line for line in lines if str(directory) not in line], None, directory)
    return Trial(summary, [], _first(directory), directory)


def _first(directory: Path) -> dict[str, Any] | None:
    """The example that stands first in the train file."""
    import pyarrow.parquet as pq

    found = []
    for split in SPLITS:
        batch = next(pq.ParquetFile(directory / f"{split}.parquet").iter_batches(batch_size=1))
        found += batch.to_pylist()
    train = [row for row in found if row["example_id"].startswith("train-")]
    return min(train or found, key=lambda row: [int(part) for part in re.findall(r"\d+", row["example_id"])])


def tokenizer(params: Params, model: str) -> "tuple[PreTrainedTokenizerBase | None, str]":
    """A model's tokenizer where its folder is here; else None, and what to do.

    Raises:
        UserError: params.yaml has no such model.
    """
    if model not in params.models:
        raise UserError(f"--model {model}: params.yaml has {', '.join(params.models)}")
    block = params.models[model]
    folders = [MODELS / model, *([Path(block.path)] if isinstance(block, PathModel) else [])]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        pin = "`molf pin` and " if block.kind == "hub" else ""
        return None, f"model {model} is not built yet: {pin}`dvc repro base@{model}`, then inspect again"
    from molf import models

    models.quiet()
    try:
        return models.load_tokenizer(folder), ""
    except (OSError, ValueError, KeyError) as error:
        return None, f"no tokenizer loads from {folder}: {first_line(error)}"


def lengths(prepared: Path, params: Params, model: str) -> Lengths:
    """Tokens of prepared examples, of DRAWN of them where there are more."""
    import pandas as pd
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(prepared / f"{split}.parquet") for split in SPLITS]
    counts = [file.metadata.num_rows for file in files]
    rows = sum(counts)
    drawn = np.sort(np.random.default_rng(0).choice(rows, min(DRAWN, rows), replace=False))
    parts, start = [], 0
    for file in files:
        wanted = [name for name in ("prompt", "completion", "messages") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=data.CHUNK, columns=wanted):
            own = drawn[(drawn >= start) & (drawn < start + len(batch))] - start
            parts.append(batch.take(own).to_pandas())
            start += len(batch)
    frame = pd.concat(parts, ignore_index=True)
    own_tokenizer, why = tokenizer(params, model)
    if own_tokenizer is None:
        sizes = [
            np.array([-(-len(text.encode()) // BYTES_PER_TOKEN) for text in frame[name]], dtype=np.int64)
            for name in ("prompt", "completion")
        ]
        return Lengths(sizes[0], sizes[1] + 1, rows, None, why)
    return Lengths(*_counted(own_tokenizer, frame), rows, model)


def _counted(own: "PreTrainedTokenizerBase", frame: "pd.DataFrame") -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompt and completion, as training encodes them."""
    from molf.batches import encode_examples

    found = encode_examples(own, frame, max_length=2**31)
    return tuple(np.array([len(row[part]) for row in found.rows]) for part in ("prompt", "completion"))  # type: ignore[return-value]
