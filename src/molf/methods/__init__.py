"""The adaptation methods, one file each, every file the same functions in the same order.

prepare(model, block) -> model              what is trained, what is frozen
optimizer(model, block, training) -> ...    with its parameter groups, in the precision that `training` asks for
before_clip(model) -> None                  after an optimizer step's last backward, before gradients are clipped
routed(block) -> bool                       whether the optimizer routes, so that a record of it must exist
save(model, directory, base) -> None        weights or adapter, safetensors only
load(base, directory, dtype) -> model       the trained model, ready to be asked
"""

from types import ModuleType

from molf.methods import fft, lora, molf, molf_e

METHODS: dict[str, ModuleType] = {"fft": fft, "lora": lora, "molf": molf, "molf-e": molf_e}

# Kinds whose weights are a small file beside the base model (`training.keep: adapter-only`).
ADAPTERS = frozenset({"lora", "molf-e"})


def keeps_weights(keep: str, kind: str) -> bool:
    """Whether `training.keep` lets a cell's weights stay after their evaluation."""
    return keep == "all" or (keep == "adapter-only" and kind in ADAPTERS)
