"""Intervals on cases whose answer is known."""

import numpy as np
import pytest

from molf.report.statistics import Interval, Label, Outcome, bootstrap, interval, label, non_inferiority, scores


def first(means: dict[str, float]) -> float:
    return means["a"]


def harmonic(means: dict[str, float]) -> float:
    return len(means) / sum(1 / value for value in means.values()) if all(means.values()) else 0.0


def binary(*rights: int, examples: int = 300) -> np.ndarray:
    """One seed, one component: methods whose first so many examples are right."""
    return np.array([[[[float(i < right)] for i in range(examples)]] for right in rights])


def test_interval_of_a_proportion_is_the_textbook_one() -> None:
    values = binary(90)
    drawn = bootstrap(values, ["a"], first, 4000, 0)[0]
    found = interval(scores(values, ["a"], first)[0, 0], drawn, 0.95)
    width = 1.96 * np.sqrt(0.3 * 0.7 / 300)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - width, abs=0.006)
    assert found.high == pytest.approx(0.3 + width, abs=0.006)


def test_pairing_makes_equal_methods_differ_by_nothing() -> None:
    same, better = bootstrap(binary(90, 90), ["a"], first, 200, 0), bootstrap(binary(90, 120), ["a"], first, 4000, 0)
    assert np.all(same[0] == same[1])
    difference = better[1] - better[0]
    # 30 discordant examples, all one way: the variance of a mean of 0s and 1s with p = 0.1.
    assert difference.std() == pytest.approx(np.sqrt(0.1 * 0.9 / 300), rel=0.05)


def test_no_variance_no_width() -> None:
    drawn = bootstrap(np.ones((1, 3, 20, 1)), ["a"], first, 100, 0)
    assert interval(1.0, drawn[0], 0.95) == Interval(1.0, 1.0, 1.0)


def test_left_out_examples_count_nowhere() -> None:
    values = binary(90)
    padded = np.concatenate([values, np.full((1, 1, 50, 1), np.nan)], axis=2)
    assert scores(padded, ["a"], first)[0, 0] == pytest.approx(0.3)
    narrow, wide = bootstrap(values, ["a"], first, 3000, 0), bootstrap(padded, ["a"], first, 3000, 0)
    assert narrow.std() == pytest.approx(wide.std(), rel=0.06)


def test_a_score_without_examples_is_no_number() -> None:
    assert np.isnan(scores(np.full((1, 1, 4, 1), np.nan), ["a"], first)).all()


def test_score_that_is_no_mean_is_recomputed_from_resampled_means() -> None:
    rng = np.random.default_rng(1)
    values = (rng.random((1, 1, 400, 3)) < [0.9, 0.6, 0.3]).astype(float)
    means = values[0, 0].mean(axis=0)
    assert scores(values, ["a", "b", "c"], harmonic)[0, 0] == pytest.approx(3 / (1 / means).sum())
    drawn = bootstrap(values, ["a", "b", "c"], harmonic, 4000, 0)[0]
    # Delta method: gradient of the harmonic mean is H^2 / (3 m^2).
    gradient = (3 / (1 / means).sum()) ** 2 / (3 * means**2)
    expected = np.sqrt((gradient**2 * means * (1 - means)).sum() / 400)
    assert drawn.std() == pytest.approx(expected, rel=0.12)


def test_seeds_are_resampled_too_and_alike_for_all_methods() -> None:
    values = np.stack([np.stack([np.full((20, 1), a), np.full((20, 1), b)]) for a, b in ((0.2, 0.4), (0.3, 0.5))])
    drawn = bootstrap(values, ["a"], first, 2000, 0)
    assert {round(value, 6) for value in drawn[0]} == {0.2, 0.3, 0.4}
    assert np.mean(np.isclose(drawn[0], 0.3)) == pytest.approx(0.5, abs=0.05)
    assert drawn[1] - drawn[0] == pytest.approx(0.1)


def test_equal_seeds_give_equal_numbers_and_chunks_do_not_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    values = binary(90, 120)
    whole = bootstrap(values, ["a"], first, 500, 3)
    assert np.array_equal(whole, bootstrap(values, ["a"], first, 500, 3))
    assert not np.array_equal(whole, bootstrap(values, ["a"], first, 500, 4))
    monkeypatch.setattr("molf.report.statistics.CHUNK", 300 * 7)
    assert bootstrap(values, ["a"], first, 500, 3).mean() == pytest.approx(whole.mean(), abs=0.01)


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
    assert label(1) is Label.EXAMPLES_ONLY
    assert label(2) is Label.EXPLORATORY
