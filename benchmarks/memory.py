"""Peak memory of whole training steps, each measured in a fresh process: `python -m benchmarks.memory KIND MODEL`."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measure import MEMORY_ROUNDS, Result, Row, Settings, run_child
from benchmarks.steps import length, models
from benchmarks.workloads import PAIR, RANK

EXPLAINED = (
    "memory: a fresh process each; the peak counts weights, gradients, moments and activations of 3 steps, above what "
    "the process held after its imports and a step of a miniature of the model (thread pools, compiler). On CUDA the "
    "peak of the allocator."
)


def molf_memory(settings: Settings) -> Result:
    """MoLF's peak beside plain fine-tuning's, and beside that plus the experts' own bytes."""
    result = Result(notes=[EXPLAINED])
    for name in models(settings):
        for sequences in (16, 32):
            molf, fft = _measure("molf", name, sequences, settings), _measure("fft", name, sequences, settings)
            experts, baseline = molf[0]["expert_bytes"], min(sample["peak"] for sample in fft)
            tokens = f"{sequences * length(settings):,} tokens"
            limit = 1.05 + experts / baseline
            result.rows += _rows(f"MoLF peak memory, r={RANK}, {tokens}", f"FFT ({name})", molf, fft, limit)
            result.notes.append(
                f"{name}, {tokens}: the experts' own parameters and moments are {experts / 1e6:,.1f} MB, so at most "
                f"FFT's {baseline / 1e6:,.1f} MB x 1.05 + that = {limit:.3f} times"
            )
            result.data[f"{name}, {sequences}"] = {"molf": molf, "fft": fft}
    return result


def efficient_memory(settings: Settings) -> Result:
    """MoLF-Efficient's peak beside that of one PEFT LoRA of the summed rank."""
    result = Result(notes=[EXPLAINED])
    for name in models(settings):
        ours, lora = _measure("molf-e", name, 16, settings), _measure("lora", name, 16, settings)
        tokens = f"{16 * length(settings):,} tokens"
        what, against = f"MoLF-Efficient peak memory, r={PAIR}, {tokens}", f"PEFT LoRA of rank {sum(PAIR)} ({name})"
        result.rows += _rows(what, against, ours, lora, 1.05)
        result.data[name] = {"molf-e": ours, "lora": lora}
    return result


def _rows(what: str, against: str, ours: list[dict[str, int]], theirs: list[dict[str, int]], limit: float) -> list[Row]:
    """The judged row, and the whole process's peak as information (the same on CUDA, hence left out there)."""
    samples = {key: ([o[key] / 1 for o in ours], [t[key] / 1 for t in theirs]) for key in ("peak", "process_peak")}
    rows = [Row(what, against, "B", *samples["peak"], limit)]
    if samples["peak"] != samples["process_peak"]:
        rows.append(
            Row(what.replace("peak memory", "peak of the whole process"), against, "B", *samples["process_peak"])
        )
    return rows


def _measure(kind: str, model: str, sequences: int, settings: Settings) -> list[dict[str, int]]:
    """What `child` prints, of as many fresh processes as there are rounds."""
    command = [sys.executable, "-m", "benchmarks.memory", kind, model, str(sequences), str(length(settings))]
    command += ["--threads", str(settings.threads)] + (["--gemma", str(settings.gemma)] if settings.gemma else [])
    rounds = 1 if settings.quick else min(settings.rounds, MEMORY_ROUNDS)
    return [run_child(command, settings.threads) for _ in range(rounds)]


def child() -> None:
    """Trains 3 steps and prints peak, process_peak and expert_bytes, all in bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("model")
    parser.add_argument("sequences", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--gemma", type=Path)
    options = parser.parse_args()

    import torch

    from benchmarks.device import Device
    from benchmarks.workloads import Trainee, batch, build
    from molf.models import quiet
    from molf.training import peak_memory, reset_peak_memory

    quiet()
    torch.set_num_threads(options.threads)
    device = Device.found()

    def steps(model: str, sequences: int, length: int) -> Trainee:
        trainee = Trainee(options.kind, build(model, options.gemma), device)
        ids = batch(trainee.model, sequences, length, device)
        for _ in range(3):
            trainee.step(ids)
        return trainee

    # What the first step of all brings with it (thread pools, compiler) is no part of the model's memory.
    steps("tiny", 2, 16)
    device.release()
    reset_peak_memory()
    baseline = peak_memory()
    trainee = steps(options.model, options.sequences, options.length)
    peak = peak_memory()
    figures = {"peak": peak - baseline, "process_peak": peak, "expert_bytes": trainee.expert_bytes()}
    print(json.dumps(figures | {"baseline": baseline}))


if __name__ == "__main__":
    child()
