"""What each precision saves and what it costs in loss, on a real run: `python -m benchmarks.precision`.

Gemma 3 270M on CounterFact facts, by the pipeline's own training under the preset `gemma`: each method in float32,
in pure bfloat16 with stochastic rounding, and each with 8-bit moments; on CUDA also under autocast. A fresh process
each.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, run_child

# (training.dtype, training.moments); the first is what the others are held against.
PRECISIONS = [("float32", "float32"), ("bfloat16", "float32"), ("float32", "8bit"), ("bfloat16", "8bit")]
METHODS = ("fft", "molf", "lora", "molf-e")
HEADER = ("method", "weights", "moments", "peak memory", "weights + moments", "s a step", "final loss", "to float32")


def run(arguments: Sequence[str]) -> None:
    """Trains every method in every precision, prints the table and writes the figures.

    Raises:
        UserError: The model or the rows are not here.
    """
    options = _options(arguments)

    import torch

    from benchmarks import real, table
    from benchmarks.device import Device
    from benchmarks.measure import Settings, Skipped
    from molf.errors import UserError
    from molf.models import quiet
    from molf.paths import write_json

    quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    gemma = real.find_gemma(options.gemma)
    if gemma is None:
        raise UserError("Gemma 3 270M is not here: `make gemma` installs it, or --gemma names its folder")
    try:
        rows = real.rows("fact", options.shared)
    except Skipped as reason:
        raise UserError(str(reason)) from None
    device = Device.found()
    settings = Settings(device, torch.get_num_threads(), 1, False, gemma, options.shared)
    facts = table.environment(settings)
    print(table.heading(facts) + f"\n{len(rows)} facts, {options.steps or 'all'} steps\n", flush=True)
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.parquet"
        rows.to_parquet(file)
        for method in options.methods:
            for dtype, moments in [*PRECISIONS, *([("auto", "float32")] if device.cuda else [])]:
                print(f"training {method}, {dtype} weights, {moments} moments ...", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "benchmarks.precision", "--cell", method, dtype, moments]
                command += ["--gemma", str(gemma.resolve()), "--rows", str(file), "--threads", str(settings.threads)]
                command += ["--steps", str(options.steps)] if options.steps else []
                cells.append(run_child(command, settings.threads))
    print(lines(cells))
    path: Path = options.into / f"precision-{options.name or table.slug(facts)}.json"
    write_json(path, {"environment": facts, "cells": cells})
    print(f"\nall figures: {path}")


def train_cell(
    base: Path, rows: Path, method: str, dtype: str, moments: str, steps: int | None, threads: int | None
) -> dict[str, Any]:
    """Trains one method in one precision in this process.

    Args:
        base: Folder of the base model.
        rows: Parquet file with `prompt` and `completion`.
        method: Name of its block in the preset `gemma`.
        dtype: `training.dtype`.
        moments: `training.moments`.
        steps: Optimizer steps; None lets the preset's epochs decide.
        threads: CPU threads.

    Returns:
        Peak bytes above the import baseline, bytes of weights and of moments, seconds a step (median), final loss
        (mean of the last tenth) and every step's loss.
    """
    import pandas as pd

    from benchmarks import real
    from molf.methods import METHODS as MODULES
    from molf.training import peak_memory, reset_peak_memory, train

    params = real.params()
    block = params.methods[method]
    changes = {"dtype": dtype, "moments": moments, "max_steps": steps, "threads": threads}
    training = params.training_for("fact").model_copy(update=changes)
    module, kept = MODULES[block.kind], []
    make = module.optimizer

    def keeping(model: Any, *rest: Any) -> Any:
        """The method's optimizer, kept so that its state can be weighed after the training."""
        optimizer = make(model, *rest)
        kept.append((list(model.parameters()), optimizer))
        return optimizer

    frame = pd.read_parquet(rows)
    module.optimizer = keeping  # type: ignore[attr-defined]
    try:
        with tempfile.TemporaryDirectory() as folder:
            reset_peak_memory()
            baseline = peak_memory()
            outcome = train(
                base=base,
                examples_frame=frame,
                block=block,
                training=training,
                seed=0,
                weights=Path(folder) / "weights",
                scratch=Path(folder) / "scratch",
            )
    finally:
        module.optimizer = make  # type: ignore[attr-defined]
    ((weights, optimizer),) = kept
    history = outcome.history
    return {
        "method": method,
        "dtype": dtype,
        "moments": moments,
        "steps": int(outcome.summary["steps"]),
        "peak_bytes": int(outcome.summary["peak_memory_bytes"]) - baseline,
        "baseline_bytes": baseline,
        "weights_bytes": sum(tensor_bytes(p) for p in weights),
        "moments_bytes": sum(tensor_bytes(v) for state in optimizer.state.values() for v in state.values()),
        "seconds_a_step": float(history["seconds"].diff().median()),
        "final_loss": float(outcome.summary["final_loss"]),
        "losses": history["loss"].tolist(),
    }


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor, of a quantized one the sum of its parts; 0 for anything else."""
    import torch

    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def lines(cells: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown: a row a cell, its loss held against the same method's in float32."""
    reference = {c["method"]: c["final_loss"] for c in cells if (c["dtype"], c["moments"]) == PRECISIONS[0]}
    text = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
    for cell in cells:
        state = cell["weights_bytes"] + cell["moments_bytes"]
        difference = cell["final_loss"] - reference[cell["method"]]
        values = [cell["method"], cell["dtype"], cell["moments"], f"{cell['peak_bytes'] / 1e9:.2f} GB"]
        values += [f"{state / 1e9:.2f} GB", f"{cell['seconds_a_step']:.2f}"]
        values += [f"{cell['final_loss']:.4f}", f"{difference:+.4f}"]
        text.append("| " + " | ".join(values) + " |")
    return "\n".join(text)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the preset's 3 epochs)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch finds)")
    parser.add_argument("--name", help="of the file (default: the hardware)")
    parser.add_argument("--into", type=Path, default=RESULTS, help="its folder (default benchmarks/results)")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M (default: converted from its package)")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="folder with the real rows")
    # What the fresh processes are called with.
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child(arguments: Sequence[str]) -> None:
    """Trains one cell and prints its figures as JSON."""
    from molf.models import quiet

    quiet()
    options = _options(arguments)
    method, dtype, moments = options.cell
    cell = train_cell(options.gemma, options.rows, method, dtype, moments, options.steps, options.threads)
    print("\n" + json.dumps(cell))


if __name__ == "__main__":
    from molf.errors import main

    raise SystemExit(main(lambda: (child if "--cell" in sys.argv else run)(sys.argv[1:])))
