"""MoLF-Efficient: the base frozen, each module's update goes to one of several LoRA experts of unlike ranks."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from molf.config import Training
from molf.method_blocks import MolfEfficientMethod
from molf.methods import lora
from molf.methods.sample import Sample
from molf.nn import MoLFConfig, apply_molf, save_peft_adapter
from molf.optim import MoLFAdamW, molf_param_groups


def prepare(model: PreTrainedModel, block: MolfEfficientMethod, sample: Sample | None) -> PreTrainedModel:
    """Gives each target its experts and freezes all else."""
    config = MoLFConfig(
        r=tuple(block.r),
        lora_alpha=block.lora_alpha,
        use_rslora=block.use_rslora,
        lora_dropout=block.lora_dropout,
        exclude_modules=tuple(block.exclude_modules),
        train_base=False,
        forward="dense",
    )
    return apply_molf(model, config)


def optimizer(model: PreTrainedModel, block: MolfEfficientMethod, training: Training) -> torch.optim.Optimizer:
    """The routed AdamW over the experts."""
    groups = molf_param_groups(
        model,
        lr=block.learning_rate,
        lora_lr=block.learning_rate,
        weight_decay=block.weight_decay,
        lora_weight_decay=block.weight_decay,
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


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do: the dense forward gives every expert its gradient."""


def routed(block: MolfEfficientMethod) -> bool:
    """Yes."""
    return True


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes the experts as one ordinary PEFT adapter of the summed rank."""
    save_peft_adapter(model, directory, str(base))


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads it as what it is, a LoRA adapter."""
    return lora.load(base, directory, dtype)
