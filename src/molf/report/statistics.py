"""Intervals, paired tests and verdicts: pure functions of arrays, which give equal numbers for equal input.

Scores come as tables of seeds x examples, and methods see the same seeds and the same examples. So a difference of two
methods is a table as well, of differences, and what holds for a score holds for it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import bdtr, expit, logit, stdtrit

CHUNK = 4_000_000  # resampled example counts held at a time
STEP = 1e-6  # of the numeric gradient of a primary score
POWER = 0.8  # chance of a decision that `needed` asks for
MOST_SEEDS, MOST_EXAMPLES = 1_000, 10_000_000  # that `needed` looks at

Combine = Callable[[dict[str, float]], float]


class Label(StrEnum):
    """What an interval takes as random, in the words of the report."""

    EXAMPLES_ONLY = "examples only"  # one seed: says nothing of another training
    EXPLORATORY = "exploratory"  # two seeds: may cover the truth less often than it says
    SEEDS_AND_EXAMPLES = "seeds and examples"


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


@dataclass(frozen=True)
class Components:
    """Variance components of a table of seeds x examples, each at least 0.

    Attributes:
        seeds: Of what a seed adds to all its examples; None where a single seed hides it.
        examples: Of what an example adds under all seeds.
        rest: Of a single value beside these two.
    """

    seeds: float | None
    examples: float
    rest: float


def label(seeds: int) -> Label:
    """What the intervals of a comparison with that many seeds are."""
    return {1: Label.EXAMPLES_ONLY, 2: Label.EXPLORATORY}.get(seeds, Label.SEEDS_AND_EXAMPLES)


class Scores:
    """Scores of methods that saw the same seeds and the same examples: the interval of each and of each difference.

    One seed: a percentile bootstrap over examples (`bootstrap`). Two and more: the crossed random-effects t interval
    (`crossed`), a score's on the logit scale. Both are then held apart as far as answers that were not seen could hold
    them (`widened`). In simulations of binary answers 95 % intervals covered the truth in 93 to 97 % of cases from 3
    seeds on; down to 91 where a score near an end differs strongly between seeds (0.03 to 0.3, say), and up to 99 where
    a handful of answers are right or wrong. Two seeds have one degree of freedom to tell how seeds differ: mostly 89 to
    96 %, so they are called exploratory.

    Args:
        values: Per-example values, methods x seeds x examples x components; NaN leaves an example out.
        components: Names of the last axis.
        combine: The score from the means of the components.
        confidence: Of the intervals, such as 0.95.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        span: Least and greatest value that a score can have; None where there are no such limits.
    """

    def __init__(
        self,
        values: np.ndarray,
        components: Sequence[str],
        combine: Combine,
        *,
        confidence: float,
        resamples: int,
        seed: int,
        span: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        seen = np.isfinite(values).any(axis=(0, 1, 3))
        values = values[:, :, seen] if seen.any() else values
        self.confidence, self.span = confidence, span
        self.table = contributions(values, components, combine)
        self.by_seed = self.table.mean(axis=2)  # methods x seeds: the scores themselves
        self.drawn = bootstrap(values, components, combine, resamples, seed) if values.shape[1] == 1 else None

    def interval(self, method: int) -> Interval:
        """A method's mean score over seeds."""
        drawn = None if self.drawn is None else self.drawn[method]
        return self._interval(self.table[method], drawn, self.span, on_logit=self.span is not None)

    def difference(self, method: int, versus: int) -> Interval:
        """The first method's mean score minus the second's."""
        drawn = None if self.drawn is None else self.drawn[method] - self.drawn[versus]
        table = self.table[method] - self.table[versus]
        return self._interval(table, drawn, self._span_of_differences(), on_logit=False)

    def needed(self, method: int, versus: int, margin: float) -> tuple[int | None, int | None]:
        """How many seeds or examples would decide a difference, as `needed` says; None where it is decided."""
        found = self.difference(method, versus)
        if found.low > -margin or found.high < -margin:
            return None, None
        table = self.table[method] - self.table[versus]
        seeds, examples = table.shape
        variances = variance_components(table)
        return needed(found.mean, variances, seeds, examples, margin, self.confidence, self._span_of_differences())

    def _span_of_differences(self) -> tuple[float, float] | None:
        return None if self.span is None else (self.span[0] - self.span[1], self.span[1] - self.span[0])

    def _interval(
        self, table: np.ndarray, drawn: np.ndarray | None, span: tuple[float, float] | None, on_logit: bool
    ) -> Interval:
        if drawn is None:
            mean, low, high = crossed(table, self.confidence, span, on_logit)
            return Interval(float(mean), float(low), float(high))
        found = percentile(float(table.mean()), drawn, self.confidence)
        low, high = widened(found.mean, found.low, found.high, table.shape[1], self.confidence, span)
        return Interval(found.mean, float(low), float(high))


def scores(values: np.ndarray, components: Sequence[str], combine: Combine) -> np.ndarray:
    """The primary score of each method and seed.

    Args:
        values: Per-example values, methods x seeds x examples x components; NaN leaves an example out.
        components: Names of the last axis.
        combine: The primary from the means of the components.

    Returns:
        methods x seeds; NaN where a component has no example.
    """
    return _primary(values, np.ones((1, values.shape[2])), components, combine)[0]


def contributions(values: np.ndarray, components: Sequence[str], combine: Combine) -> np.ndarray:
    """What each example contributes to a score that need be no mean: the delta method.

    Around the means m_c of its components, a score f(m) moves by sum_c df/dm_c (m) (n / n_c) (x_c - m_c) when one of n
    examples with the values x_c enters; n_c examples have a value, and one without moves nothing. The contribution is
    that plus f(m), so that contributions average to the score itself.

    Args:
        values, components, combine: As in `scores`.

    Returns:
        methods x seeds x examples; NaN where a component has no example at all.
    """
    valid = np.isfinite(values)
    counts = valid.sum(axis=2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(valid, values, 0.0).sum(axis=2, keepdims=True) / counts
        deviations = np.where(valid, values - means, 0.0) * (values.shape[2] / counts)
    point = _combined(means[:, :, 0], components, combine)
    result = np.repeat(point[:, :, None], values.shape[2], axis=2)
    for c in range(len(components)):
        # Forward, since a primary may have its least value where a component is 0.
        ahead = means[:, :, 0].copy()
        ahead[..., c] += STEP
        gradient = (_combined(ahead, components, combine) - point) / STEP
        result += gradient[:, :, None] * deviations[..., c]
    return result


def mean_squares(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of seeds, of examples and of the rest in a two-way layout without replicates.

    Args:
        table: ... x seeds x examples, at least two seeds; with one example the last two are 0.
    """
    seeds, examples = table.shape[-2:]
    grand = table.mean(axis=(-2, -1))
    by_seed = table.mean(axis=-1) - grand[..., None]
    by_example = table.mean(axis=-2) - grand[..., None]
    of_seeds = examples * (by_seed**2).sum(axis=-1) / (seeds - 1)
    if examples == 1:
        return of_seeds, np.zeros_like(grand), np.zeros_like(grand)
    of_examples = seeds * (by_example**2).sum(axis=-1) / (examples - 1)
    rest = table - grand[..., None, None] - by_seed[..., :, None] - by_example[..., None, :]
    return of_seeds, of_examples, (rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * (examples - 1))


def variance_components(table: np.ndarray) -> Components:
    """From expected mean squares of a table of seeds x examples; a negative estimate counts as 0."""
    seeds, examples = table.shape
    if seeds == 1:
        return Components(None, float(table.var(ddof=1)) if examples > 1 else 0.0, 0.0)
    of_seeds, of_examples, rest = (float(square) for square in mean_squares(table))
    return Components(max(of_seeds - rest, 0.0) / examples, max(of_examples - rest, 0.0) / seeds, rest)


def crossed(
    table: np.ndarray, confidence: float, span: tuple[float, float] | None = None, on_logit: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crossed random-effects t interval of a mean over seeds and examples, both random.

    With the mean squares A of seeds, B of examples and E of the rest, the mean over S seeds and N examples has the
    variance (A + B - E) / (S N) (Searle, Casella and McCulloch 1992, chapter 4). B - E below 0 counts as 0.

    Args:
        table: ... x seeds x examples, at least two seeds.
        confidence: Such as 0.95.
        span: Least and greatest value that the mean can have, or None.
        on_logit: Whether the interval is one of the mean's logit within its span. For scores, whose spread is the less
            the nearer they are to an end; a difference has no such habit.

    Returns:
        Mean, lower and upper bound, each of the leading shape.
    """
    seeds, examples = table.shape[-2:]
    of_seeds, of_examples, rest = mean_squares(table)
    beyond = np.maximum(of_examples - rest, 0.0)
    mean, quantile = table.mean(axis=(-2, -1)), 0.5 + confidence / 2
    half = stdtrit(_freedom(of_seeds, beyond, seeds, examples), quantile)
    half = half * np.sqrt((of_seeds + beyond) / (seeds * examples))
    low, high = mean - half, mean + half
    if on_logit and span is not None:
        low, high = _by_logit(mean, half, span)
    return mean, *widened(mean, low, high, _answers(beyond / seeds, rest, seeds, examples), confidence, span)


def _answers(of_examples: np.ndarray | float, rest: np.ndarray | float, seeds: int, examples: int) -> np.ndarray:
    """How many independent answers a mean's variance over examples is worth: N if seeds answer alike, up to S N."""
    single, averaged = np.asarray(of_examples + rest), np.asarray(of_examples + rest / seeds)
    return examples * np.where(averaged > 0, single / np.where(averaged > 0, averaged, 1.0), 1.0)


def _by_logit(mean: np.ndarray, half: np.ndarray, span: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a mean from its half width, taken over to its logit by the delta method; at an end they stay."""
    width = span[1] - span[0]
    share = (mean - span[0]) / width
    inside = (share > 0) & (share < 1)
    share = np.where(inside, share, 0.5)
    reach = half / width / (share * (1 - share))
    low, high = (span[0] + width * expit(logit(share) + sign * reach) for sign in (-1, 1))
    return np.where(inside, low, mean - half), np.where(inside, high, mean + half)


def _freedom(of_seeds: np.ndarray, beyond: np.ndarray, seeds: int, examples: int) -> np.ndarray:
    """Degrees of freedom of the variance A + (B - E): 1 / df is the mean of 1 / (S - 1) and 1 / (N - 1), weighed.

    The weights are their shares of that variance. Satterthwaite 1946 squares the shares, which holds for known ones: of
    three seeds the share is itself a rough estimate, too low just where the interval is too short, and a 95 % interval
    covers 92 to 95 % then; with shares that are not squared 94 to 96.5 % (normal data, many examples).
    """
    total = of_seeds + beyond
    inverse = of_seeds / (seeds - 1) + beyond / max(examples - 1, 1)
    return np.where(total > 0, total / np.where(total > 0, inverse, 1.0), seeds - 1)


def widened(
    mean: np.ndarray | float,
    low: np.ndarray | float,
    high: np.ndarray | float,
    answers: np.ndarray | float,
    confidence: float,
    span: tuple[float, float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds no nearer to the mean than answers that were not seen allow, and none outside the span.

    n answers alike leave an interval of width 0, which claims too much: a share p of answers unlike all of these goes
    unseen with the chance (1 - p)^n. So the mean may lie p = 1 - tail^(1/n) of the way to either end of the span, which
    is Clopper and Pearson's bound for none of n: some 3.7 / n at 95 %. It matters where fewer than about four differ.

    Args:
        mean, low, high: The estimate and its bounds.
        answers: Number of independent answers, n.
        confidence: Such as 0.95.
        span: Least and greatest value that the mean can have; None leaves the bounds as they are.
    """
    if span is None:
        return np.asarray(low), np.asarray(high)
    unseen = 1 - ((1 - confidence) / 2) ** (1 / np.asarray(answers, float))
    least = np.minimum(low, mean - unseen * (mean - span[0]))
    greatest = np.maximum(high, mean + unseen * (span[1] - mean))
    return np.maximum(least, span[0]), np.minimum(greatest, span[1])


def bootstrap(values: np.ndarray, components: Sequence[str], combine: Combine, resamples: int, seed: int) -> np.ndarray:
    """Resampled scores of a single seed: every method sees the same resampled examples.

    Efron and Tibshirani 1993, chapters 6 and 13. The score is recomputed from the resampled components' means, which
    matters where it is no mean itself.

    Args:
        values, components, combine: As in `scores`, with one seed.
        resamples: Number of resamples.
        seed: Of the resampling.

    Returns:
        methods x resamples. A difference of two rows is a resampled paired difference.
    """
    methods, _, examples, _ = values.shape
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, methods))
    step = max(1, CHUNK // max(examples, 1))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = rng.multinomial(examples, np.full(examples, 1 / examples), size=size)
        drawn[start : start + size] = _primary(values, counts, components, combine)[:, :, 0]
    return drawn.T


def percentile(mean: float, drawn: np.ndarray, confidence: float) -> Interval:
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


def needed(
    difference: float,
    variances: Components,
    seeds: int,
    examples: int,
    margin: float,
    confidence: float,
    span: tuple[float, float] | None = None,
) -> tuple[int | None, int | None]:
    """How many seeds, or else how many examples, would decide a difference against the margin.

    If the difference and its variance components are what they were estimated to be, a comparison of that size decides
    with a chance of about `POWER`: its distance to -margin is the interval's half width and `POWER`'s quantile more.

    Args:
        difference: Its estimate.
        variances: Its variance components.
        seeds, examples: Of the comparison that did not decide.
        margin: What counts as not worse.
        confidence: Of the intervals.
        span: Least and greatest value that a difference can have, as in `crossed`.

    Returns:
        Seeds in all at this number of examples, and examples in all at this number of seeds. None where more of that
        kind alone never decide, or not below `MOST_SEEDS` and `MOST_EXAMPLES`; no number of seeds from a single one.
    """

    def decides(s: int, n: int) -> bool:
        of_seeds, beyond = n * (variances.seeds or 0.0) + variances.rest, s * variances.examples
        if variances.seeds is None:
            freedom = float(n - 1)
        else:
            freedom = float(_freedom(np.asarray(of_seeds), np.asarray(beyond), s, n))
        reach = stdtrit(freedom, 0.5 + confidence / 2) + stdtrit(freedom, POWER)
        reach *= np.sqrt((of_seeds + beyond) / (s * n))
        answers = _answers(variances.examples, variances.rest, s, n)
        low, high = widened(difference, difference - reach, difference + reach, answers, confidence, span)
        return bool(low > -margin or high < -margin)

    many_seeds = None if variances.seeds is None else _least(lambda s: decides(s, examples), seeds + 1, MOST_SEEDS)
    return many_seeds, _least(lambda n: decides(seeds, n), examples + 1, MOST_EXAMPLES)


def _least(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number from low to high that fits, where all above one that fits do so too; None if none does."""
    if low > high or not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of two methods' right answers to the same examples (two-sided; Fagerland et al. 2013).

    Args:
        first, second: 1 where a method is right, 0 where not; an example with a NaN of either is left out.

    Returns:
        How many only the first got right, how many only the second, and the p value; 1 where they agree everywhere.
    """
    known = np.isfinite(first) & np.isfinite(second)
    one, other = first[known] > 0.5, second[known] > 0.5
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    p = 2 * bdtr(min(only_first, only_second), only_first + only_second, 0.5)
    return only_first, only_second, float(min(p, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): each at most alpha keeps the chance of any false finding below alpha."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()


def front(scored: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Indices on the Pareto front of high score and low cost, the cheapest first.

    No other one is as good in both and better in one.
    """
    found = [
        i
        for i in range(len(scored))
        if not any(
            scored[j] >= scored[i] and costs[j] <= costs[i] and (scored[j] > scored[i] or costs[j] < costs[i])
            for j in range(len(scored))
        )
    ]
    return sorted(found, key=lambda i: (costs[i], i))


def _primary(values: np.ndarray, counts: np.ndarray, components: Sequence[str], combine: Combine) -> np.ndarray:
    """Scores of weighted examples: counts (resamples x examples) -> resamples x methods x seeds."""
    methods, seeds, examples, width = values.shape
    columns = values.transpose(2, 0, 1, 3).reshape(examples, -1)
    valid = np.isfinite(columns)
    weights = counts.astype(float)
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(valid, columns, 0.0)) / (weights @ valid)
    return _combined(means.reshape(len(counts), methods, seeds, width), components, combine)


def _combined(means: np.ndarray, components: Sequence[str], combine: Combine) -> np.ndarray:
    """The primary of each row of means: ... x components -> ...; NaN where a mean is NaN."""
    rows = means.reshape(-1, len(components))
    found = [
        combine(dict(zip(components, row, strict=True))) if ok else np.nan
        for row, ok in zip(rows.tolist(), np.isfinite(rows).all(axis=1).tolist(), strict=True)
    ]
    return np.array(found, float).reshape(means.shape[:-1])
