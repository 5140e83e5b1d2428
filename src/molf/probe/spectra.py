"""What singular values and two halves of the data tell of the update that a gradient asks for: pure, on matrices."""

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, the largest first, float64, by the smaller Gram matrix; rounding errors of it become 0."""
    values = torch.linalg.eigvalsh(_gram(matrix.double()))
    floor = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return torch.where(values > floor, values, 0).flip(0).sqrt()


def stable_rank(values: Tensor) -> float:
    """Sum of the squared singular values over the largest of them; 0 for a matrix of zeros."""
    return float(values.square().sum() / values[0] ** 2) if values[0] > 0 else 0.0


def energy(values: Tensor, rank: int) -> float:
    """Share of the squared singular values that the `rank` largest have; 1 for a matrix of zeros."""
    total = values.square().sum()
    return float(values[:rank].square().sum() / total) if total > 0 else 1.0


def noise_share(signal: float, mean_square: float) -> float:
    """Share of a batch's squared gradient that is noise between batches.

    Args:
        signal: Estimate of the squared norm of the gradient's expectation, which chance may make negative.
        mean_square: Mean squared norm of the batches' gradients.
    """
    return min(1.0, max(0.0, 1 - signal / mean_square)) if mean_square > 0 else 0.0


def excess_errors(a: Tensor, b: Tensor, spread: Tensor, share: float) -> Tensor:
    """What updates of every rank are off by, if they are the gradient of all of a training's rows cut to that rank.

    `a` and `b` show the same expectation G through independent noise, b's of energy N, so that |T_r(a) - b|^2 - N
    is an unbiased estimate of |T_r(a) - G|^2, T_r(a) = P a being the truncation of `a` to rank r. A part of that is
    noise in the directions that are kept, |P (a - b)|^2 - |P spread|^2; a training that sees more rows than `a` did
    has only `share` of it. What the truncation loses is taken as it is, although it too falls with more rows.

    Args:
        a: Mean gradient over a half of the rows looked at, (out, in).
        b: Over the other half.
        spread: Difference between two parts of that half, scaled so that its energy is b's noise's in expectation, in
            any directions.
        share: Rows of `a` over those of the training, at most 1.

    Returns:
        (min(out, in) + 1,), rank 0 first, float64. Entry 0 is |G|^2, the last is the full update's error, `share` of
        a's noise. Chance may make entries negative.
    """
    if a.shape[0] > a.shape[1]:
        a, b, spread = a.T, b.T, spread.T
    # Any orthonormal directions give unbiased errors, so that those of float32 will do.
    left = torch.linalg.eigh(_gram(a))[1].flip(1)
    ours, true, apart = ((left.T @ of).double() for of in (a, b, spread))
    noise = apart.square().sum(dim=1)
    start = (true.square().sum() - noise.sum()).view(1)
    errors = torch.cat([start, start + (ours.square() - 2 * ours * true).sum(dim=1).cumsum(0)])
    paid = ((ours - true).square().sum(dim=1) - noise).cumsum(0)
    errors[1:] -= (1 - share) * paid
    return errors


def _gram(matrix: Tensor) -> Tensor:
    """The product of a matrix with its transpose, the smaller one."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
