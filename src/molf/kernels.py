"""The arithmetic of AdamW on (rows, columns) tensors, in torch's own operations.

Every function here works in place on views; what belongs together and who moves is the optimizer's matter (optim.py).
kernels.cpp does the same for the host in one pass over the memory; this is its reference, and runs where it does not:
on devices, and for 8-bit moments.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# Columns of a view. Fixed, so that compiled code depends on the number of rows only.
COLUMNS = 4096
# Rows that an eager operation takes at once on the host: what it leaves is in the cache when the next one needs it.
BLOCK_ROWS = 8
DEVICE_ROWS = 4096  # likewise on a device: 16 M elements
# Elements that share one scale where moments are kept in 8 bits.
CODES_PER_SCALE = 256

# By these numbers kernels.cpp and kernels_cuda.py know a score.
SCORES = {None: 0, "epd": 1, "pfn": 2}

MASK = 0xFFFFFFFF  # of 32 bits

Moment = Tensor | tuple[Tensor, Tensor]  # values, or 8-bit codes and their scales
Whole = TypeVar("Whole", int, Tensor)
Number = Tensor | float  # a scalar tensor where `move` is compiled, or every new number would compile it anew


class Codebooks(NamedTuple):
    """The 256 values that 8-bit codes stand for, in [-1, 1] and [0, 1]."""

    signed: Tensor
    unsigned: Tensor


class Slab(NamedTuple):
    """Views of one parameter's elements, all (rows, columns), and where they begin in it."""

    weight: Tensor
    gradient: Tensor | None
    m: Moment
    v: Moment
    first: int


def advance(
    gradients: Sequence[Tensor],
    ms: Sequence[Moment],
    vs: Sequence[Moment],
    beta1: float,
    beta2: float,
    eps: float,
    score: str | None,
    books: Codebooks | None,
) -> list[Tensor]:
    """m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, and parts of the score's sum.

    Args:
        gradients: (rows, columns) each.
        ms: First moments, float32 or float64, or 8-bit codes with scales.
        vs: Second moments, likewise.
        beta1: Decay of the first moments.
        beta2: Decay of the second moments.
        eps: Added to the root of the second moment.
        score: `epd` sums m^2 / (sqrt v + eps), `pfn` sums (m / (sqrt v + eps))^2, None sums nothing.
        books: For 8-bit moments.

    Returns:
        Any number of partial sums each; empty without a score.
    """
    sums = []
    for gradient, m, v in zip(gradients, ms, vs, strict=True):
        first, second = decode(m, books, True), decode(v, books, False)
        gradient = gradient.to(first.dtype)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if score is not None:
            ratio = first / second.sqrt().add_(eps)
            other = first if score == "epd" else ratio
            sums.append(torch.dot(other.flatten(), ratio.flatten()).view(1))
        if books is not None:
            encode(first, m, books.signed)
            encode(second, v, books.unsigned)
    return sums


def move(
    weights: Sequence[Tensor],
    ms: Sequence[Moment],
    vs: Sequence[Moment],
    keeps: Sequence[Number],
    rate: Number,
    root: Number,
    eps: float,
    seeds: Sequence[Number],
    books: Codebooks | None,
) -> None:
    """p <- p keep - rate m / (root sqrt v + eps): decoupled decay, then the bias-corrected step.

    Args:
        weights: (rows, columns) each; bfloat16 ones are rounded stochastically.
        ms: First moments.
        vs: Second moments.
        keeps: 1 - eta lambda of each weight, scalars.
        rate: eta / (1 - b1^t), scalar.
        root: 1 / sqrt(1 - b2^t), scalar.
        eps: Added to the root of the corrected second moment.
        seeds: Of each weight's rounding, whole numbers, the index of its first element included.
        books: For 8-bit moments.
    """
    for weight, m, v, keep, seed in zip(weights, ms, vs, keeps, seeds, strict=True):
        first, second = decode(m, books, True), decode(v, books, False)
        denominator = second.sqrt().mul_(root).add_(eps)
        new = weight.to(first.dtype)
        if isinstance(rate, Tensor):
            new = new * keep - rate * (first / denominator)
        else:
            new.mul_(keep).addcdiv_(first, denominator, value=-rate)
        if weight.dtype == torch.bfloat16:
            new = round_stochastically(new, seed)
        if new is not weight:
            weight.copy_(new)


def round_stochastically(x: Tensor, seed: Number) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes the mean right.

    The noise is a hash of seed and position: no generator's state, so a resumed run and every process of a run round
    alike.

    Args:
        x: (rows, columns), float32.
        seed: Any whole number.

    Returns:
        (rows, columns), bfloat16.
    """
    noise = scrambled(torch.arange(x.numel(), device=x.device).view(x.shape) + seed & MASK)  # type: ignore[operator]
    bits = x.contiguous().view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)  # noise would carry some NaNs over to -0


def drawn(count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Whole numbers of 32 bits that look drawn at random, (count,) of int64: functions of seed, step and place."""
    key = scrambled(scrambled(seed & MASK) ^ (step & MASK))
    return scrambled(scrambled(torch.arange(1, count + 1, device=device)) ^ key)


def scrambled(numbers: Whole) -> Whole:
    """Whole numbers of 32 bits as others that look drawn at random, one to one; a tensor's are int64.

    By multiplying and shifting; both factors are below 2^31, so that no product leaves 63 bits.
    """
    numbers = ((numbers ^ (numbers >> 16)) * 0x21F0AAAD) & MASK
    numbers = ((numbers ^ (numbers >> 15)) * 0x735A2D97) & MASK
    return numbers ^ (numbers >> 15)


def decode(moment: Moment, books: Codebooks | None, signed: bool) -> Tensor:
    """A moment's values, (rows, columns): itself, or what its codes stand for."""
    if isinstance(moment, Tensor):
        return moment
    assert books is not None
    codes, scale = moment
    book = books.signed if signed else books.unsigned
    return (book[codes.int()].view(-1, CODES_PER_SCALE) * scale.view(-1, 1)).view(codes.shape)


def encode(values: Tensor, into: Moment, book: Tensor) -> None:
    """Writes values as the nearest codes of their block's scale; nothing to do for a moment that keeps values."""
    if isinstance(into, Tensor):
        return
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    codes, scale = into
    scaled, new_scale = scale_tensor(values, CODES_PER_SCALE)
    codes.copy_(quantize_8bit_with_qmap(scaled, book))
    scale.copy_(new_scale.view(scale.shape))


@functools.cache
def codebooks(device: torch.device) -> Codebooks:
    """torchao's dynamic 8-bit maps (arXiv 2110.02861).

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError:
        raise ValueError("moments='8bit' needs torchao: pip install 'molf[eightbit]'") from None
    signed, unsigned = create_dynamic_map(signed=True), create_dynamic_map(signed=False)
    # No second moment becomes 0: over a first moment that did not, it would make a step of m / eps.
    unsigned[0] = unsigned[1] / 2
    return Codebooks(torch.tensor(signed, device=device), torch.tensor(unsigned, device=device))


def fits_codes(parameter: Tensor) -> bool:
    """Whether a parameter's moments can be kept as codes: whole blocks, and enough of them to matter."""
    return parameter.numel() >= COLUMNS and parameter.numel() % CODES_PER_SCALE == 0


def slabs(weight: Tensor, gradient: Tensor | None, m: Moment, v: Moment) -> list[Slab]:
    """A parameter's whole rows of `COLUMNS` elements, and the rest as one short row; what is empty is left out."""
    size = weight.numel()
    whole = size - size % COLUMNS

    def cut(tensor: Tensor, start: int, stop: int, width: int) -> Tensor:
        if stop - start == size:
            return tensor.reshape(-1, width)
        return tensor.reshape(-1)[start:stop].view(-1, width)

    def part(start: int, stop: int, width: int) -> Slab:
        def of(moment: Moment) -> Moment:
            if isinstance(moment, Tensor):
                return cut(moment, start, stop, width)
            scales = moment[1].view(-1)[start // CODES_PER_SCALE : stop // CODES_PER_SCALE]
            return cut(moment[0], start, stop, width), scales.view(-1, width // CODES_PER_SCALE)

        g = None if gradient is None else cut(gradient, start, stop, width)
        return Slab(cut(weight, start, stop, width), g, of(m), of(v), start)

    head = [part(0, whole, COLUMNS)] if whole else []
    return head + ([part(whole, size, size - whole)] if size > whole else [])


def blocks(slab: Slab) -> Iterator[Slab]:
    """A slab's rows, a cacheful at a time on the host, on a device so many that temporaries stay small."""
    rows = len(slab.weight)
    at_once = BLOCK_ROWS if slab.weight.device.type == "cpu" else DEVICE_ROWS
    if rows <= at_once:
        yield slab
        return
    for start in range(0, rows, at_once):
        cut = slice(start, start + at_once)

        def of(moment: Moment, cut: slice = cut) -> Moment:
            return moment[cut] if isinstance(moment, Tensor) else (moment[0][cut], moment[1][cut])

        g = None if slab.gradient is None else slab.gradient[cut]
        yield Slab(slab.weight[cut], g, of(slab.m), of(slab.v), slab.first + start * COLUMNS)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` (`advance` or `move`) compiled; made once, whatever the number of optimizers."""
    return torch.compile(function)


def mark_rows(*tensors: Any) -> None:
    """Tells the compiler, before its first call, that the number of rows varies from call to call."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        else:
            mark_rows(*tensor)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
