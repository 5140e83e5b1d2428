"""The real model and rows, brought here once by the pipeline's own functions under the preset `gemma`."""

import contextlib
import io
from pathlib import Path

import pandas as pd

from benchmarks.measure import Skipped
from molf import presets
from molf.blocks import FileSource
from molf.config import Params, check_params
from molf.errors import UserError

GEMMA = "gemma3-270m"
CACHE = Path(".molf/benchmarks")


def params() -> Params:
    """The preset `gemma` over the built-in default."""
    return check_params(presets.merged("gemma", presets.differences(presets.DEFAULT)), "preset gemma")


def find_gemma(given: Path | None) -> Path | None:
    """Folder of Gemma 3 270M as a transformers checkpoint: the given one, else converted once from its package.

    Raises:
        UserError: The given folder is no checkpoint.
    """
    if given is not None:
        if not (given / "config.json").is_file():
            raise UserError(f"--gemma: {given} has no config.json; a transformers checkpoint is expected")
        return given
    from molf.base import build
    from molf.models import INFO

    folder = CACHE / GEMMA
    if not (folder / INFO).is_file():
        try:
            build(GEMMA, params().models[GEMMA], folder)
        except UserError:
            return None
    return folder


def rows(task: str, shared: Path, limit: int | None = None) -> pd.DataFrame:
    """Training rows of `fact` or `med` with `prompt` and `completion`.

    Args:
        task: The block's name in the preset.
        shared: Folder with the real files.
        limit: The most rows; the preset's when None.

    Raises:
        Skipped: The files are not there.
    """
    from molf.data import prepare
    from molf.raw import fetch

    block = params().tasks[task]
    assert isinstance(block.source, FileSource)
    source = block.source.model_copy(
        update={"path": str(shared / Path(block.source.path).relative_to("../shared/data"))}
    )
    limits = block.limits.model_copy(update={"train": limit or block.limits.train})
    block = block.model_copy(update={"source": source, "limits": limits})
    if not Path(source.path).exists():
        raise Skipped(f"the real rows ({source.path}) are not here; --shared names another folder")
    raw, prepared = CACHE / "raw" / task, CACHE / "prepared" / task
    with contextlib.redirect_stdout(io.StringIO()):
        fetch(task, block, raw)
        prepare(task, block, raw, prepared)
    return pd.read_parquet(prepared / "train.parquet", columns=["prompt", "completion"])
