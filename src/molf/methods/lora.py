"""LoRA: one low-rank adapter on each linear layer, by PEFT, the base frozen."""

from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from molf.adamw import plain_adamw
from molf.config import Training
from molf.method_blocks import LoraMethod
from molf.methods.sample import Sample
from molf.models import load_model


def prepare(model: PreTrainedModel, block: LoraMethod, sample: Sample | None) -> PreTrainedModel:
    """Adds the adapter, in the base's dtype, and freezes all else."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=block.r,
        lora_alpha=block.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it
        use_rslora=block.use_rslora,
        lora_dropout=block.lora_dropout,
        target_modules="all-linear",
        exclude_modules=list(block.exclude_modules) or None,
    )
    # PEFT would make float32 adapters on a bfloat16 base: another precision than the other methods'.
    return cast(PreTrainedModel, get_peft_model(model, config, autocast_adapter_dtype=False))


def optimizer(model: PreTrainedModel, block: LoraMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW on the adapter."""
    return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: LoraMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes the adapter."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
        for name in ("target_modules", "exclude_modules"):  # sets, whose order is another in each process
            setattr(config, name, sorted(getattr(config, name) or []) or None)
    model.save_pretrained(directory)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the base and merges the adapter into it."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_model(base, dtype), directory, autocast_adapter_dtype=False)
    return adapted.merge_and_unload()
