"""From what the probe saw to a forecast: which method will win, and which rank suffices. Pure.

The rule. Take the gradient G of the task for what there is to learn, and what a training sees of it, G plus the noise
of its finite rows, for what full fine-tuning learns; LoRA of rank r learns the best rank-r part of the same. Which is
nearer to G is the question of linear regression (benchmarks/theory.py; Zindari, Mulayoff and Stich 2026, arXiv
2605.19018), and one half of the rows answers it for the other (`spectra.excess_errors`): a low rank gains where G's
energy outside its directions is less than the noise's there. A routed method's error is its experts', weighted by the
share of EPD's first choices that each won. Errors add up over modules. As in the report's recommendation, methods
within `compare.margin` of the least error count as equal, and the one with the smallest update is named; an update that
is off by more than all of G's energy counts like none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molf.method_blocks import MethodBlock

# Kinds of update that the rule knows: the whole weight, one low rank, or experts that take turns.
WHOLE, LOW, ROUTED = "whole", "low", "routed"


def update_of(block: MethodBlock) -> tuple[str, tuple[int, ...]] | None:
    """A method's update of a weight: its sort, and the ranks of its low-rank parts; None: the rule does not know it.

    Any other block with one rank, `r` or `target_r`, is taken for LoRA of that rank, whatever it does beside.
    """
    rank = getattr(block, "r", getattr(block, "target_r", None))
    if block.kind == "fft":
        return WHOLE, ()
    if block.kind in ("molf", "molf-e") and isinstance(rank, list | tuple):
        return ROUTED, tuple(rank)
    return (LOW, (rank,)) if isinstance(rank, int) else None


def ranks_of(blocks: Mapping[str, MethodBlock]) -> list[int]:
    """All ranks of a grid's methods, each once, in order."""
    return sorted({rank for block in blocks.values() for rank in (update_of(block) or (WHOLE, ()))[1]})


def module_errors(errors: Tensor, block: MethodBlock, shares: Mapping[str, float] | None) -> Tensor:
    """What a method's update of one module is off by, (halvings,).

    Args:
        errors: By rank, the last the full update's, (halvings, ranks + 1).
        block: Of a method that `update_of` knows.
        shares: Of the steps that each expert won, by its name; None: not known, all alike.
    """
    sort, ranks = update_of(block) or (WHOLE, ())
    last = errors.shape[1] - 1
    if sort == WHOLE:
        return errors[:, last]
    if sort == LOW:
        return errors[:, min(ranks[0], last)]
    at = [min(rank, last) for rank in ranks]
    if block.kind == "molf":
        at = [last, *at]  # expert 0 is the full weight
    weights = torch.tensor(list(shares.values()) if shares else [1.0] * len(at), dtype=errors.dtype)
    return errors[:, at] @ (weights / weights.sum())


def summed(errors: Sequence[Tensor]) -> Tensor:
    """Errors of several modules by rank, (halvings, largest rank + 1); a rank above a module's is its full update."""
    size = max(of.shape[1] for of in errors)
    return torch.stack([torch.cat([of, of[:, -1:].expand(-1, size - of.shape[1])], dim=1) for of in errors]).sum(dim=0)


def best_rank(errors: Tensor) -> int | None:
    """The rank of least error, over the mean of the halvings; None: the full update's."""
    mean = errors.mean(dim=0)
    least = int(mean.argmin())
    return None if mean[least] >= mean[-1] else least


def enough(errors: Tensor, margin: float) -> int | None:
    """The least rank that is within the margin of the full update's error; None: only the full one's.

    Args:
        errors: As of `summed`.
        margin: As a share of the gradient's energy, `errors` at rank 0.
    """
    mean = errors.mean(dim=0)
    if mean[0] <= 0:
        return 0
    capped = (mean / mean[0]).clamp(max=1)
    rank = int((capped <= capped[-1] + margin).nonzero()[0])
    return None if rank == len(mean) - 1 else rank


def pick(methods: Sequence[Mapping[str, Any]], margin: float, halving: int | None = None) -> str:
    """The method with the smallest update of those within the margin of the least error.

    Args:
        methods: With method, error, halvings and size; error and size order them, then the sequence does.
        margin: Of the error.
        halving: By whose errors; None: by the means.
    """
    errors = [min(1.0, of["error"] if halving is None else of["halvings"][halving]) for of in methods]
    near = [of for of, error in zip(methods, errors, strict=True) if error <= min(errors) + margin]
    return str(min(near, key=lambda of: math.inf if of["size"] is None else of["size"])["method"])


def forecast(
    errors: Mapping[str, Tensor],
    blocks: Mapping[str, MethodBlock],
    choices: Mapping[str, Mapping[str, Mapping[str, float]]],
    margin: float,
) -> dict[str, Any]:
    """Which method wins, which rank suffices, and how sure that is.

    Args:
        errors: By module, `spectra.excess_errors` of each halving.
        blocks: The methods.
        choices: For each routed method and module the share of the first steps that each expert won.
        margin: What counts as not worse.

    Returns:
        winner; methods (each with its error as a share of the gradient's own energy, mean and by halving, and size, the
        sum of its ranks, None the whole weight; the least error first); margin; agreement and halvings (in how many of
        how many the winner is the same); enough and best (ranks, None the full one); signal (the gradient's energy, by
        estimate); not_forecast (methods).
    """
    whole = summed(list(errors.values()))
    signal = float(whole[:, 0].mean())
    found: list[dict[str, Any]] = []
    for method, block in blocks.items():
        if update_of(block) is None:
            continue
        shares = choices.get(method, {})
        total = torch.stack([module_errors(of, block, shares.get(name)) for name, of in errors.items()]).sum(dim=0)
        relative = (total / signal).tolist() if signal > 0 else [1.0] * len(total)
        error = sum(relative) / len(relative)
        found.append({"method": method, "kind": block.kind, "error": error, "halvings": relative, "size": _size(block)})
    found.sort(key=lambda of: float(of["error"]))
    winner = pick(found, margin)
    return {
        "winner": winner,
        "methods": found,
        "margin": margin,
        "agreement": sum(pick(found, margin, i) == winner for i in range(len(whole))),
        "halvings": len(whole),
        "enough": enough(whole, margin),
        "best": best_rank(whole),
        "signal": signal,
        "not_forecast": [method for method, block in blocks.items() if update_of(block) is None],
    }


def _size(block: MethodBlock) -> int | None:
    """The sum of a method's ranks; None: it updates the whole weight."""
    return None if block.kind in ("fft", "molf") else sum((update_of(block) or (WHOLE, ()))[1])


def sentence(found: Mapping[str, Any]) -> str:
    """The forecast for a reader."""
    winner = next(of for of in found["methods"] if of["method"] == found["winner"])
    rest = ", ".join(f"{of['method']} {_percent(of['error'])}" for of in found["methods"] if of is not winner)
    if min(of["error"] for of in found["methods"]) >= 1:
        said = (
            f"forecast: {winner['method']}, for want of a better: the rows show more noise than gradient, and the "
            "theory then favours the smallest update"
        )
    else:
        said = f"forecast: {winner['method']}, off by {_percent(winner['error'])} of the gradient's energy"
        said += f" ({rest})" if rest else ""
        if found["enough"] is None:
            said += f"; no rank below the full one is within {_percent(found['margin'])} of the full update"
        else:
            said += f"; rank {found['enough']} suffices to be within {_percent(found['margin'])} of the full update, "
            said += "the full one is nearest" if found["best"] is None else f"rank {found['best']} is nearest"
    said += f"; the same method in {found['agreement']} of {found['halvings']} halvings of the rows"
    if found["not_forecast"]:
        said += f". Not forecast: {', '.join(found['not_forecast'])}"
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
