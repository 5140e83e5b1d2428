"""AdaLoRA: adapters in the shape of a singular value decomposition, begun too wide and cut to a budget of ranks.

Each target learns P diag(lambda) Q, kept near an SVD by a penalty on P and Q; in training the least important triplets
of the whole model lose their lambda, so that ranks go where they matter (Zhang et al. 2023, arXiv 2303.10512), by PEFT.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molf.adamw import plain_adamw
from molf.config import Training
from molf.errors import RunError, UserError
from molf.method_blocks import AdaLoraMethod
from molf.methods import lora
from molf.methods.sample import Sample

LEAST_CUTS = 2  # below that nothing is cut step by step, which is what the method is about


def prepare(model: PreTrainedModel, block: AdaLoraMethod, sample: Sample | None) -> PreTrainedModel:
    """Adds the adapters at their first rank, in the base's dtype, and freezes all else.

    Raises:
        UserError: The training has too few steps to cut ranks in.
    """
    from peft import AdaLoraConfig, get_peft_model

    from molf.methods.allocator import Allocator

    steps = sample.steps if sample is not None else 1
    first, last = phases(block, steps) if sample is not None else (0, 0)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_r=block.target_r,
        init_r=block.init_r,
        lora_alpha=block.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=block.lora_dropout,
        target_modules="all-linear",
        exclude_modules=list(block.exclude_modules) or None,
        tinit=first,
        tfinal=last,
        total_step=steps,
        deltaT=block.deltaT,
        beta1=block.beta1,
        beta2=block.beta2,
        orth_reg_weight=block.orth_reg_weight,
    )
    # PEFT would make float32 adapters on a bfloat16 base: another precision than the other methods'.
    adapted = cast(Any, get_peft_model(model, config, autocast_adapter_dtype=False))
    tuner = adapted.base_model
    tuner.rankallocator = Allocator(tuner.model, config, tuner.trainable_adapter_name)
    for layer in _layers(adapted).values():  # PEFT's cast to bfloat16 makes this constant divisor a trained parameter
        layer.ranknum.requires_grad_(False)
    return cast(PreTrainedModel, adapted)


def phases(block: AdaLoraMethod, steps: int) -> tuple[int, int]:
    """Steps before the first cut, and steps after the last.

    Raises:
        UserError: Between them are fewer than `LEAST_CUTS` cuts.
    """
    first, last = int(block.tinit * steps), int(block.tfinal * steps)
    cuts = 1 + sum(step % block.deltaT == 0 for step in range(first + 1, steps - last))
    if cuts < LEAST_CUTS:
        raise UserError(
            f"adalora: of {steps} optimizer steps tinit ({block.tinit:g}) leaves the first {first} without a cut and "
            f"tfinal ({block.tfinal:g}) the last {last}; with deltaT {block.deltaT} that leaves {cuts} cuts of ranks, "
            f"{LEAST_CUTS} are the least. Give the task more rows, raise training.epochs, or lower deltaT, tinit "
            "or tfinal"
        )
    return first, last


def optimizer(model: PreTrainedModel, block: AdaLoraMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW on the adapters."""
    return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: AdaLoraMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes what is left as an ordinary LoRA adapter of unlike ranks, lambda folded into A; rank 0 is left out."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    own, rank = _tuner(model).trainable_adapter_name, _config(model).target_r
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        values, a, b = _factors(model, layer)
        kept = _kept(model, name, values)
        if not kept.any():
            continue
        ranks[name], scale = int(kept.sum()), float(layer.scaling[own] / (layer.ranknum[own] + 1e-5))
        # The product that the forward takes, in its dtype; the scale stands in the configuration.
        tensors[f"base_model.model.{name}.lora_A.weight"] = (a * values)[kept].detach().contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b[:, kept].detach().contiguous().cpu()
    unlike = {name: own for name, own in ranks.items() if own != rank}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        rank_pattern=unlike,
        alpha_pattern={name: scale * own for name, own in unlike.items()},  # type: ignore[misc]
    )
    config.target_modules = sorted(ranks)  # type: ignore[assignment]  # PEFT's set has another order in each process
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads it as what it is, a LoRA adapter."""
    return lora.load(base, directory, dtype)


def penalty(model: PreTrainedModel) -> Tensor | None:
    """How far P and Q are from orthogonal, weighted: the mean over all of |M M^T - 1| (Frobenius), as PEFT has it.

    PEFT adds it to a loss that the model itself computes; ours is computed outside.
    """
    weight = _config(model).orth_reg_weight
    if not weight:
        return None
    terms = []
    for layer in _layers(model).values():
        _, a, b = _factors(model, layer)
        for rows in (a.float(), b.float().T):
            gram = rows @ rows.T
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return weight * torch.stack(terms).mean()


def after_step(model: PreTrainedModel, step: int, steps: int) -> None:
    """Notes each entry's importance, and cuts ranks where that is due."""
    tuner, config = _tuner(model), _config(model)
    if steps != config.total_step:
        raise RunError(f"AdaLoRA's schedule is made for {config.total_step} optimizer steps, the training has {steps}")
    if step != tuner.rankallocator.steps + 1:
        raise RunError(f"AdaLoRA saw {tuner.rankallocator.steps} optimizer steps and is told of step {step} now")
    tuner.update_and_allocate(step)
    tuner.rankallocator.steps = step


def stateful(model: PreTrainedModel) -> dict[str, Any]:
    """The allocator."""
    return {"allocator": _tuner(model).rankallocator}


def proof(model: PreTrainedModel, optimizer: torch.optim.Optimizer, block: AdaLoraMethod) -> dict[str, Any]:
    """Ranks at the end, by module, their budget, and how they came about.

    Raises:
        RunError: A step passed the allocator by, the budget is not met, or what was cut is there again.
    """
    allocator, config = _tuner(model).rankallocator, _config(model)
    if allocator.steps != config.total_step:
        raise RunError(
            f"AdaLoRA: ranks were looked at in {allocator.steps} of {config.total_step} optimizer steps; without that "
            "it is LoRA of too high a rank"
        )
    values = {name: _factors(model, layer)[0].detach() for name, layer in _layers(model).items()}
    kept = {name: _kept(model, name, own) for name, own in values.items()}
    back = [name for name, own in values.items() if own[~kept[name]].any()]
    if back:
        raise RunError(f"AdaLoRA: {len(back)} modules have singular values that were cut: {', '.join(back[:3])}")
    ranks, budget = {name: int(own.sum()) for name, own in kept.items()}, block.target_r * len(kept)
    if sum(ranks.values()) != budget:
        raise RunError(
            f"AdaLoRA: ranks at the end sum to {sum(ranks.values())}, the budget is {budget}: {block.target_r} in each "
            f"of {len(kept)} modules"
        )
    uniform = len(set(ranks.values())) == 1
    columns = zip(*allocator.thinned_trajectory(), strict=True)
    return {
        "ranks": ranks,
        "ranks_at_start": block.init_r,
        "budget": budget,
        "allocations": len(allocator.trajectory),
        "trajectory": dict(zip(("step", "min", "mean", "max"), map(list, columns), strict=True)),
        "warnings": [f"every module ended with rank {block.target_r}: AdaLoRA moved no rank"] if uniform else [],
    }


def _tuner(model: PreTrainedModel) -> Any:
    return cast(Any, model).base_model


def _config(model: PreTrainedModel) -> Any:
    return _tuner(model).peft_config[_tuner(model).trainable_adapter_name]


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """PEFT's layer of each target, by the target's name in the base model."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    return {name: layer for name, layer in _tuner(model).model.named_modules() if isinstance(layer, AdaLoraLayer)}


def _factors(model: PreTrainedModel, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Lambda (r x 1), Q (r x in), P (out x r)."""
    own = _tuner(model).trainable_adapter_name
    return layer.lora_E[own], layer.lora_A[own], layer.lora_B[own]


def _kept(model: PreTrainedModel, name: str, values: Tensor) -> Tensor:
    """Which of a target's triplets stay: all before the first cut."""
    tuner = _tuner(model)
    mask = tuner.rankallocator.masks.get(f"{name}.lora_E.{tuner.trainable_adapter_name}")
    return torch.tensor(mask or [True] * len(values), device=values.device)
