"""The adaptation methods, one file each, named as its block's kind; all have the same functions in the same order.

prepare(model, block, sample) -> model      what is trained, what is frozen
optimizer(model, block, training) -> ...    with its parameter groups, in the precision that `training` asks for
before_clip(model) -> None                  after an optimizer step's last backward, before gradients are clipped
routed(block) -> bool                       whether the optimizer routes, so that a record of it must exist
save(model, directory, base) -> None        weights or adapter, safetensors only
load(base, directory, dtype) -> model       the trained model, ready to be asked

`sample` is a `methods.sample.Sample` of the training's data; None where only shapes matter (an estimate, a benchmark,
the whole of a sharded model): a method that looks at data then takes its uniform form.

Where a method has something to do there, its file goes on with (`optional` looks them up):

penalty(model) -> Tensor | None             scalar, added to the mean loss of each optimizer step, not to what is shown
after_step(model, step, steps) -> None      after optimizer step `step` of `steps`, from 1 on, the gradients still there
stateful(model) -> dict[str, Stateful]      what a checkpoint holds beside weights and optimizer (`resume.Stateful`)
proof(model, optimizer, block) -> dict      after the last step, before `save`, in every process: that the method did
                                            what it claims, as plain data for summary.json; RunError if it did not.
                                            Its `seconds`, of looking at data in `prepare`, join the training's time,
                                            its `warnings` the cell's; `ranks`, {module: rank}, are drawn in the report
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from molf.closure import of_method
from molf.method_blocks import KINDS

# By the names of their blocks' kinds. Not imported by statements: a new file changes no other method's code.
METHODS: dict[str, ModuleType] = {kind: import_module(of_method(kind)) for kind in KINDS}

# Kinds whose weights are a small file beside the base model (`training.keep: adapter-only`).
ADAPTERS = frozenset(kind for kind, block in KINDS.items() if block.adapter)


def optional(
    method: ModuleType, name: Literal["penalty", "after_step", "stateful", "proof"]
) -> Callable[..., Any] | None:
    """A function that a method may lack, or None."""
    return getattr(method, name, None)


def keeps_weights(keep: str, kind: str) -> bool:
    """Whether `training.keep` lets a cell's weights stay after their evaluation."""
    return keep == "all" or (keep == "adapter-only" and kind in ADAPTERS)
