"""Paired bootstrap intervals and the non-inferiority verdict: pure functions of arrays, the same for the same seed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

CHUNK = 4_000_000  # resampled example counts held at a time


class Label(StrEnum):
    """What an interval takes as random, in the words of the report."""

    EXAMPLES_ONLY = "examples only"  # one seed: says nothing of another training
    EXPLORATORY = "exploratory"  # few seeds: covers less often than it says


class Outcome(StrEnum):
    """Verdict of a non-inferiority comparison."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper bound."""

    mean: float
    low: float
    high: float


def label(seeds: int) -> Label:
    """What the intervals of a comparison with that many seeds are."""
    return Label.EXAMPLES_ONLY if seeds == 1 else Label.EXPLORATORY


def scores(values: np.ndarray, components: Sequence[str], combine: Callable[[dict[str, float]], float]) -> np.ndarray:
    """The primary score of each method and seed.

    Args:
        values: Per-example values, methods x seeds x examples x components; NaN leaves an example out.
        components: Names of the last axis.
        combine: The primary from the means of the components.

    Returns:
        methods x seeds; NaN where a component has no example.
    """
    return _primary(values, np.ones((1, values.shape[2])), components, combine)[0]


def bootstrap(
    values: np.ndarray,
    components: Sequence[str],
    combine: Callable[[dict[str, float]], float],
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Resampled scores: every method sees the same resampled examples and, with two seeds or more, the same seeds.

    Efron and Tibshirani 1993, chapters 6 and 13. The score is recomputed from the resampled components' means, which
    matters where it is no mean itself.

    Args:
        values, components, combine: As in `scores`.
        resamples: Number of resamples.
        seed: Of the resampling.

    Returns:
        methods x resamples: the mean over seeds. A difference of two rows is a resampled paired difference.
    """
    methods, seeds, examples, _ = values.shape
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, methods))
    step = max(1, CHUNK // examples)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = rng.multinomial(examples, np.full(examples, 1 / examples), size=size)
        by_seed = _primary(values, counts, components, combine)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        drawn[start : start + size] = np.einsum("rms,rs->rm", by_seed, weights)
    return drawn.T


def interval(mean: float, drawn: np.ndarray, confidence: float) -> Interval:
    """The percentile interval of resampled values around an estimate."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(mean), float(low), float(high))


def non_inferiority(differences: Iterable[Interval], margin: float) -> Outcome:
    """Whether a method is no worse than each of its references.

    Args:
        differences: Method minus reference, one for each reference.
        margin: What counts as not worse, in points of the score.

    Returns:
        HOLDS when every lower bound exceeds -margin, FAILS when any upper bound lies below it, else UNDECIDED.
    """
    differences = list(differences)
    if any(d.high < -margin for d in differences):
        return Outcome.FAILS
    return Outcome.HOLDS if all(d.low > -margin for d in differences) else Outcome.UNDECIDED


def _primary(
    values: np.ndarray, counts: np.ndarray, components: Sequence[str], combine: Callable[[dict[str, float]], float]
) -> np.ndarray:
    """Scores of weighted examples: counts (resamples x examples) -> resamples x methods x seeds."""
    methods, seeds, examples, width = values.shape
    columns = values.transpose(2, 0, 1, 3).reshape(examples, -1)
    valid = np.isfinite(columns)
    weights = counts.astype(float)
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(valid, columns, 0.0)) / (weights @ valid)
    rows = means.reshape(-1, width)
    combined = [
        combine(dict(zip(components, row, strict=True))) if ok else np.nan
        for row, ok in zip(rows.tolist(), np.isfinite(rows).all(axis=1).tolist(), strict=True)
    ]
    return np.array(combined).reshape(len(counts), methods, seeds)
