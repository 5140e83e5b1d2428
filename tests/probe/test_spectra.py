"""Ranks and energies of known spectra; errors of truncation against a truth that the test knows."""

import pytest
import torch

from molf import damage
from molf.probe import spectra


def matrix(values: list[float], rows: int = 7, columns: int = 5) -> torch.Tensor:
    """A random matrix of given singular values."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows))[0][:, : len(values)]
    right = torch.linalg.qr(torch.randn(columns, columns))[0][:, : len(values)]
    return left @ torch.diag(torch.tensor(values)) @ right.T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_ranks_and_energies_of_known_spectra(shape: tuple[int, int]) -> None:
    found = matrix([3.0, 2.0, 1.0], *shape)
    values = spectra.singular_values(found)
    torch.testing.assert_close(values, torch.tensor([3.0, 2, 1, 0, 0], dtype=torch.float64), atol=1e-3, rtol=1e-5)
    assert spectra.stable_rank(values) == pytest.approx(14 / 9, rel=1e-5)
    assert [spectra.energy(values, rank) for rank in (0, 1, 2, 3, 9)] == pytest.approx([0, 9 / 14, 13 / 14, 1, 1])
    # exp of the entropy of 1/2, 1/3, 1/6.
    assert damage.effective_rank(found) == pytest.approx(2 ** (1 / 2) * 3 ** (1 / 3) * 6 ** (1 / 6), rel=1e-4)
    assert damage.effective_rank(torch.eye(6)) == pytest.approx(6)


def test_a_matrix_of_zeros_has_no_rank() -> None:
    values = spectra.singular_values(torch.zeros(3, 4))
    assert spectra.stable_rank(values) == 0 and spectra.energy(values, 1) == 1
    assert damage.effective_rank(torch.zeros(3, 4)) == 0


def test_the_noise_share_is_what_the_expectation_does_not_explain() -> None:
    assert spectra.noise_share(signal=1.0, mean_square=4.0) == 0.75
    assert spectra.noise_share(-0.5, 4.0) == 1 and spectra.noise_share(5.0, 4.0) == 0  # by chance
    assert spectra.noise_share(0.0, 0.0) == 0


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("spread_out", [True, False], ids=["noise everywhere", "noise in one output"])
def test_errors_are_unbiased_estimates_of_the_distance_to_a_truth_never_shown(
    shape: tuple[int, int], spread_out: bool
) -> None:
    truth = matrix([4.0, 2.0, 0.3, 0.3], *shape)
    weights = torch.ones(shape) if spread_out else torch.zeros(shape)
    weights[3] = 4.0
    sigma, draws = 0.1, 400
    torch.manual_seed(1)
    found, exact = [], []
    for _ in range(draws):
        # Two folds a half, so that a half's noise has variance (sigma weights)^2.
        folds = [truth + 2**0.5 * sigma * weights * torch.randn(shape) for _ in range(4)]
        a, b, spread = (folds[0] + folds[1]) / 2, (folds[2] + folds[3]) / 2, (folds[2] - folds[3]) / 2
        found.append(spectra.excess_errors(a, b, spread, share=1.0))
        u, s, vh = torch.linalg.svd(a.double())
        cut = [(u[:, :r] * s[:r]) @ vh[:r] for r in range(17)]
        exact.append(torch.stack([(part - truth).square().sum() for part in cut]))
    difference = torch.stack(found) - torch.stack(exact)
    error = difference.std(dim=0) / draws**0.5
    assert (difference.mean(dim=0).abs() < 4 * error + 1e-9).all()
    assert float(torch.stack(exact)[:, 0].mean()) == pytest.approx(float(truth.square().sum()))


def test_more_rows_shrink_the_full_updates_noise_and_not_what_truncation_loses() -> None:
    torch.manual_seed(0)
    truth, sigma = matrix([4.0, 2.0], 20, 20), 0.1
    all_of = {share: torch.zeros(21, dtype=torch.float64) for share in (1.0, 0.25, 0.0)}
    for _ in range(200):
        a, b, c, d = (truth + sigma * torch.randn(20, 20) for _ in range(4))
        for share in all_of:
            all_of[share] += spectra.excess_errors(a, (b + c) / 2**0.5 + (1 - 2**0.5) * truth, (b - c) / 2**0.5, share)
    mean = {share: total / 200 for share, total in all_of.items()}
    assert [float(mean[share][-1]) for share in mean] == pytest.approx([4.0, 1.0, 0.0], rel=0.06, abs=0.05)
    assert all(float(of[0]) == pytest.approx(20, rel=0.02) for of in mean.values())  # nothing learnt: all of it
    assert all(float(of[1]) > 4 for of in mean.values())  # the second direction's energy, whatever the rows
    assert int(mean[1.0].argmin()) == int(mean[0.25].argmin()) == 2
