"""kernels.py's `advance` and `move` for CUDA, in Triton: all tensors in one launch, each element read and written once.

A launch gets tables of addresses, so that the number of tensors costs nothing; a loser's tensors are not touched at
all. Nothing is read back to the host. Float32 only; the rest runs kernels.py.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from molf.kernels import SCORES, to_device

BLOCK = 2048  # elements of one program


@triton.jit
def _advance(table, chunks, partial, tensors, width, w1, b2, w2, eps, SCORE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # table: (4, tensors) of addresses of g, m, v and of sizes; chunks: (programs, 2) of tensor and first element
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    g = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    m = tl.load(table + tensors + tensor).to(tl.pointer_type(tl.float32))
    v = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
    size = tl.load(table + 3 * tensors + tensor)
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(g + at, mask=inside, other=0.0)
    first = tl.load(m + at, mask=inside, other=0.0)
    second = tl.load(v + at, mask=inside, other=0.0)
    first += (x - first) * w1
    second = second * b2 + x * x * w2
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    if SCORE != 0:
        ratio = first / (tl.sqrt(second) + eps)
        other = first if SCORE == 1 else ratio
        tl.store(partial + tensor * width + start // BLOCK, tl.sum(other * ratio, axis=0))


@triton.jit
def _move(table, numbers, chunks, wins, tensors, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # table: (4, tensors) of addresses of p, m, v and of sizes; numbers: (3, tensors) of keep, rate, root
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program)
    if tl.load(wins + tensor) != 0:
        start = tl.load(chunks + 2 * program + 1)
        p = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
        m = tl.load(table + tensors + tensor).to(tl.pointer_type(tl.float32))
        v = tl.load(table + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
        size = tl.load(table + 3 * tensors + tensor)
        keep = tl.load(numbers + tensor)
        rate = tl.load(numbers + tensors + tensor)
        root = tl.load(numbers + 2 * tensors + tensor)
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        first = tl.load(m + at, mask=inside, other=0.0)
        second = tl.load(v + at, mask=inside, other=0.0)
        weight = tl.load(p + at, mask=inside, other=0.0)
        weight = weight * keep - rate * (first / (tl.sqrt(second) * root + eps))
        tl.store(p + at, weight, mask=inside)


def serves(weight: Tensor, moment: Tensor) -> bool:
    """Whether these kernels can take a parameter."""
    return weight.dtype == moment.dtype == torch.float32 and weight.is_contiguous() and moment.is_contiguous()


def advance(
    gradients: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    score: str | None,
) -> Tensor:
    """As `kernels.advance`, over any number of contiguous float32 tensors of any shapes.

    Returns:
        Each tensor's score sum, (tensors,) of float64, on their device. The order of its additions is fixed.
    """
    device = ms[0].device
    chunks, width = _chunks(tuple(m.numel() for m in ms), device)
    partial = torch.zeros(len(ms), width, device=device)
    with torch.cuda.device_of(ms[0]):  # Triton launches on the current device
        _advance[(len(chunks),)](
            _table(device, gradients, ms, vs),
            chunks,
            partial,
            len(ms),
            width,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            SCORE=SCORES[score],
            BLOCK=BLOCK,
        )
    return partial.sum(dim=1, dtype=torch.float64)


def move(
    weights: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    keeps: Sequence[float],
    rates: Sequence[float],
    roots: Sequence[float],
    eps: float,
    wins: Tensor,
) -> None:
    """As `kernels.move`, over any number of tensors, each with its own numbers, where `wins` (tensors,) holds."""
    device = ms[0].device
    chunks, _ = _chunks(tuple(m.numel() for m in ms), device)
    numbers = to_device(torch.tensor([keeps, rates, roots], dtype=torch.float32), device)
    table = _table(device, weights, ms, vs)
    with torch.cuda.device_of(ms[0]):
        _move[(len(chunks),)](table, numbers, chunks, wins.to(torch.int32), len(ms), eps, BLOCK=BLOCK)


def _table(device: torch.device, *lists: Sequence[Tensor]) -> Tensor:
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    sizes = [tensor.numel() for tensor in lists[0]]
    return to_device(torch.tensor([*addresses, sizes], dtype=torch.int64), device)


@functools.lru_cache(maxsize=8)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """(programs, 2) of tensor and first element, on the device, and the most programs that a tensor has."""
    counts = torch.tensor([-(-size // BLOCK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    before = counts.cumsum(0) - counts
    start = (torch.arange(len(owner)) - before[owner]) * BLOCK
    return to_device(torch.stack([owner, start], dim=1).contiguous(), device), int(counts.max())
