"""LoRA's step on half of the layers beside uniform LoRA's: the claim of 15 to 28 % of Aletheia (arXiv 2604.15351)."""

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import real
from benchmarks.measure import Result, Row, Settings, Skipped, side_by_side
from benchmarks.steps import length, models
from benchmarks.workloads import CLIP, batch, build, describe, method_block, training_block
from molf.batches import Collator, encode_examples
from molf.method_blocks import MethodBlock, SelectedMethod
from molf.methods import METHODS, selected
from molf.methods.sample import completion_loss
from molf.modules import place

UNIFORM = 32  # rank of LoRA on all layers, whose parameters are the budget
SHARE = 0.5
SEQUENCES = 16
PROBED = 4  # batches that the probe looks at
# Which layers, and the shares of uniform LoRA's parameters that they may have; half is what its rank takes there.
PLACES = {"the upper half": (1.0, 0.5), "every second one from the lowest on": (1.0, 0.5), "the probe's choice": (1.0,)}


class Side:
    """An adapted model, its optimizer, and a whole training step of both.

    Args:
        model: Prepared by its method.
        block: The method's.
        settings: With the device.
    """

    def __init__(self, model: nn.Module, block: MethodBlock, settings: Settings) -> None:
        self.model, self.device = model.to(settings.device.type).train(), settings.device
        self.optimizer = METHODS[block.kind].optimizer(self.model, block, training_block())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, inputs: dict[str, Tensor]) -> None:
        """Forward, backward, clipping and the update.

        Args:
            inputs: The collator's batch.
        """
        with self.device.autocast():
            loss = completion_loss(self.model, inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def selected_step(settings: Settings) -> Result:
    """Random models on random tokens, and Gemma 3 270M on facts where both are here."""
    result = Result()
    for name in models(settings):
        plain = build(name, settings.gemma)
        ids = batch(plain, SEQUENCES, length(settings), settings.device)
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        _compare(result, settings, name, tokens, [tokens] * PROBED)
    if settings.gemma is None or settings.quick or real.GEMMA in models(settings):
        return result
    try:
        _compare(result, settings, real.GEMMA, *_facts(settings))
    except Skipped as reason:
        result.notes.append(f"no row of {real.GEMMA}: {reason}")
    return result


def _compare(
    result: Result, settings: Settings, name: str, inputs: dict[str, Tensor], probed: list[dict[str, Tensor]]
) -> None:
    """Adds a model's rows: each choice of layers beside uniform LoRA, all in turn."""
    plain = build(name, settings.gemma).to(settings.device.type)
    label, uniform = describe(name, plain), method_block("lora").model_copy(update={"r": UNIFORM})
    sides = {"lora": Side(METHODS["lora"].prepare(_like(plain), uniform, None), uniform, settings)}
    told, took = {}, 0.0
    for where, budgets in PLACES.items():
        for budget in budgets:
            block, model = _block(budget), _like(plain)
            names = list(selected.targets(model, block.exclude_modules))  # type: ignore[arg-type]
            if where == "the probe's choice":
                clock = _clock(settings)
                began = clock()
                found: Mapping[str, float] = selected.importance(model, names, probed)  # type: ignore[arg-type]
                took = clock() - began
            else:
                found = {n: float(place(n)[1] + 1) for n in names} if where == "the upper half" else {}
            model = selected.adapt(model, block, found)  # type: ignore[arg-type]
            side = f"{where}, budget {budget:g}"
            sides[side] = Side(model, block, settings)
            told[side] = {
                "layers": selected.selection(model).layers,
                "parameters": sum(p.numel() for p in sides[side].trained),
            }
    steps = {side: partial(other.step, inputs) for side, other in sides.items()}
    seconds = side_by_side(steps, settings.device, settings.rounds, clock=_clock(settings))
    count = int(inputs["attention_mask"].sum())
    against = f"LoRA of rank {UNIFORM} on all layers ({label})"
    for side in told:
        what = f"LoRA step on half of the layers, {side}, {count:,} tokens"
        result.rows.append(Row(what, against, "s", seconds[side], seconds["lora"]))
        result.notes.append(f"{name}, {side}: layers {told[side]['layers']}, {told[side]['parameters']:,} parameters")
    parameters = sum(p.numel() for p in sides["lora"].trained)
    step = sorted(seconds["lora"])[len(seconds["lora"]) // 2]
    result.notes.append(
        f"{name}: uniform LoRA has {parameters:,}; a probe of {len(probed)} batches took {took / step:.1f} of its steps"
    )
    result.data[name] = {"sides": told, "uniform_parameters": parameters, "probe_seconds": took, "probed": len(probed)}
    del sides
    settings.device.release()


def _like(model: nn.Module) -> nn.Module:
    """Another model of the same frozen weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _clock(settings: Settings) -> Callable[[], float]:
    """CPU time on a CPU, of all threads, which other work on the machine changes little."""
    return time.perf_counter if settings.device.cuda else time.process_time


def _facts(settings: Settings) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch of CounterFact, and those that the probe looks at."""
    from molf.models import load_tokenizer

    assert settings.gemma is not None
    tokenizer, size = load_tokenizer(settings.gemma), SEQUENCES
    examples = encode_examples(tokenizer, real.rows("fact", settings.shared), max_length=64)
    collate: Any = Collator(tokenizer.pad_token_id)
    made = [collate(examples.rows[size * i : size * (i + 1)]) for i in range(PROBED)]
    batches = [{name: value.to(settings.device.type) for name, value in inputs.items()} for inputs in made]
    return batches[0], batches


def _block(budget: float) -> SelectedMethod:
    of_lora = method_block("lora").model_dump().items()
    like = {key: value for key, value in of_lora if key in SelectedMethod.model_fields}
    like |= {"kind": "selected", "r": UNIFORM, "probe_steps": PROBED}
    return SelectedMethod(**like, budget=budget, share=SHARE, exponent=0.5)
