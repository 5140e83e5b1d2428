"""How often intervals and tests are right, by simulation: answers in which seeds, examples and chance have a part."""

import numpy as np
import pytest
from scipy.special import ndtr

from molf.report.statistics import Components, contributions, crossed, holm, mcnemar, needed

RUNS = 4000  # a coverage of 95 % is then known to 0.35 points
MARGIN = 0.05
BINARY = (-1.0, 1.0)


def answers(
    rng: np.random.Generator,
    seeds: int,
    examples: int,
    level: float,
    of_seeds: float,
    of_examples: float | np.ndarray,
    runs: int = RUNS,
) -> np.ndarray:
    """Zeros and ones, runs x seeds x examples, right with the chance of a probit of the level and both effects.

    Args:
        of_seeds: Standard deviation of the seeds' effect.
        of_examples: The examples' effect, or its standard deviation.
    """
    if not isinstance(of_examples, np.ndarray):
        of_examples = of_examples * rng.normal(size=(runs, 1, examples))
    chance = ndtr(level + of_seeds * rng.normal(size=(runs, seeds, 1)) + of_examples)
    return (rng.random(chance.shape) < chance).astype(float)


def expected(level: float, *deviations: float) -> float:
    """The mean of `answers`: a normal effect only makes a probit flatter."""
    return float(ndtr(level / np.sqrt(1 + sum(d**2 for d in deviations))))


def covered(table: np.ndarray, truth: float, span: tuple[float, float], on_logit: bool) -> float:
    _, low, high = crossed(table, 0.95, span, on_logit)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("of_seeds", "of_examples"), [(0, 0), (0, 1), (0.1, 1), (0.3, 1), (0.3, 0)])
def test_the_interval_of_a_score_covers_it(seeds: int, of_seeds: float, of_examples: float) -> None:
    table = answers(np.random.default_rng(1), seeds, 120, 0.5, of_seeds, of_examples)
    truth = expected(0.5, of_seeds, of_examples)
    assert 0.93 <= covered(table, truth, (0.0, 1.0), True) <= 0.97


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("of_seeds", "own"), [(0, 0.3), (0.1, 0.5), (0.3, 0.5)])
def test_the_interval_of_a_difference_covers_it(seeds: int, of_seeds: float, own: float) -> None:
    table, truth = difference(np.random.default_rng(2), seeds, 120, 0.8, 0.5, of_seeds, own)
    assert 0.93 <= covered(table, truth, BINARY, False) <= 0.97


def difference(
    rng: np.random.Generator, seeds: int, examples: int, level: float, versus: float, of_seeds: float, own: float
) -> tuple[np.ndarray, float]:
    """Differences of two methods that find the same examples hard, but for an effect of each one's own; their mean."""
    shared = rng.normal(size=(RUNS, 1, examples))
    tables = [
        answers(rng, seeds, examples, at, of_seeds, shared + own * rng.normal(size=(RUNS, 1, examples)))
        for at in (level, versus)
    ]
    return tables[0] - tables[1], expected(level, of_seeds, 1, own) - expected(versus, of_seeds, 1, own)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("of_seeds", [0, 0.15])
def test_the_interval_of_a_harmonic_mean_covers_it(seeds: int, of_seeds: float) -> None:
    rng, runs, levels = np.random.default_rng(3), 2000, (1.2, 0.8, -0.6)
    shared = rng.normal(size=(runs, 1, 120))
    drift = of_seeds * rng.normal(size=(runs, seeds, 1))
    columns = [answers(rng, seeds, 120, level, 0, shared + drift, runs) for level in levels]

    def harmonic(means: dict[str, float]) -> float:
        return 3 / sum(1 / value for value in means.values())

    table = contributions(np.stack(columns, axis=-1), ["a", "b", "c"], harmonic)
    # What a seed's score is without the chance of examples, averaged over many seeds.
    drifts = of_seeds * rng.normal(size=100_000)
    truth = float(np.mean(3 / sum(1 / ndtr((level + drifts) / np.sqrt(2)) for level in levels)))
    assert 0.93 <= covered(table, truth, (0.0, 1.0), True) <= 0.97


@pytest.mark.parametrize(("seeds", "of_seeds"), [(3, 0), (3, 0.1), (3, 0.3), (10, 0.1)])
def test_non_inferiority_is_seldom_claimed_of_a_method_that_is_worse_by_the_margin(seeds: int, of_seeds: float) -> None:
    """Its level is that of one bound of the interval: 2.5 %, and with the approximation at most 3.5."""
    table, truth = difference(np.random.default_rng(4), seeds, 120, 0.5, 0.7, of_seeds, 0.4)
    _, low, high = crossed(table, 0.95, BINARY)
    assert np.mean(low > truth) <= 0.035
    assert np.mean(high < truth) <= 0.035


def test_mcnemar_finds_a_difference_between_equals_less_often_than_its_level() -> None:
    rng = np.random.default_rng(5)
    shared = rng.normal(size=(2000, 1, 100))
    one, other = (answers(rng, 1, 100, 0.5, 0, shared, 2000)[:, 0] for _ in range(2))
    p_values = np.array([mcnemar(a, b)[2] for a, b in zip(one, other, strict=True)])
    for level in (0.01, 0.05, 0.2):
        assert np.mean(p_values <= level) <= level


def test_holm_keeps_the_chance_of_any_false_finding_below_the_level() -> None:
    p_values = np.random.default_rng(6).random((2000, 20))
    p_values[:, :3] = 1e-9  # three true findings take nothing from the others' protection
    false = np.mean([min(holm(row.tolist())[3:]) <= 0.05 for row in p_values])
    assert 0.03 <= false <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert all(max(holm(row.tolist())[:3]) <= 0.05 for row in p_values[:50])


@pytest.mark.parametrize("gap", [0.0, 0.02, -0.09])
@pytest.mark.parametrize("variances", [Components(0.01**2, 0.04, 0.1), Components(0.0, 0.1, 0.05)])
def test_as_many_as_are_said_to_be_needed_decide_about_as_often_as_claimed(gap: float, variances: Components) -> None:
    rng, runs = np.random.default_rng(8), 600
    more_seeds, more_examples = needed(gap, variances, 3, 60, MARGIN, 0.95)
    found = []
    for seeds, examples in ((more_seeds, 60), (3, more_examples)):
        if seeds is None or examples is None:
            continue
        assert variances.seeds is not None
        table = (
            gap
            + np.sqrt(variances.seeds) * rng.normal(size=(runs, seeds, 1))
            + np.sqrt(variances.examples) * rng.normal(size=(runs, 1, examples))
            + np.sqrt(variances.rest) * rng.normal(size=(runs, seeds, examples))
        )
        _, low, high = crossed(table, 0.95)
        found.append(float(np.mean((low > -MARGIN) | (high < -MARGIN))))
    assert found
    assert all(0.72 <= share <= 0.88 for share in found), found
