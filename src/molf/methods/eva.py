"""EVA: LoRA begun at the directions in which the data's activations vary most, with ranks where these explain most.

A of each target starts as the right singular vectors of its inputs on some micro-batches, and a budget of ranks is
shared out by the variance that each further vector explains (Paischer et al. 2024, arXiv 2410.07170), by PEFT.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molf.adamw import plain_adamw
from molf.config import Training
from molf.encoding import IGNORED
from molf.errors import RunError, UserError
from molf.method_blocks import EvaMethod
from molf.methods import lora
from molf.methods.sample import Sample
from molf.models import to_device

# How often PEFT may decompose the activations before two in a row agree on the directions; two do as a rule.
ROUNDS = 20


@dataclass
class Start:
    """What came of the data, kept on the model until `proof`."""

    targets: list[str]  # names of all modules that had an adapter before ranks were shared out
    seconds: float = 0.0  # that it took
    tokens: int = 0  # that were looked at
    forwards: int = 0  # until the directions had settled
    explained: dict[str, float] = field(default_factory=dict)  # share of the inputs' variance in A's rows, by module
    by_chance: dict[str, float] = field(default_factory=dict)  # the same of as many random directions


def prepare(model: PreTrainedModel, block: EvaMethod, sample: Sample | None) -> PreTrainedModel:
    """Adds the adapters, in the base's dtype, at the start that the data gives, and freezes all else.

    Raises:
        UserError: The batches hold too few tokens.
        ValueError: A target is too narrow for so many directions.
        RunError: The directions do not settle.
    """
    from peft import LoraConfig, get_peft_model

    # The factor s of s B A is to be the same in every module, whatever its rank will be: PEFT keeps alpha / rank.
    factor = block.lora_alpha / (math.sqrt(block.r) if block.use_rslora else block.r)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=block.r,
        lora_alpha=factor * block.r,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=block.lora_dropout,
        target_modules="all-linear",
        exclude_modules=list(block.exclude_modules) or None,
    )
    training = model.training
    # PEFT would make float32 adapters on a bfloat16 base: another precision than the other methods'.
    adapted = cast(Any, get_peft_model(model, config, autocast_adapter_dtype=False))
    layers = _layers(adapted)
    most = round(block.r * block.rho)
    narrow = min(layers, key=lambda name: layers[name].in_features)
    if 2 * most > layers[narrow].in_features:
        raise ValueError(
            f"{most} directions (r {block.r} x rho {block.rho:g}) want inputs of at least {2 * most} features, "
            f"{narrow} has {layers[narrow].in_features}; lower r or rho"
        )
    adapted.start = Start(list(layers))
    if sample is not None:
        to_device(model, None)
        began = time.perf_counter()
        _begin(adapted, block, joined(sample.batches(block.probe_steps * sample.accumulation), block, 2 * most))
        adapted.start.seconds = time.perf_counter() - began
    adapted.train(training)
    return cast(PreTrainedModel, adapted)


def _begin(adapted: Any, block: EvaMethod, batch: dict[str, Tensor]) -> None:
    """Gives ranks and A their start, and measures how much of the inputs' variance it explains."""
    from peft import EvaConfig, initialize_lora_eva_weights

    start: Start = adapted.start

    def forward(model: Any, inputs: dict[str, Tensor]) -> None:
        start.forwards += 1
        if start.forwards > 1 + ROUNDS:  # the first only tells which modules have the same inputs
            raise RunError(
                f"eva: the directions of the activations did not settle in {ROUNDS} rounds; lower tau ({block.tau:g}) "
                "or r x rho, or raise probe_steps"
            )
        run(model, inputs)

    config = adapted.peft_config["default"]
    config.init_lora_weights, config.eva_config = (
        "eva",
        EvaConfig(
            rho=block.rho,
            tau=block.tau,
            use_label_mask=block.use_label_mask,
            label_mask_value=IGNORED,
            adjust_scaling_factors=True,
        ),
    )
    initialize_lora_eva_weights(
        adapted,
        [batch],
        forward_fn=forward,
        gather_distributed_inputs=False,  # every process has all of them
        show_progress_bar=False,
    )
    config.init_lora_weights, config.eva_config = True, None  # from here on an ordinary adapter of unlike ranks
    start.tokens = int(counted(batch, block).sum())
    start.explained, start.by_chance = _explained(adapted, block, batch)


def run(model: Any, batch: dict[str, Tensor]) -> None:
    """A forward for the sake of the activations alone."""
    fields = {name: value for name, value in batch.items() if name != "labels"}
    model(**fields, logits_to_keep=1, use_cache=False)


def counted(batch: dict[str, Tensor], block: EvaMethod) -> Tensor:
    """Which positions of a batch count: (rows, length) of bool. Padding never does."""
    real = batch["attention_mask"].bool()
    return real & (batch["labels"] != IGNORED) if block.use_label_mask else real


def joined(batches: Sequence[dict[str, Tensor]], block: EvaMethod, least: int) -> dict[str, Tensor]:
    """The rows of several batches as one, left-padded to the longest.

    PEFT decomposes batch by batch and goes round until two in a row agree on each direction. Where r x rho is no small
    part of the width (64 of 192), batches of some hundred tokens rarely come to that in 60 forwards. All rows as one
    batch agree at the second look, and however the micro-batches are cut, they are the same.

    Args:
        batches: Of the sample.
        block: Says which tokens count.
        least: Tokens that PEFT's decomposition needs; with fewer it would wait for ever.

    Raises:
        UserError: There are fewer.
    """
    found = sum(int(counted(batch, block).sum()) for batch in batches)
    if found < least:
        what = "labelled tokens" if block.use_label_mask else "tokens"
        raise UserError(
            f"eva: the rows of {block.probe_steps} steps hold {found} {what}, {least} are needed for r {block.r} x rho "
            f"{block.rho:g}; raise probe_steps{', set use_label_mask to false' if block.use_label_mask else ''}, or "
            "lower r or rho"
        )
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def wide(value: Tensor, filler: int) -> Tensor:
        return torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=filler)

    fillers = {name: IGNORED if name == "labels" else 0 for name in batches[0]}
    return {name: torch.cat([wide(batch[name], filler) for batch in batches]) for name, filler in fillers.items()}


@torch.no_grad()
def _explained(adapted: Any, block: EvaMethod, batch: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Share of the inputs' variance that lies in the span of A's rows, and in that of as many random directions."""
    generator, mask = torch.Generator().manual_seed(0), counted(batch, block)
    own, chance = {}, {}

    def look(module: Any, inputs: tuple[Tensor, ...], name: str) -> None:
        a, x = module.lora_A["default"].weight.float(), inputs[0][mask].float()
        x = x - x.mean(dim=0)
        random = torch.randn(a.shape, generator=generator).to(a.device)
        own[name], chance[name] = (
            float((x @ torch.linalg.qr(rows.T).Q).square().sum() / x.square().sum()) for rows in (a, random)
        )

    adapted.eval()
    with ExitStack() as hooks:
        for name, layer in _layers(adapted).items():
            hooks.callback(layer.register_forward_pre_hook(partial(look, name=name)).remove)
        run(adapted, batch)
    return own, chance


def optimizer(model: PreTrainedModel, block: EvaMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW on the adapters."""
    return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: EvaMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes the adapter, as LoRA's: its configuration names each module's rank."""
    lora.save(model, directory, base)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads it as what it is, a LoRA adapter."""
    return lora.load(base, directory, dtype)


def proof(model: PreTrainedModel, optimizer: torch.optim.Optimizer, block: EvaMethod) -> dict[str, Any]:
    """Ranks by module, their budget, and how much more the start explained than chance would.

    Raises:
        RunError: The budget is not met, the start was no better than chance, or a B is where it began.
    """
    start, layers = cast(Any, model).start, _layers(model)
    ranks = {name: layers[name].r["default"] if name in layers else 0 for name in start.targets}
    budget = block.r * len(ranks)
    if sum(ranks.values()) != budget:
        raise RunError(f"EVA: ranks sum to {sum(ranks.values())}, the budget is {budget} ({block.r} x {len(ranks)})")
    poor = list(_no_better(start, layers))
    if poor or not start.explained:
        raise RunError(
            f"EVA: {len(poor)} of {len(layers)} modules began at directions that explain no more of their inputs than "
            f"random ones would: {', '.join(poor[:3]) or 'no data was looked at'}"
        )
    still = [name for name, layer in layers.items() if not layer.lora_B["default"].weight.detach().any()]
    if still:
        raise RunError(f"EVA: B of {len(still)} modules is where it began, at 0: {', '.join(still[:3])}")
    uniform = len(set(ranks.values())) == 1
    return {
        "ranks": ranks,
        "ranks_at_start": block.r,
        "budget": budget,
        "tokens": start.tokens,
        "forwards": start.forwards,
        "explained": sum(start.explained.values()) / len(start.explained),
        "explained_by_chance": sum(start.by_chance.values()) / len(start.by_chance),
        "seconds": start.seconds,
        "warnings": [f"every module has rank {block.r}: EVA moved no rank"] if uniform else [],
    }


def _no_better(start: Start, layers: dict[str, Any]) -> Iterator[str]:
    for name, share in start.explained.items():
        everything = layers[name].r["default"] >= layers[name].in_features
        if not everything and share <= start.by_chance[name]:
            yield name


def _layers(model: Any) -> dict[str, Any]:
    """PEFT's layer of each target, by the target's name in the base model."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
