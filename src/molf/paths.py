"""Where every part of a comparison and its tools lie on disk, and writes that a reader never sees half done."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

RAW = Path("data/raw")
PREPARED = Path("data/prepared")
CARDS = Path("data/cards")
GENERAL = Path("data/general")
CODE = Path("data/code.json")  # of the methods, as hashes
MODELS = Path("models")
WEIGHTS = Path("weights")
SWEEPS = Path("sweeps")
RESULTS = Path("results")
RATES = RESULTS / "rates.json"  # what the sweeps chose
REPORTS = Path("reports")
SCRATCH = Path(".molf")  # of no stage: what DVC neither deletes nor keeps
CHECKPOINTS = SCRATCH / "checkpoints"
TRAINER = SCRATCH / "trainer"
UNKEPT = SCRATCH / WEIGHTS  # weights that `training.keep` does not let stay
OUTPUTS = (
    RAW,
    PREPARED,
    CARDS,
    GENERAL,
    CODE,
    MODELS,
    WEIGHTS,
    SWEEPS,
    RESULTS,
    REPORTS,
    SCRATCH,
)  # what stages empty and fill

# Nothing reports of its users, nor asks whether there is a newer version of it: of Prefect and MLflow, of DVC, of the
# Hugging Face libraries. Prefect takes any truth for DO_NOT_TRACK, MLflow this one.
PRIVATE = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

# The untrained model is scored like a method, so that every table has a zero row.
BASE_METHOD = "base"


@dataclass(frozen=True, order=True)
class Cell:
    """One training of the grid: a model, a task, a method and a seed."""

    model: str
    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """`MODEL/TASK/METHOD/seed-S`, the cell's folder below `results` and `weights`."""
        return f"{self.model}/{self.task}/{self.method}/seed-{self.seed}"

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    @property
    def weights(self) -> Path:
        return WEIGHTS / self.name

    @classmethod
    def parse(cls, name: str) -> "Cell":
        """The inverse of `name`.

        Raises:
            ValueError: `name` is not of that form.
        """
        model, task, method, seed = name.split("/")
        return cls(model, task, method, int(seed.removeprefix("seed-")))


@dataclass(frozen=True, order=True)
class Trial:
    """One training of a sweep: a model, a task, a method, and a factor of its learning rates."""

    model: str
    task: str
    method: str
    factor: float  # as params.yaml has it: 1 is named otherwise than 1.0

    @property
    def name(self) -> str:
        """`MODEL/TASK/METHOD/factor-F`, the trial's folder below `sweeps`."""
        return f"{self.model}/{self.task}/{self.method}/factor-{self.factor}"

    @property
    def results(self) -> Path:
        return SWEEPS / self.name

    @property
    def record(self) -> Path:
        return self.results / "trial.json"


def remove_leftovers(but: Cell | None = None, root: Path = Path()) -> None:
    """Removes checkpoints, and weights that are not kept, of cells that have been evaluated.

    Not at the end of the evaluation itself: until DVC has its outputs, a kill would cost the training.

    Args:
        but: Keeps all of its own.
        root: Project folder.
    """
    for path in (root / RESULTS).glob("*/*/*/*/train/run.json"):
        cell = path.parents[1].relative_to(root / RESULTS)
        if but is not None and str(cell) == but.name:
            continue
        try:
            run, metrics = read_json(path), read_json(root / RESULTS / cell / "evaluation/metrics.json")
        except FileNotFoundError:  # not evaluated, or DVC removes it at this moment
            continue
        # The same training done once more has the same fingerprint, but began at another time.
        evaluated = metrics["train_fingerprint"], metrics.get("train_started")
        if evaluated == (run["fingerprint"], run["started"]):
            for folder in (UNKEPT, CHECKPOINTS, TRAINER):
                shutil.rmtree(root / folder / cell, ignore_errors=True)


def own_tools() -> dict[str, str]:
    """The environment in which `dvc` and `mlflow` are those installed beside this program, activated or not."""
    return {**PRIVATE, **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def keep_private() -> None:
    """Keeps libraries that are imported afterwards from reporting of their users; what is set already stays."""
    for key, value in PRIVATE.items():
        os.environ.setdefault(key, value)


def atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a neighbour of `path`, then renames it into place, so that `path` is old or new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities are refused with a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_parquet(path: Path, frame: "pd.DataFrame") -> None:
    """Writes a frame as Parquet (zstd), atomically and without its index."""
    atomic(path, lambda temporary: frame.to_parquet(temporary, index=False, compression="zstd"))
