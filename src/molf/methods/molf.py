"""MoLF: each module's update goes to its full weight or to a LoRA expert, whichever promises the larger descent."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from molf.config import Training
from molf.method_blocks import MolfEfficientMethod, MolfMethod
from molf.methods.sample import Sample
from molf.models import load_model
from molf.nn import Forward, MoLFConfig, apply_molf, defer_lora_gradients, derive_lora_gradients, merge_molf
from molf.optim import MoLFAdamW, molf_param_groups


def prepare(model: PreTrainedModel, block: MolfMethod, sample: Sample | None) -> PreTrainedModel:
    """Gives each target its experts; the base stays trained."""
    model = apply_molf(model.requires_grad_(True), experts(block, train_base=True, forward=block.forward))
    defer_lora_gradients(model)
    return model


def optimizer(model: PreTrainedModel, block: MolfMethod, training: Training) -> torch.optim.Optimizer:
    """The routed AdamW."""
    return routed_adamw(model, block, training, block.lora_learning_rate, block.lora_weight_decay)


def before_clip(model: PreTrainedModel) -> None:
    """Derives the experts' gradients from the effective weight's, once a step."""
    derive_lora_gradients(model)


def routed(block: MolfMethod) -> bool:
    """Yes."""
    return True


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Merges the experts, which ends the training, and writes all weights."""
    merge_molf(model).save_pretrained(directory)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads all weights; the base is not needed."""
    return load_model(directory, dtype)


def experts(block: MolfMethod | MolfEfficientMethod, train_base: bool, forward: Forward) -> MoLFConfig:
    """The experts that a block of either kind asks for."""
    return MoLFConfig(
        r=tuple(block.r),
        lora_alpha=block.lora_alpha,
        use_rslora=block.use_rslora,
        lora_dropout=block.lora_dropout,
        exclude_modules=tuple(block.exclude_modules),
        train_base=train_base,
        forward=forward,
    )


def routed_adamw(
    model: PreTrainedModel,
    block: MolfMethod | MolfEfficientMethod,
    training: Training,
    lora_learning_rate: float,
    lora_weight_decay: float,
) -> MoLFAdamW:
    """The optimizer that routes as a block of either kind says, with the two values for its LoRA experts."""
    groups = molf_param_groups(
        model,
        lr=block.learning_rate,
        lora_lr=lora_learning_rate,
        weight_decay=block.weight_decay,
        lora_weight_decay=lora_weight_decay,
    )
    return MoLFAdamW(
        groups,
        eps=1e-8,
        top_k=block.top_k,
        score=block.score,
        moments=training.moments,
        score_per=block.score_per,
        winners=block.winners,
        seed=torch.initial_seed(),  # the cell's: every process sets it before the model is made
    )
