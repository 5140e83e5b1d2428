"""MoLF-Efficient: the base frozen, each module's update goes to one of several LoRA experts of unlike ranks."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from molf.config import Training
from molf.method_blocks import MolfEfficientMethod
from molf.methods import lora
from molf.methods.molf import experts, routed_adamw
from molf.methods.sample import Sample
from molf.nn import apply_molf, save_peft_adapter


def prepare(model: PreTrainedModel, block: MolfEfficientMethod, sample: Sample | None) -> PreTrainedModel:
    """Gives each target its experts and freezes all else."""
    return apply_molf(model, experts(block, train_base=False, forward="dense"))


def optimizer(model: PreTrainedModel, block: MolfEfficientMethod, training: Training) -> torch.optim.Optimizer:
    """The routed AdamW over the experts."""
    return routed_adamw(model, block, training, block.learning_rate, block.weight_decay)


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
