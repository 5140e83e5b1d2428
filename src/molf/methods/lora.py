"""LoRA: one low-rank adapter on each linear layer, by PEFT, the base frozen; and relatives that change one thing of it.

rsLoRA another scale (Kalajdzievski 2023, arXiv 2312.03732), DoRA a trained magnitude beside the direction (Liu et al.
2024, arXiv 2402.09353), PiSSA another start (principal.py), LoRA+ a higher rate for B (Hayou, Ghosh and Yu 2024, arXiv
2402.12354), QLoRA a base of 4 bits (fourbit.py).
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from molf.adamw import make_adamw, plain_adamw, plain_param_groups
from molf.config import Training
from molf.errors import RunError
from molf.method_blocks import LoraMethod
from molf.methods import fourbit, principal
from molf.methods.sample import Sample
from molf.models import load_model
from molf.nn import whole


def prepare(model: PreTrainedModel, block: LoraMethod, sample: Sample | None) -> PreTrainedModel:
    """Adds the adapter, in the base's dtype, and freezes all else."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=block.r,
        lora_alpha=block.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it
        use_rslora=block.use_rslora,
        use_dora=block.use_dora,
        lora_dropout=block.lora_dropout,
        target_modules="all-linear",
        exclude_modules=list(block.exclude_modules) or None,
    )
    # PEFT would make float32 adapters on a bfloat16 base: another precision than the other methods'.
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    if block.init_lora_weights == "pissa":
        adapted.pissa = principal.start(targets(adapted))
    if block.base_bits is not None:
        adapted.quantization_error = fourbit.quantize(targets(adapted))
    for layer in targets(adapted).values() if block.use_dora else ():
        layer.register_buffer("start_magnitude", magnitude(layer).detach().clone(), persistent=False)
    return cast(PreTrainedModel, adapted)


def optimizer(model: PreTrainedModel, block: LoraMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW on the adapter; LoRA+ gives B groups of its own, at a multiple of the others' rate.

    PEFT makes such groups too, but decays them by rules of its own, and another optimizer than the other methods' would
    have other moments.
    """
    if block.loraplus_lr_ratio == 1:
        return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [p for name, p in trained if "lora_B" not in name]
    b = [p for name, p in trained if "lora_B" in name]
    fast = plain_param_groups(b, block.loraplus_lr_ratio * block.learning_rate, block.weight_decay)
    groups = plain_param_groups(others, block.learning_rate, block.weight_decay)
    made = make_adamw([*groups, *(group | {"factor": "B"} for group in fast)], training.moments)
    rates = Rates()
    made.register_step_pre_hook(rates)
    cast(Any, model).rates = rates
    return made


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: LoraMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes the adapter; PiSSA's as an ordinary one over the original base."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
        for name in ("target_modules", "exclude_modules"):  # sets, whose order is another in each process
            setattr(config, name, sorted(getattr(config, name) or []) or None)
    if hasattr(model, "quantization_error"):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / fourbit.NOTE).write_text(json.dumps({"bits": 4, "quant_type": "nf4"}) + "\n", encoding="utf-8")
    if not hasattr(model, "pissa"):
        model.save_pretrained(directory)
        return
    from safetensors.torch import save_file

    layers = targets(model)
    rank, tensors = principal.adapter(layers)
    ordinary: Any = copy.copy(model.peft_config["default"])
    ordinary.r, ordinary.use_rslora, ordinary.inference_mode = rank, False, True
    ordinary.lora_alpha = rank * principal.scale_of(next(iter(layers.values())))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    ordinary.save_pretrained(directory)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the base, rounded as it was in training, and merges the adapter into it."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(load_model(base, dtype), directory, autocast_adapter_dtype=False)
    if (directory / fourbit.NOTE).is_file():
        fourbit.round_trip(targets(adapted))
    return cast(PreTrainedModel, adapted.merge_and_unload())


def stateful(model: PreTrainedModel) -> dict[str, Any]:
    """PiSSA's start, LoRA+'s record of rates."""
    held: dict[str, Any] = {"start": principal.Start(targets(model))} if hasattr(model, "pissa") else {}
    return held | ({"rates": model.rates} if hasattr(model, "rates") else {})


@torch.no_grad()
def proof(model: PreTrainedModel, optimizer: torch.optim.Optimizer, block: LoraMethod) -> dict[str, Any]:
    """Every target's adapter has the scale that was asked for and moved, and what a relative adds did its part.

    Raises:
        RunError: It is not so; with the modules' names.
    """
    layers = targets(model)
    scale = block.lora_alpha / (math.sqrt(block.r) if block.use_rslora else block.r)
    require(layers, lambda layer: math.isclose(principal.scale_of(layer), scale), f"have another scale than {scale:g}")
    require(layers, _moved, "did not move: their B is what it was at the start")
    found: dict[str, Any] = {"modules": len(layers), "rank": block.r, "scale": scale}
    if block.use_dora:
        found["magnitude_change"] = _magnitude_change(layers, optimizer)
    if block.init_lora_weights == "pissa":
        found |= cast(Any, model).pissa
    if block.base_bits is not None:
        require(layers, fourbit.is_packed, "have a base that is not in 4 bits")
        found |= {"base_bits": block.base_bits, "quantization_error": cast(Any, model).quantization_error}
    if block.loraplus_lr_ratio != 1:
        found |= cast(Any, model).rates.held(block.loraplus_lr_ratio)
    return found


class Rates:
    """Between which bounds B's rate over A's lay, in all steps that had a rate: a hook of the optimizer's step."""

    def __init__(self) -> None:
        self.steps, self.least, self.most = 0, math.inf, 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        of: dict[bool, list[float]] = {True: [], False: []}
        for group in optimizer.param_groups:
            of[group.get("factor") == "B"].append(float(group["lr"]))
        if any(of[True] + of[False]):
            self.steps += 1
            ratios = [b / a if a else math.inf for b in of[True] for a in of[False]]
            self.least, self.most = min(self.least, *ratios), max(self.most, *ratios)

    def held(self, ratio: float) -> dict[str, float]:
        """The ratio, and in how many steps it was held.

        Raises:
            RunError: In some it was not.
        """
        if not (self.steps and math.isclose(self.least, ratio) and math.isclose(self.most, ratio)):
            raise RunError(
                f"LoRA+: over {self.steps} steps B's rate was {self.least:g} to {self.most:g} times A's, not {ratio:g}"
            )
        return {"rate_ratio": ratio, "rate_steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "least": self.least, "most": self.most}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.least, self.most = state["steps"], state["least"], state["most"]


def targets(model: PreTrainedModel) -> dict[str, Any]:
    """PEFT's LoRA layers, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def magnitude(layer: Any) -> torch.Tensor:
    """DoRA's m of a layer, (out,)."""
    return cast(torch.Tensor, layer.lora_magnitude_vector["default"].weight)


def require(layers: dict[str, Any], holds: Callable[[Any], bool], otherwise: str) -> None:
    """Asks something of every module.

    Raises:
        RunError: Of some it does not hold, or there is none.
    """
    broken = [name for name, layer in layers.items() if not holds(layer)]
    if broken or not layers:
        listed = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
        raise RunError(f"LoRA: {len(broken)} of {len(layers)} modules {otherwise} ({listed or 'there are none'})")


def _moved(layer: Any) -> bool:
    a, b = (whole(factor) for factor in principal.factors(layer))
    if hasattr(layer, principal.NAMES[0]):
        return not (torch.equal(a, layer.start_A) or torch.equal(b, layer.start_B))
    return bool(b.any())


def _magnitude_change(layers: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    """Checks that DoRA's magnitudes began at the norms of the base weights' rows and were trained.

    Returns:
        The mean of |m / m_0 - 1| over the rows of the module where it is least.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def began_at_norms(layer: Any) -> bool:
        rows, began = whole(layer.get_base_layer().weight).float().norm(dim=1), layer.start_magnitude.float()
        return bool(((began - rows).abs() <= 4 * torch.finfo(layer.start_magnitude.dtype).eps * rows).all())

    def relative(layer: Any) -> float:
        before, after = layer.start_magnitude.double(), whole(magnitude(layer)).double()
        return float(((after - before).abs() / before.clamp(min=1e-30)).mean())

    require(layers, lambda layer: "default" in layer.lora_magnitude_vector, "have no magnitude of DoRA's")
    require(layers, began_at_norms, "began with another magnitude than the norms of the base weight's rows")
    require(layers, lambda layer: id(magnitude(layer)) in trained, "have a magnitude that the optimizer does not train")
    require(layers, lambda layer: relative(layer) > 0, "have a magnitude that did not move")
    return min(relative(layer) for layer in layers.values())
