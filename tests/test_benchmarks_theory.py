"""The regression of `benchmarks.theory`: what is simulated is what the formulas say, and who wins where."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import theory
from benchmarks.theory import Problem, bulk, counted_risk, decaying, descend, full_risk, risks, simulate, spiked_risk

OVER = Problem(n=60, d_in=20, d_out=12, noise=0.05, singular=(0.8, 0.5, 0.2))
UNDER = dataclasses.replace(OVER, n=12, d_in=40)
# Large enough that the formula for large sizes holds to some per cent.
LARGE = Problem(n=400, d_in=150, d_out=100, noise=0.01, singular=(1.0, 0.7))
LARGE_UNDER = dataclasses.replace(LARGE, n=100, d_in=400)


@pytest.mark.parametrize("problem", [OVER, UNDER])
def test_full_fine_tunings_risk_is_the_formulas(problem: Problem) -> None:
    mean, error = simulate(problem, 400)
    assert abs(mean[-1] - full_risk(problem)) < 4 * error[-1] < 0.1 * full_risk(problem)
    assert mean[0] == pytest.approx(problem.signal) and error[0] < 1e-12
    assert counted_risk(problem)[-1] == pytest.approx(full_risk(problem))


@pytest.mark.parametrize("problem", [LARGE, LARGE_UNDER])
def test_loras_risk_by_rank_is_the_formulas(problem: Problem) -> None:
    mean, error = simulate(problem, 12)
    expected = spiked_risk(problem)
    assert (np.abs(mean - expected) < 4 * error + 0.04 * expected).all()
    assert int(mean.argmin()) == int(expected.argmin()) == 2
    # Counting parameters alone promises too much wherever a rank has to be found in the noise.
    assert (counted_risk(problem)[10:50] < mean[10:50] - 4 * error[10:50]).all()


def test_a_direction_that_drowns_is_not_worth_a_rank() -> None:
    # Found from x = (d_out / seen)^(1/4) on, worth it only well above.
    weak = (150 * 0.01 / 400) ** 0.5 * (100 / 150) ** 0.25
    drowned = dataclasses.replace(LARGE, singular=(1.0, 0.8 * weak))
    assert int(spiked_risk(drowned).argmin()) == 1
    mean, error = simulate(drowned, 12)
    assert mean[2] - mean[1] > 4 * error[2]


def test_low_rank_wins_where_the_difference_is_effectively_low_rank_and_the_noise_is_high() -> None:
    for n in theory.SIZES.values():
        for effective, noise, wins in ((2.0, 1.0, True), (20.0, 0.03, False), (20.0, 3.0, True)):
            problem = theory.problem(n, effective, noise)
            mean, _ = simulate(problem, 10)
            assert (mean[theory.RANK] < mean[-1]) == wins == (theory.counted_advantage(problem, theory.RANK) > 0)


@pytest.mark.parametrize(("rows", "columns"), [(30, 70), (70, 30), (40, 40)])
def test_the_bulk_is_that_of_a_random_matrix(rows: int, columns: int) -> None:
    random = np.random.default_rng(0)
    drawn = [np.linalg.svd(random.standard_normal((rows, columns)), compute_uv=False) ** 2 for _ in range(60)]
    mean = np.mean(drawn, axis=0) / columns
    assert bulk(rows, columns).sum() == pytest.approx(rows)  # the trace
    assert np.abs(bulk(rows, columns) - mean).max() < 0.06 * mean[0]


def test_decaying_singular_values_have_the_effective_rank() -> None:
    values = np.asarray(decaying(40, 6.0))
    shares = values / values.sum()
    assert math.exp(-(shares * np.log(shares)).sum()) == pytest.approx(6.0)
    assert np.square(values).sum() == pytest.approx(1) and (np.diff(values) < 0).all()


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_gradient_descent_from_loras_start_finds_the_best_fit_of_its_rank(size: float) -> None:
    change, x, y = theory.draw(OVER, np.random.default_rng(1))
    found = descend(x, y, rank=3, size=size, steps=20000)
    assert np.square(found - change).sum() == pytest.approx(risks(change, x, y)[3], rel=1e-6)


def test_with_few_examples_what_the_first_a_adds_where_no_example_looks_fades_with_its_size() -> None:
    change, x, y = theory.draw(UNDER, np.random.default_rng(1))
    expected = risks(change, x, y)[2]
    looked = np.linalg.pinv(x) @ x  # onto what the examples show
    added = {}
    for size in (1.0, 0.001):
        found = descend(x, y, rank=2, size=size, steps=30000)
        assert np.square(found @ looked - change).sum() == pytest.approx(expected, rel=1e-4)
        added[size] = np.square(found - found @ looked).sum()
    assert added[0.001] < 1e-4 * expected < 1e-2 * expected < added[1.0]


def test_as_many_examples_as_inputs_has_no_finite_risk() -> None:
    with pytest.raises(ValueError, match="must differ by 2"):
        full_risk(dataclasses.replace(OVER, n=20))


def test_the_command_draws_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(theory, "EFFECTIVE", (6.0,))
    theory.run(["--draws", "2", "--into", str(tmp_path)])
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
