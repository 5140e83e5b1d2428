"""EVA: LoRA begun at the directions in which the data's activations vary most, with ranks where these explain most.

A of each target starts as the right singular vectors of its inputs on some micro-batches, and a budget of ranks is
shared out by the variance that each further vector explains (Paischer et al. 2024, arXiv 2410.07170), by PEFT.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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

# How often PEFT may go through the batches before the directions that it needs have settled.
PASSES = 20


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
        _begin(adapted, block, grouped(sample.batches(block.probe_steps * sample.accumulation), block, 2 * most))
        adapted.start.seconds = time.perf_counter() - began
    adapted.train(training)
    return cast(PreTrainedModel, adapted)


def _begin(adapted: Any, block: EvaMethod, batches: list[dict[str, Tensor]]) -> None:
    """Gives ranks and A their start, and measures how much of the inputs' variance it explains."""
    from peft import EvaConfig, initialize_lora_eva_weights

    start: Start = adapted.start

    def forward(model: Any, inputs: dict[str, Tensor]) -> None:
        start.forwards += 1
        if start.forwards > PASSES * len(batches) + 1:
            raise RunError(
                f"eva: the directions of the activations did not settle in {PASSES} rounds over {len(batches)} "
                f"batches; lower tau ({block.tau:g}), or raise probe_steps"
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
        batches,
        forward_fn=forward,
        gather_distributed_inputs=False,  # every process has all of them
        show_progress_bar=False,
    )
    config.init_lora_weights, config.eva_config = True, None  # from here on an ordinary adapter of unlike ranks
    start.tokens = sum(int(counted(batch, block).sum()) for batch in batches)
    start.explained, start.by_chance = _explained(adapted, block, batches)


def run(model: Any, batch: dict[str, Tensor]) -> None:
    """A forward for the sake of the activations alone."""
    fields = {name: value for name, value in batch.items() if name != "labels"}
    model(**fields, logits_to_keep=1, use_cache=False)


def counted(batch: dict[str, Tensor], block: EvaMethod) -> Tensor:
    """Which positions of a batch count: (rows, length) of bool. Padding never does."""
    real = batch["attention_mask"].bool()
    return real & (batch["labels"] != IGNORED) if block.use_label_mask else real


def grouped(batches: Sequence[dict[str, Tensor]], block: EvaMethod, least: int) -> list[dict[str, Tensor]]:
    """Batches joined until each has the tokens that its decomposition needs; the rest joins the last.

    PEFT passes over a batch with too few, and would wait for ever if all have.

    Args:
        batches: Of the sample.
        block: Says which tokens count.
        least: Tokens that each must have.

    Raises:
        UserError: All together have too few.
    """
    groups: list[list[dict[str, Tensor]]] = [[]]
    for batch in batches:
        if _tokens(groups[-1], block) >= least:
            groups.append([])
        groups[-1].append(batch)
    if len(groups) > 1 and _tokens(groups[-1], block) < least:
        groups[-2] += groups.pop()
    if (found := _tokens(groups[0], block)) < least:
        what = "labelled tokens" if block.use_label_mask else "tokens"
        raise UserError(
            f"eva: {len(batches)} batches hold {found} {what}, {least} are needed for r {block.r} x rho {block.rho:g}; "
            f"raise probe_steps{', set use_label_mask to false' if block.use_label_mask else ''}, or lower r or rho"
        )
    return [_joined(group) for group in groups]


def _tokens(batches: Sequence[dict[str, Tensor]], block: EvaMethod) -> int:
    return sum(int(counted(batch, block).sum()) for batch in batches)


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several batches as one, left-padded to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def wide(value: Tensor, filler: int) -> Tensor:
        return torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=filler)

    fillers = {name: IGNORED if name == "labels" else 0 for name in batches[0]}
    return {name: torch.cat([wide(batch[name], filler) for batch in batches]) for name, filler in fillers.items()}


@torch.no_grad()
def _explained(
    adapted: Any, block: EvaMethod, batches: Sequence[dict[str, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of the inputs' variance that lies in the span of A's rows, and in that of as many random directions."""
    layers, generator = _layers(adapted), torch.Generator().manual_seed(0)
    sums = {}
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight.float()
        chance = torch.randn(a.shape[1], a.shape[0], generator=generator).to(a.device)
        sums[name] = Sums([torch.linalg.qr(a.T).Q, torch.linalg.qr(chance).Q])
    mask = counted(batches[0], block)
    adapted.eval()
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def add(module: Any, inputs: tuple[Tensor, ...], own: Sums = sums[name]) -> None:
                own.add(inputs[0][mask])

            hooks.callback(layer.register_forward_pre_hook(add).remove)
        for batch in batches:
            mask = counted(batch, block)
            run(adapted, batch)
    shares = {name: own.shares() for name, own in sums.items()}
    return {name: own for name, (own, _) in shares.items()}, {name: chance for name, (_, chance) in shares.items()}


class Sums:
    """Of one module's inputs: what their variance, in all and within some directions, is computed from.

    Args:
        spans: Each the orthonormal columns of some directions: in x r.
    """

    def __init__(self, spans: Sequence[Tensor]) -> None:
        self.spans = [span.double() for span in spans]
        self.count = 0
        self.sums: list[Any] = [0.0] * (1 + len(spans))  # of inputs, then of their coordinates in each span
        self.squares: list[Any] = [0.0] * (1 + len(spans))

    def add(self, inputs: Tensor) -> None:
        """Tokens x in."""
        inputs = inputs.double()
        for i, part in enumerate([inputs, *(inputs @ span for span in self.spans)]):
            self.sums[i] = self.sums[i] + part.sum(dim=0)
            self.squares[i] = self.squares[i] + part.square().sum()
        self.count += len(inputs)

    def shares(self) -> list[float]:
        """Of all variance, that within each span."""
        every, *within = (
            float(square - total.square().sum() / self.count)
            for total, square in zip(self.sums, self.squares, strict=True)
        )
        return [part / every if every > 0 else 0.0 for part in within]


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
