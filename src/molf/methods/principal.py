"""PiSSA's start of a LoRA adapter, and its end as an ordinary one (Meng, Wang and Zhang 2024, arXiv 2404.02948).

Of each target's weight W = U S V^T (out x in) the r largest singular values become the adapter; the rest stays frozen:

    B0 = U_r sqrt(S_r / s)     A0 = sqrt(S_r / s) V_r^T     W_res = W - s B0 A0

so that step 0 is the base model up to rounding. W_res is nobody's checkpoint. So what is saved is the change of W
itself, s B A - s B0 A0, which is an adapter of rank 2 r over the original base: A over A0, B beside -B0.
"""

import time
from typing import Any

import torch
from torch import Tensor

from molf.errors import RunError

NAMES = ("start_A", "start_B")  # buffers of a LoRA layer beside its factors, kept for the end


@torch.no_grad()
def start(layers: dict[str, Any]) -> dict[str, float]:
    """Gives each layer its principal factors and leaves it the rest of its weight.

    Args:
        layers: PEFT's LoRA layers by name, their adapters of no effect yet.

    Returns:
        The largest of all layers' `start_error`, |W_res + s B0 A0 - W| / |W|, and of their `residual`, |W_res| over the
        least that any factors of rank r could leave (Eckart and Young), in Frobenius norms; and the `seconds` it took.

    Raises:
        ValueError: A weight has fewer singular values than the rank.
        RunError: Either is further from 0, or from 1, than rounding explains.
    """
    found, began = {"start_error": 0.0, "residual": 1.0}, time.perf_counter()
    for name, layer in layers.items():
        a, b = factors(layer)
        weight, rank, scale = layer.get_base_layer().weight, a.shape[0], scale_of(layer)
        if rank > min(weight.shape):
            raise ValueError(f"PiSSA takes {rank} singular values (r), but {name} has {min(weight.shape)}")
        if weight.is_meta:  # only shapes are asked for
            keep(layer, a.clone(), b.clone())
            continue
        original = wide(weight).clone()
        u, values, vt = torch.linalg.svd(original, full_matrices=False)
        root = (values[:rank] / scale).sqrt()
        a.copy_(root[:, None] * vt[:rank])
        b.copy_(u[:, :rank] * root)
        keep(layer, a.clone(), b.clone())
        weight.copy_(original - change(layer))
        rest = values.sort(descending=True).values[rank:]
        size, least, left = (float(x.double().norm()) for x in (original, rest, weight))
        error = float((wide(weight) + change(layer) - original).double().norm())
        rounding = 8 * torch.finfo(weight.dtype).eps * size
        if not (error <= rounding and abs(left - least) <= rounding + 1e-4 * size):
            raise RunError(
                f"PiSSA: {name} begins {error / size:.2g} off the base weight and keeps {left:.6g} of its {size:.6g}, "
                f"where {rank} singular values could leave {least:.6g}: its singular value decomposition failed"
            )
        found["start_error"] = max(found["start_error"], error / size)
        if least > rounding:
            found["residual"] = max(found["residual"], left / least)
    return found | {"seconds": time.perf_counter() - began}


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r x in) and B (out x r) of a layer's only adapter."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def scale_of(layer: Any) -> float:
    """s of s B A."""
    return float(layer.scaling["default"])


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def change(layer: Any) -> Tensor:
    """s B0 A0, out x in, in float32 at least."""
    a, b = (wide(getattr(layer, name)) for name in NAMES)
    return scale_of(layer) * (b @ a)


def keep(layer: Any, a: Tensor, b: Tensor) -> None:
    """Notes a layer's start."""
    for name, value in zip(NAMES, (a, b), strict=True):
        layer.register_buffer(name, value.detach(), persistent=False)


class Start:
    """Where all layers began, for a checkpoint.

    A training that goes on decomposes its weights anew. On other hardware that may turn singular vectors whose values
    lie close together; then the noted start counts, and what was left of the weights follows it.
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers

    def state_dict(self) -> dict[str, Any]:
        return {name: {own: getattr(layer, own) for own in NAMES} for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            noted = [state[name][own].to(getattr(layer, own)) for own in NAMES]
            if all(torch.equal(getattr(layer, own), value) for own, value in zip(NAMES, noted, strict=True)):
                continue
            weight = layer.get_base_layer().weight
            if hasattr(weight, "placements"):
                raise RunError(
                    f"PiSSA: {name} decomposes otherwise here than where the checkpoint was written, and a sharded "
                    "weight cannot follow it: set training.sharding to ddp, or go on where the training began"
                )
            original = wide(weight) + change(layer)
            keep(layer, *noted)
            weight.copy_(original - change(layer))


def adapter(layers: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """What a trained PiSSA changed, as an ordinary adapter over the original base.

    Returns:
        Its rank, 2 r, and its tensors under PEFT's names; PEFT must scale them by the layers' own s.
    """
    tensors, rank = {}, 0
    for name, layer in layers.items():
        (a, b), (a0, b0) = factors(layer), (getattr(layer, own) for own in NAMES)
        tensors[f"{name}.lora_A.weight"] = torch.cat([a.detach(), a0]).contiguous().cpu()
        tensors[f"{name}.lora_B.weight"] = torch.cat([b.detach(), -b0], dim=1).contiguous().cpu()
        rank = 2 * a.shape[0]
    return rank, tensors
