"""Full fine-tuning: every parameter, AdamW."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from molf.config import FftMethod, Training
from molf.models import load_model


def prepare(model: PreTrainedModel, block: FftMethod) -> PreTrainedModel:
    """Trains all parameters."""
    return model.requires_grad_(True)


def optimizer(model: PreTrainedModel, block: FftMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW; biases and norms are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": block.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=block.learning_rate, eps=1e-8, fused=True
    )


def before_clip(model: PreTrainedModel) -> None:
    """Nothing to do."""


def routed(block: FftMethod) -> bool:
    """No."""
    return False


def save(model: PreTrainedModel, directory: Path, base: Path) -> None:
    """Writes all weights."""
    model.save_pretrained(directory)


def load(base: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads all weights; the base is not needed."""
    return load_model(directory, dtype)
