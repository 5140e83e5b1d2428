"""Mixture of LoRA and full fine-tuning: experts for linear layers and the optimizer that routes between them.

from molf import MoLFConfig, apply_molf, MoLFAdamW, merge_molf, molf_param_groups
"""

from molf.nn import (
    MoLFConfig,
    MoLFLinear,
    apply_molf,
    defer_lora_gradients,
    derive_lora_gradients,
    merge_molf,
    molf_modules,
    molf_to_peft,
    save_peft_adapter,
)
from molf.optim import MoLFAdamW, Routing, molf_param_groups
from molf.routing import RoutingError, RoutingRecorder

__all__ = [
    "MoLFAdamW",
    "MoLFConfig",
    "MoLFLinear",
    "Routing",
    "RoutingError",
    "RoutingRecorder",
    "apply_molf",
    "defer_lora_gradients",
    "derive_lora_gradients",
    "merge_molf",
    "molf_modules",
    "molf_param_groups",
    "molf_to_peft",
    "save_peft_adapter",
]
