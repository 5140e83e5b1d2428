"""Full fine-tuning: every parameter, AdamW."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from molf.adamw import plain_adamw
from molf.config import Training
from molf.method_blocks import FftMethod
from molf.methods.sample import Sample
from molf.models import load_model


def prepare(model: PreTrainedModel, block: FftMethod, sample: Sample | None) -> PreTrainedModel:
    """Trains all parameters."""
    return model.requires_grad_(True)


def optimizer(model: PreTrainedModel, block: FftMethod, training: Training) -> torch.optim.Optimizer:
    """AdamW; biases and norms are not decayed."""
    return plain_adamw(model.parameters(), block.learning_rate, block.weight_decay, training.moments)


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
