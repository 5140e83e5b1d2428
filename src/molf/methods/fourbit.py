"""A base of 4 bits below a LoRA adapter: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Each target's weight is held as NF4: one of 16 quantiles of a normal distribution for each number, times a scale that 64
numbers share; the scales are 8-bit numbers themselves, in blocks of 256 (double quantization). Every forward and every
backward makes the weight anew from that, so that what is trained, asked and merged is the model of the rounded weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from molf.errors import RunError, UserError

NOTE = "molf_base.json"  # beside an adapter that was trained over such a base
BLOCK = 64  # numbers that share a scale
PER_WEIGHT = 0.5 + (1 + 4 / 256) / BLOCK  # bytes
MOST_LOST = 0.3  # of a weight's norm; few large numbers among many small ones lose more than normal ones do


@torch.no_grad()
def quantize(layers: dict[str, Any]) -> float:
    """Puts a 4-bit base below each adapter; on the meta device, where only shapes are asked for, nothing changes.

    Args:
        layers: PEFT's LoRA layers by name.

    Returns:
        The largest |Q(W) - W| / |W| of all layers, Frobenius norms.

    Raises:
        UserError: bitsandbytes is not installed.
        ValueError: A layer's inputs are no whole blocks.
        RunError: A weight is not what went in.
    """
    worst = 0.0
    for name, layer in layers.items():
        linear = layer.base_layer
        if linear.in_features % BLOCK:  # bitsandbytes 0.50 unpacks other numbers on the host
            raise ValueError(f"base_bits: 4 takes {BLOCK} inputs at a time, and {name} has {linear.in_features}")
        if linear.weight.is_meta:
            continue
        layer.base_layer = _packed(linear)
        lost = (dequantized(layer.base_layer) - linear.weight).double().norm() / linear.weight.double().norm()
        if not lost < MOST_LOST:
            raise RunError(
                f"QLoRA: 4 bits lost {100 * float(lost):.0f} % of {name}; of normally distributed weights they lose 9 %"
            )
        worst = max(worst, float(lost))
    return worst


@torch.no_grad()
def round_trip(layers: dict[str, Any]) -> None:
    """Gives the base weight below each adapter the values that it had while that was trained, as an ordinary weight."""
    for layer in layers.values():
        layer.base_layer.weight.copy_(dequantized(_packed(layer.base_layer)))


def is_packed(layer: Any) -> bool:
    """Whether the base below an adapter is in 4 bits."""
    weight = layer.base_layer.weight
    state = getattr(weight, "quant_state", None)
    return weight.dtype == torch.uint8 and state is not None and state.quant_type == "nf4"


def dequantized(linear: nn.Module) -> Tensor:
    """The weight (out x in) that a packed linear computes with."""
    weight: Any = linear.weight
    found: Tensor = _library().functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


def _packed(linear: nn.Linear) -> nn.Module:
    library, dtype = _library(), linear.weight.dtype
    made: nn.Module = library.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = library.nn.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    made.bias = linear.bias
    return made.to(linear.weight.device)  # bitsandbytes quantizes as it moves


def _library() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("base_bits: 4 needs bitsandbytes, which is not installed: pip install 'molf[qlora]'") from None
    return bitsandbytes
