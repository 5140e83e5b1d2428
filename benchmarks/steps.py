"""Whole training steps: MoLF against full fine-tuning, MoLF-Efficient against one LoRA, the record against none."""

import statistics
from functools import partial

from torch import Tensor

from benchmarks.measure import Laps, Result, Row, Settings, side_by_side, timed
from benchmarks.workloads import PAIR, RANK, Trainee, batch, build, describe, step_flops

LENGTH = 128
# Sequences in a step, and how many times plain fine-tuning's step ours may take.
LIMITS = {16: 1.15, 32: 1.10}
PHASES = ("forward and backward", "deriving", "clipping", "optimizer step", "zeroing and record")


def models(settings: Settings) -> list[str]:
    """Those to measure whole steps on."""
    if settings.quick:
        return ["tiny"]
    if not settings.device.cuda:
        return ["qwen2-28m"]
    return ["llama-1b", *(["gemma3-270m"] if settings.gemma else [])]


def length(settings: Settings) -> int:
    """Tokens of a sequence."""
    return 16 if settings.quick else LENGTH


def molf_step(settings: Settings) -> Result:
    """MoLF's whole step beside plain fine-tuning's, the published separate LoRA path beside both, and its phases."""
    result = Result()
    device, size = settings.device, length(settings)
    for name in models(settings):
        plain = build(name, settings.gemma)
        label = describe(name, plain)
        flops = {sequences: step_flops(plain, sequences, size) for sequences in LIMITS}
        trainees = {"fft": Trainee("fft", plain, device)}
        for kind in ("molf", "molf-dense"):
            trainees[kind] = Trainee(kind, build(name, settings.gemma), device)
        for sequences, limit in LIMITS.items():
            ids = batch(trainees["fft"].model, sequences, size, device)
            sides = {kind: partial(trainee.step, ids) for kind, trainee in trainees.items()}
            seconds = side_by_side(sides, device, settings.rounds)
            what = f"MoLF step, r={RANK}, {sequences * size:,} tokens"
            against = f"FFT, fused AdamW ({label})"
            result.rows.append(Row(what, against, "s", seconds["molf"], seconds["fft"], limit))
            dense = what.replace("step", "step with a separate LoRA path (the published way)")
            result.rows.append(Row(dense, against, "s", seconds["molf-dense"], seconds["fft"]))
            phases = {kind: _phases(trainee, ids, settings) for kind, trainee in trainees.items()}
            result.data[f"{name}, {sequences}x{size}"] = {"phases": phases, "model_flops": flops[sequences]}
            result.notes += [f"{label}, {sequences * size:,} tokens a step, seconds by phase:", *_phase_lines(phases)]
            result.notes += _utilisation(
                settings, flops[sequences], {k: statistics.median(seconds[k]) for k in seconds}
            )
        del trainees, sides, plain
        device.release()
    return result


def efficient_step(settings: Settings) -> Result:
    """MoLF-Efficient's whole step beside that of one PEFT LoRA of the summed rank."""
    result = Result()
    device, size = settings.device, length(settings)
    for name in models(settings):
        trainees = {kind: Trainee(kind, build(name, settings.gemma), device) for kind in ("molf-e", "lora")}
        label = describe(name, build(name, settings.gemma))
        ids = batch(trainees["lora"].model, 16, size, device)
        sides = {kind: partial(trainee.step, ids) for kind, trainee in trainees.items()}
        seconds = side_by_side(sides, device, settings.rounds)
        what = f"MoLF-Efficient step, r={PAIR}, {16 * size:,} tokens"
        against = f"PEFT LoRA of rank {sum(PAIR)}, fused AdamW ({label})"
        result.rows.append(Row(what, against, "s", seconds["molf-e"], seconds["lora"], 1.05))
        phases = {kind: _phases(trainee, ids, settings) for kind, trainee in trainees.items()}
        result.data[name] = {"phases": phases}
        result.notes += [f"{label}, {16 * size:,} tokens a step, seconds by phase:", *_phase_lines(phases)]
        del trainees, sides
        device.release()
    return result


def recording(settings: Settings) -> Result:
    """A step with its routing's record beside the same step without, the drain of every 64 steps included.

    Both sides are the same step, so that the record alone differs: seconds of 64 steps and their records, over seconds
    of the 64 steps. Steps are short (512 tokens), which makes the record look dearer than it is.
    """
    device, size = settings.device, length(settings)
    name = models(settings)[0]
    trainee = Trainee("molf", build(name, settings.gemma), device)
    ids = batch(trainee.model, 4, size, device)
    recorder = trainee.recorder
    assert recorder is not None
    trainee.step(ids, record=False)
    with_record, without = [], []
    for _ in range(1 if settings.quick else min(settings.rounds, 3)):
        steps = records = 0.0
        for _ in range(recorder.drain_every):
            steps += timed(lambda: trainee.step(ids, record=False), device)
            records += timed(lambda: recorder.record(trainee.optimizer.last_routing), device)
        with_record.append((steps + records) / recorder.drain_every)
        without.append(steps / recorder.drain_every)
    label = describe(name, build(name, settings.gemma))
    what = f"MoLF step of {4 * size} tokens, routing recorded and drained every {recorder.drain_every}"
    return Result([Row(what, f"recording nothing ({label})", "s", with_record, without, 1.01)])


def _phases(trainee: Trainee, ids: Tensor, settings: Settings) -> dict[str, float]:
    """Median seconds of each phase, in steps of their own: waiting for the device in between costs time."""
    laps = Laps(settings.device)
    for _ in range(min(settings.rounds, 5)):
        laps.start()
        trainee.step(ids, laps)
    return laps.medians()


def _phase_lines(phases: dict[str, dict[str, float]]) -> list[str]:
    """A line for each method."""
    return [
        f"  {kind:<10} " + ", ".join(f"{phase} {seconds[phase]:.3f}" for phase in PHASES)
        for kind, seconds in phases.items()
    ]


def _utilisation(settings: Settings, flops: float, seconds: dict[str, float]) -> list[str]:
    """Model FLOPs utilisation of each method; nothing where the card's peak is not known."""
    peak = settings.device.peak_flops()
    if peak is None:
        return []
    shares = ", ".join(f"{kind} {flops / took / peak:.1%}" for kind, took in seconds.items())
    return [f"  model FLOPs utilisation (6 N T + 6 L w S T = {flops:.3g} FLOP, peak {peak:.3g} FLOP/s): {shares}"]
