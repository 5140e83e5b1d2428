"""LoRA on the layers that matter most to the task, which a short gradient probe ranks, with ranks by importance.

The idea is Aletheia's (Saket 2026, arXiv 2604.15351): norms of gradients on a few batches rank the layers, the upper
part of the ranking gets adapters. What is decided here beyond that stands in docs/methods.md.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from molf.adamw import plain_adamw
from molf.collective import agreed
from molf.config import Training
from molf.errors import RunError
from molf.method_blocks import SelectedMethod
from molf.methods import lora
from molf.methods.sample import Sample, completion_loss
from molf.models import to_device
from molf.modules import place


@dataclass(frozen=True)
class Selection:
    """What was chosen, and by what."""

    ranks: dict[str, int]  # of each module that gets an adapter
    importance: dict[int, float]  # of every layer, by number; empty where nothing was looked at
    budget: int  # parameters that the adapters may have
    seconds: float  # that the probe took

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers with adapters."""
        return sorted({place(name)[1] for name in self.ranks})


# --- the functions of every method -----------------------------------------------------------------------------------


def prepare(model: PreTrainedModel, block: SelectedMethod, sample: Sample | None) -> PreTrainedModel:
    """Probes, chooses, adds the adapters in the base's dtype and freezes all else.

    Without a sample the layers are spread evenly from the lowest on, their ranks alike: no choice of as many layers
    costs more time or memory.
    """
    if sample is None:
        return adapt(model, block, {})
    began = time.perf_counter()
    to_device(model, None)
    names = list(targets(model, block.exclude_modules))
    batches = sample.batches(block.probe_steps * sample.accumulation)
    # One process looks for all, so that they agree to the bit on any device.
    found = agreed(lambda: importance(model, names, batches))
    return adapt(model, block, found, time.perf_counter() - began)


def optimizer(model: PreTrainedModel, block: SelectedMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW on the adapters."""
    return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: SelectedMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes an ordinary PEFT adapter, which names its modules and their ranks."""
    lora.save(model, directory, base)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the base and merges the adapter into it."""
    return lora.load(base, directory, dtype)


def proof(model: PreTrainedModel, optimizer: torch.optim.Optimizer, block: SelectedMethod) -> dict[str, Any]:
    """That the chosen modules and no others have adapters, of the chosen ranks, within the budget, all of them trained.

    Raises:
        RunError: One of these is not so.
    """
    chosen = selection(model)
    pairs = {
        name: (module.lora_A["default"].weight, module.lora_B["default"].weight) for name, module in _adapted(model)
    }
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    if ranks != chosen.ranks:
        differ = sorted(name for name in ranks | chosen.ranks if ranks.get(name) != chosen.ranks.get(name))
        raise RunError(
            f"selected: {', '.join(differ[:3])} should have other adapters than found; was the model changed?"
        )
    still = [name for name, (_, b) in pairs.items() if not b.any()]
    if still:
        raise RunError(f"selected: {len(still)} of {len(pairs)} adapters were never trained, such as {still[0]}")
    spent = sum(a.numel() + b.numel() for a, b in pairs.values())
    if spent > chosen.budget:
        raise RunError(f"selected: the adapters have {spent} parameters, {chosen.budget} are the budget")
    return {
        "ranks": ranks,
        "ranks_at_start": block.r,
        "budget": chosen.budget,
        "parameters": spent,
        "layers": chosen.layers,
        "lowest_layer": chosen.layers[0],  # below it no backward runs
        "importance": {str(layer): value for layer, value in chosen.importance.items()},
        "seconds": chosen.seconds,
    }


# --- the probe -------------------------------------------------------------------------------------------------------


def targets(model: PreTrainedModel, excluded: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that uniform LoRA would adapt: all linear ones but the output head and the excluded.

    Raises:
        ValueError: There is none.
    """
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not any(name == other or name.endswith("." + other) for other in excluded)
    }
    if not found:
        raise ValueError("no linear layer is left to adapt; look at exclude_modules")
    return found


def importance(model: PreTrainedModel, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean square of the entries of each weight's gradient, over the batches: the diagonal Fisher information's mean.

        I_m = 1 / |B| sum_b || dL_b / dW_m ||_F^2 / size(W_m)

    Each gradient is freed as soon as it is summed up, so that one exists at a time. Weights, their `requires_grad` and
    their gradients are as before afterwards.

    Args:
        model: Not adapted yet.
        names: Of the modules to look at.
        batches: The collator's.

    Raises:
        RunError: A gradient is not finite.
    """
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in names}
    sums = {name: torch.zeros((), dtype=torch.float64, device=weight.device) for name, weight in weights.items()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def take(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        sums[name] += norm.double().square()
        weight.grad = None

    hooks = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(take, name)))
        with torch.enable_grad():
            for batch in batches:
                completion_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient
    found = {name: float(value) / len(batches) / weights[name].numel() for name, value in sums.items()}
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        raise RunError(
            f"selected: the probe's gradient of {broken[0]} is not finite; look at the task's first examples"
        )
    return found


# --- the choice ------------------------------------------------------------------------------------------------------


def adapt(
    model: PreTrainedModel, block: SelectedMethod, importance: Mapping[str, float], seconds: float = 0.0
) -> PreTrainedModel:
    """Adds adapters by importance, of each target by name; where it is empty, evenly spread ones of one rank.

    Raises:
        ValueError: The budget leaves a chosen module less than rank 1, or no layer is a target.
    """
    from peft import LoraConfig, get_peft_model

    found = targets(model, block.exclude_modules)
    shapes = {name: tuple(cast(Tensor, module.weight).shape) for name, module in found.items()}
    costs = {name: sum(shape) for name, shape in shapes.items()}
    budget = math.floor(block.budget * block.r * sum(costs.values()))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    of_layer = of_layers(importance, sizes)
    if importance:
        kept = best(of_layer, block.share)
    else:
        layers = sorted({place(name)[1] for name in found})
        count = how_many(len(layers), block.share)
        kept = [layers[i * len(layers) // count] for i in range(count)]
    chosen = [name for name in found if place(name)[1] in kept]
    ranks = shared_out(
        {name: importance.get(name, 1.0) ** block.exponent for name in chosen},
        {name: costs[name] for name in chosen},
        {name: min(shapes[name]) for name in chosen},
        budget,
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=block.r,
        rank_pattern=dict(ranks),
        lora_alpha=block.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it
        use_rslora=block.use_rslora,
        lora_dropout=block.lora_dropout,
        target_modules=chosen,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.selection = Selection(ranks, of_layer, budget, seconds)  # type: ignore[assignment]
    return cast(PreTrainedModel, adapted)


def selection(model: nn.Module) -> Selection:
    """What was chosen for an adapted model."""
    return cast(Selection, model.selection)


def of_layers(importance: Mapping[str, float], sizes: Mapping[str, int]) -> dict[int, float]:
    """The same mean over each layer's weights, from that over each module's.

    Args:
        importance: Of modules, by name.
        sizes: Of their weights.
    """
    layers: dict[int, list[str]] = {}
    for name in importance:
        layers.setdefault(place(name)[1], []).append(name)
    return {
        layer: sum(importance[name] * sizes[name] for name in names) / sum(sizes[name] for name in names)
        for layer, names in sorted(layers.items())
    }


def how_many(layers: int, share: float) -> int:
    """Layers that a share of them is, rounded up."""
    return math.ceil(share * layers - 1e-9)


def best(layers: Mapping[int, float], share: float) -> list[int]:
    """The most important layers' numbers, in their order; of equals the lower one."""
    ranking = sorted(layers, key=lambda layer: (-layers[layer], layer))
    return sorted(ranking[: how_many(len(layers), share)])


def shared_out(
    weights: Mapping[str, float], costs: Mapping[str, int], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks in proportion to the weights, between 1 and `most`, that together cost the budget or hardly less.

    What rounding down leaves goes to the largest fractions first, as in elections.

    Args:
        weights: At least 0.
        costs: Parameters that a rank costs.
        most: Highest rank that makes sense.
        budget: In parameters.

    Raises:
        ValueError: The budget does not reach for rank 1 everywhere.
    """
    if sum(costs.values()) > budget:
        raise ValueError(
            f"{len(costs)} modules of rank 1 need {sum(costs.values())} parameters, the budget has {budget}; "
            "raise r or budget, or lower share"
        )
    largest = max(weights.values()) or 1.0
    scaled = {name: max(weight / largest, 1e-9) for name, weight in weights.items()}

    def wanted(level: float) -> dict[str, float]:
        return {name: min(max(level * weight, 1.0), float(most[name])) for name, weight in scaled.items()}

    # The cost grows with the level: bisection down to neighbouring floats.
    low, high = 0.0, max(most.values()) / min(scaled.values())
    while low < (middle := (low + high) / 2) < high:
        if sum(costs[name] * rank for name, rank in wanted(middle).items()) <= budget:
            low = middle
        else:
            high = middle
    exact = wanted(low)
    ranks = {name: math.floor(rank + 1e-9) for name, rank in exact.items()}
    left = budget - sum(costs[name] * rank for name, rank in ranks.items())
    order = sorted(ranks, key=lambda name: ranks[name] - exact[name])  # stable: of equals the first
    while fitting := [name for name in order if costs[name] <= left and ranks[name] < most[name]]:
        for name in fitting:
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
    return ranks


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules with an adapter, by their names in the base model."""
    from peft.tuners.lora import LoraLayer

    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
