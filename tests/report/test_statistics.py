"""Intervals, tests and verdicts on cases whose answer is known."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from molf.report import statistics
from molf.report.statistics import (
    Components,
    Interval,
    Label,
    Outcome,
    Scores,
    bootstrap,
    contributions,
    crossed,
    front,
    holm,
    label,
    mcnemar,
    needed,
    non_inferiority,
    variance_components,
)

NAMES = ["a", "b", "c"]


def first(means: dict[str, float]) -> float:
    return means["a"]


def harmonic(means: dict[str, float]) -> float:
    return len(means) / sum(1 / value for value in means.values()) if all(means.values()) else 0.0


def binary(*rights: int, examples: int = 300) -> np.ndarray:
    """One seed, one component: methods whose first so many examples are right."""
    return np.array([[[[float(i < right)] for i in range(examples)]] for right in rights])


def scores(values: np.ndarray, combine: Any = first, resamples: int = 4000, **given: Any) -> Scores:
    names = NAMES[: values.shape[-1]]
    return Scores(values, names, combine, confidence=0.95, resamples=resamples, seed=0, **given)


def table(seeds: int, examples: int, of_seeds: float, of_examples: float, rest: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        of_seeds * rng.normal(size=(seeds, 1))
        + of_examples * rng.normal(size=(1, examples))
        + rest * rng.normal(size=(seeds, examples))
    )


def test_one_seed_gives_the_textbook_interval_of_a_proportion() -> None:
    found = scores(binary(90)).interval(0)
    width = 1.96 * np.sqrt(0.3 * 0.7 / 300)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - width, abs=0.006)
    assert found.high == pytest.approx(0.3 + width, abs=0.006)


def test_pairing_makes_equal_methods_differ_by_nothing_in_any_resample() -> None:
    same, better = (bootstrap(binary(90, right), ["a"], first, 4000, 0) for right in (90, 120))
    assert np.all(same[0] == same[1])
    # 30 discordant examples, all one way: the variance of a mean of 0s and 1s with p = 0.1.
    assert (better[1] - better[0]).std() == pytest.approx(np.sqrt(0.1 * 0.9 / 300), rel=0.05)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_answers_that_are_all_alike_leave_as_much_open_as_none_of_n_does(seeds: int) -> None:
    found = scores(np.ones((2, seeds, 100, 1)))
    upper = stats.binomtest(0, 100).proportion_ci(0.95, method="exact").high
    alone, difference = found.interval(0), found.difference(0, 1)
    assert (alone.mean, alone.high) == (1.0, 1.0)
    assert alone.low == pytest.approx(1 - upper)
    assert (difference.low, difference.high) == pytest.approx((-upper, upper))


def test_bounds_stay_inside_the_span_and_one_example_says_next_to_nothing() -> None:
    nearly = np.zeros((2, 3, 30, 1))
    nearly[0, :, 1:] = 1
    assert scores(nearly).interval(0).high < 1.0
    assert scores(nearly).difference(0, 1).high == 1.0
    one = scores(np.ones((1, 3, 1, 1))).interval(0)
    assert one.low < 0.05


@pytest.mark.parametrize("seeds", [1, 3])
def test_left_out_examples_count_nowhere(seeds: int) -> None:
    values = np.repeat(binary(90), seeds, axis=1)
    padded = np.concatenate([values, np.full((1, seeds, 50, 1), np.nan)], axis=2)
    assert scores(padded).interval(0) == scores(values).interval(0)


def test_an_example_left_out_of_one_component_counts_in_the_others() -> None:
    values = np.ones((1, 1, 4, 3))
    values[0, 0, 0] = [np.nan, 0.0, 1.0]
    table = contributions(values, NAMES, harmonic)
    assert table.mean() == pytest.approx(3 / (1 + 4 / 3 + 1))


def test_a_score_without_examples_is_no_number() -> None:
    assert np.isnan(contributions(np.full((1, 1, 4, 1), np.nan), ["a"], first)).all()
    assert np.isnan(
        Scores(np.full((1, 3, 4, 1), np.nan), ["a"], first, confidence=0.95, resamples=9, seed=0).by_seed
    ).all()


@pytest.mark.parametrize("seeds", [1, 4])
def test_a_score_that_is_no_mean_has_the_width_of_the_delta_method(seeds: int) -> None:
    rng = np.random.default_rng(1)
    values = np.repeat((rng.random((1, 1, 400, 3)) < [0.9, 0.6, 0.3]).astype(float), seeds, axis=1)
    means = values[0, 0].mean(axis=0)
    found = scores(values, harmonic)
    assert found.by_seed[0] == pytest.approx([3 / (1 / means).sum()] * seeds)
    # Gradient of the harmonic mean: H^2 / (3 m^2).
    gradient = (3 / (1 / means).sum()) ** 2 / (3 * means**2)
    expected = np.sqrt(gradient @ np.cov(values[0, 0].T) @ gradient / 400)
    interval = found.interval(0)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * expected, rel=0.05)


def test_a_component_of_zero_makes_a_score_of_zero_with_room_above() -> None:
    values = np.concatenate([binary(90), binary(200), binary(0)], axis=3)
    found = scores(values, harmonic).interval(0)
    assert (found.mean, found.low) == (0, 0)
    assert found.high > 0.01


def test_resampling_is_reproducible_and_chunks_do_not_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    values = binary(90, 120)
    whole = bootstrap(values, ["a"], first, 500, 3)
    assert np.array_equal(whole, bootstrap(values, ["a"], first, 500, 3))
    assert not np.array_equal(whole, bootstrap(values, ["a"], first, 500, 4))
    monkeypatch.setattr("molf.report.statistics.CHUNK", 300 * 7)
    assert bootstrap(values, ["a"], first, 500, 3).mean() == pytest.approx(whole.mean(), abs=0.01)


def test_the_crossed_interval_becomes_the_t_interval_of_what_alone_varies() -> None:
    examples = table(1, 50, 0, 1, 0)[0]
    mean, low, high = crossed(np.tile(examples, (4, 1)), 0.9)
    assert (float(low), float(high)) == pytest.approx(stats.t.interval(0.9, 49, mean, stats.sem(examples)))
    of_seeds = table(4, 1, 1, 0, 0)[:, 0]
    mean, low, high = crossed(np.tile(of_seeds[:, None], 50), 0.9)
    assert (float(low), float(high)) == pytest.approx(stats.t.interval(0.9, 3, mean, stats.sem(of_seeds)))


def test_variance_components_are_those_of_the_layout() -> None:
    found = variance_components(table(1000, 1000, 2, 3, 4))
    assert (found.seeds, found.examples, found.rest) == pytest.approx((4, 9, 16), rel=0.1)
    negative = np.array([[1.0, -1.0], [-1.0, 1.0]])  # no effect of a seed or an example at all
    assert variance_components(negative) == Components(0.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("bounds", "outcome"),
    [
        ([(-0.01, 0.02), (0.0, 0.1)], Outcome.HOLDS),
        ([(-0.02, 0.02), (0.0, 0.1)], Outcome.UNDECIDED),
        ([(-0.015, 0.02), (0.0, 0.1)], Outcome.UNDECIDED),  # the bound itself does not exceed the margin
        ([(-0.09, -0.02), (0.0, 0.1)], Outcome.FAILS),
        ([(-0.09, -0.02), (-0.03, 0.1)], Outcome.FAILS),
    ],
)
def test_non_inferiority(bounds: list[tuple[float, float]], outcome: Outcome) -> None:
    assert non_inferiority([Interval(0.0, low, high) for low, high in bounds], 0.015) is outcome


def test_labels() -> None:
    assert [label(seeds) for seeds in (1, 2, 3, 10)] == [
        Label.EXAMPLES_ONLY,
        Label.EXPLORATORY,
        Label.SEEDS_AND_EXAMPLES,
        Label.SEEDS_AND_EXAMPLES,
    ]


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 0), (1, 8), (5, 5), (40, 21)])
def test_mcnemar_is_the_exact_sign_test_of_the_discordant(one: int, other: int) -> None:
    first = np.array([1.0] * one + [0.0] * other + [1.0, 0.0, np.nan, 1.0])
    second = np.array([0.0] * one + [1.0] * other + [1.0, 0.0, 1.0, np.nan])
    expected = stats.binomtest(one, one + other).pvalue if one + other else 1.0
    assert mcnemar(first, second) == (one, other, pytest.approx(expected))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_needed_has_the_closed_form_where_examples_alone_vary() -> None:
    seeds, examples = needed(0.0, Components(0.0, 0.25, 0.0), 3, 100, 0.015, 0.95)
    assert seeds is None
    assert examples == pytest.approx((1.96 + 0.8416) ** 2 * 0.25 / 0.015**2, rel=0.01)
    assert needed(0.0, Components(None, 0.25, 0.0), 1, 100, 0.015, 0.95) == (None, examples)


def test_more_of_what_hardly_varies_never_decides() -> None:
    seeds, examples = needed(0.0, Components(0.02**2, 0.0001, 0.0), 3, 2000, 0.015, 0.95)
    assert examples is None
    assert seeds == pytest.approx((1.96 + 0.84) ** 2 * 0.02**2 / 0.015**2, abs=4)
    assert needed(-0.015, Components(0.1, 0.1, 0.1), 3, 100, 0.015, 0.95) == (None, None)


def test_methods_that_never_differed_need_as_many_examples_as_rule_out_a_difference_of_the_margin() -> None:
    alike = np.ones((2, 1, 100, 1))
    seeds, examples = scores(alike).needed(0, 1, 0.015)
    assert (seeds, examples) == (None, 245)  # 1 - 0.025 ** (1 / 245) is just below 0.015
    assert scores(np.ones((2, 1, 245, 1))).needed(0, 1, 0.015) == (None, None)
    assert scores(np.ones((2, 1, 245, 1))).difference(0, 1).low > -0.015


def test_front() -> None:
    assert front([0.9, 0.5, 0.8, 0.8, 0.7], [4, 1, 2, 2, 3]) == [1, 2, 3, 0]
    assert statistics.front([0.5], [1]) == [0]
