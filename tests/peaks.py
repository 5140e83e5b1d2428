"""`python -m tests.peaks BASE`: trains the cells given on standard input and says how much memory each one took.

One process does the imports; each cell runs in a fork of it, so that its peak is counted from the same start.
"""

import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from molf import models, training
from molf.config import Params, check_params, read_yaml

ROOT = Path(__file__).parents[1]


def params_of(cell: dict[str, Any]) -> Params:
    """params.yaml with a cell's `method`, `rows`, `length`, maybe `forward`, keys of its `block`, of `training`."""
    data = read_yaml(ROOT / "params.yaml")
    data["methods"]["molf"]["forward"] = cell.get("forward", "auto")
    data["methods"][cell["method"]] |= cell.get("block", {})
    data["training"] |= {"max_length": cell["length"], "batch_size": cell["rows"], "max_steps": 2, "threads": 1}
    data["training"] |= {"warmup": 0.0, **cell.get("training", {})}
    return check_params(data, "params.yaml")


def examples(cell: dict[str, Any]) -> pd.DataFrame:
    """Rows for two steps, one of them as long as may be, a quarter of it supervised; every letter is a token."""
    completion = cell["length"] // 4 - 1
    count = 2 * cell["rows"] * cell.get("training", {}).get("gradient_accumulation", 1)
    prompts = ["b" * (cell["length"] - completion - 2 - i % 3) for i in range(count)]
    return pd.DataFrame(
        {"example_id": [str(i) for i in range(count)], "prompt": prompts, "completion": "c" * completion}
    )


def peak(base: Path, cell: dict[str, Any]) -> int:
    """Bytes that a cell's training takes at its peak above what this process holds before it."""
    params = params_of(cell)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    training.reset_peak_memory()
    before = training.peak_memory()
    training.reset_peak_memory = lambda: None  # so that loading counts too
    folder = Path(tempfile.mkdtemp())
    try:
        training.train(base, examples(cell), params.methods[cell["method"]], params.training, 0, folder / "w", folder)
    finally:
        shutil.rmtree(folder)
    return training.peak_memory() - before


def main() -> None:
    models.quiet()
    import accelerate  # noqa: F401
    import peft  # noqa: F401

    for cell in json.load(sys.stdin):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(json.dumps(peak(Path(sys.argv[1]), cell)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{cell} failed")


if __name__ == "__main__":
    main()
