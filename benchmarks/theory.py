"""`python -m benchmarks.theory`: when a low-rank update generalises better than a full one, where that can be computed.

Linear regression y = (W0 + D) x + noise: n independent normal inputs x of d_in numbers, noise of variance sigma^2 on
each of d_out outputs. Fine-tuning starts at W0, so that all it has to learn is D (d_out x d_in). Excess risk is what an
estimate's squared error on a new input exceeds the noise by: the squared Frobenius norm of estimate - D.

The question, and its answer in words that LoRA wins where D is effectively of low rank, are of Zindari, Mulayoff and
Stich 2026, "LoRA vs. Full Fine-Tuning: A Theoretical Perspective", arXiv 2605.19018, of which we knew the abstract. The
formulas are none of theirs: those of full fine-tuning are textbook, those of LoRA follow from the singular vectors of
a spiked random matrix (Benaych-Georges and Nadakuditi 2012; Gavish and Donoho 2014).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

FOLDER = Path("docs")


@dataclass(frozen=True)
class Problem:
    """A regression: sizes, noise, and the singular values of what is to be learnt."""

    n: int  # examples
    d_in: int
    d_out: int
    noise: float  # sigma^2, of each output
    singular: tuple[float, ...]  # of D, the largest first

    @property
    def signal(self) -> float:
        """Squared Frobenius norm of D: the excess risk of learning nothing."""
        return float(np.square(self.singular).sum())

    @property
    def seen(self) -> int:
        """Dimensions of the input that the examples show: all d_in if there are enough of them, else n."""
        return min(self.n, self.d_in)

    @property
    def inverse(self) -> float:
        """What a direction that is seen carries of the noise: E of the inverse Gram matrix's mean eigenvalue."""
        if abs(self.n - self.d_in) < 2:
            raise ValueError(
                f"n is {self.n}, d_in {self.d_in}: they must differ by 2 at least, else the risk is infinite"
            )
        return 1 / (abs(self.n - self.d_in) - 1)


def decaying(size: int, effective: float) -> tuple[float, ...]:
    """Singular values that fall by one ratio, of squared sum 1, with an effective rank (Roy and Vetterli 2007).

    Args:
        size: How many.
        effective: exp of the entropy of the values over their sum; above 1, below `size`.
    """
    low, high = 1e-6, 1 - 1e-9
    for _ in range(200):
        ratio = (low + high) / 2
        shares = ratio ** np.arange(size)
        shares = shares[shares > 0] / shares.sum()
        if math.exp(-float((shares * np.log(shares)).sum())) < effective:
            low = ratio
        else:
            high = ratio
    values = ratio ** np.arange(size)
    return tuple((values / np.linalg.norm(values)).tolist())


# --- formulas --------------------------------------------------------------------------------------------------------


def full_risk(problem: Problem) -> float:
    """Expected excess risk of full fine-tuning: least squares, of all solutions the nearest to W0. Exact.

    n > d_in + 1: sigma^2 d_out d_in / (n - d_in - 1). n < d_in - 1: the share 1 - n / d_in of D that no example shows
    stays unlearnt, and sigma^2 d_out n / (d_in - n - 1) is noise.
    """
    unseen = problem.signal * (1 - problem.seen / problem.d_in)
    return unseen + problem.noise * problem.d_out * problem.seen * problem.inverse


def counted_risk(problem: Problem) -> Array:
    """Excess risk by rank 0 to d_out where every direction of D stands out of the noise: bias plus counted parameters.

    The tail of D, and noise as of the parameters of a rank-r matrix: r seen for the part that reads the input, and
    r (d_out - r) for the directions that it writes to.
    """
    squares = np.zeros(problem.d_out)
    squares[: len(problem.singular)] = np.square(problem.singular)[: problem.d_out]
    tail = np.concatenate([[0.0], np.cumsum(squares)])
    ranks, share = np.arange(problem.d_out + 1), problem.seen / problem.d_in
    noise = ranks * problem.seen * problem.inverse + share * ranks * (problem.d_out - ranks) / problem.n
    return problem.signal - share * tail + problem.noise * noise


def spiked_risk(problem: Problem) -> Array:
    """Excess risk of the best update of rank 0 to d_out, for large sizes and few directions in D.

    What decides is a d_out x seen matrix of signal, of singular values s_i sqrt(n), and noise. Its i-th left singular
    vector has cosine c_i with D's own: 0 for a signal of x = s_i sqrt(n / (seen sigma^2)) below (d_out / seen)^(1/4),
    so that a weak direction is not found at all and a rank spent on it buys noise alone.
    """
    m, q = problem.d_out, problem.seen
    beta = m / q
    x = np.sqrt(problem.n / (q * problem.noise)) * np.asarray(problem.singular)[:m]
    found = x[x > beta**0.25]
    y2 = (1 + found**2) * (beta + found**2) / found**2
    left = (found**4 - beta) / (found**4 + beta * found**2)
    right = (found**4 - beta) / (found**4 + found**2)
    # Of each direction that is taken: the squared noise that comes with it, in units of sigma^2 seen.
    noise = y2 - 2 * found * np.sqrt(y2 * left * right) + found**2 * left
    rest = bulk(m, q)[len(found) :]
    gained, paid = np.zeros(m), np.zeros(m)
    gained[: len(found)] = np.square(problem.singular)[: len(found)] * left
    paid[: len(found)], paid[len(found) : len(found) + len(rest)] = noise, rest
    share = q / problem.d_in
    steps = -share * gained + problem.noise * q * problem.inverse * paid
    return problem.signal + np.concatenate([[0.0], np.cumsum(steps)])


def bulk(rows: int, columns: int) -> Array:
    """Eigenvalues of N N^T / columns, the largest first, N (rows x columns) of unit normals: Marchenko and Pastur's.

    Returns:
        (min(rows, columns),): quantiles of their law, scaled to its mean.
    """
    small, large = sorted((rows, columns))
    ratio = small / large
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # Angles instead of values: the density's ends are vertical.
    angle = (np.arange(20000) + 0.5) * math.pi / 20000
    values = (high + low) / 2 + (high - low) / 2 * np.cos(angle)
    mass = np.cumsum(np.sin(angle) ** 2 / values)
    wanted = (np.arange(small) + 0.5) / small * mass[-1]
    found = values[np.minimum(np.searchsorted(mass, wanted), len(values) - 1)]
    return found / found.mean() * (large / columns)


def counted_advantage(problem: Problem, rank: int) -> float:
    """By how much the counted risk of full fine-tuning exceeds that of rank r; above 0 LoRA of that rank wins.

    With many examples it is sigma^2 (d_in - r) (d_out - r) / n, the noise outside the r directions, less the energy
    that D has there.
    """
    return full_risk(problem) - float(counted_risk(problem)[rank])


# --- simulation ------------------------------------------------------------------------------------------------------


def draw(problem: Problem, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """One data set: D (d_out x d_in), inputs (n x d_in), what is left to explain of the outputs (n x d_out)."""
    k = len(problem.singular)
    u = np.linalg.qr(random.standard_normal((problem.d_out, k)))[0]
    v = np.linalg.qr(random.standard_normal((problem.d_in, k)))[0]
    change = (u * np.asarray(problem.singular)) @ v.T
    x = random.standard_normal((problem.n, problem.d_in))
    noise = math.sqrt(problem.noise) * random.standard_normal((problem.n, problem.d_out))
    return change, x, x @ change.T + noise


def risks(change: Array, x: Array, y: Array) -> Array:
    """Excess risk of the best fit of each rank from 0 to d_out.

    The best fit of rank r among all that are as good on the data and nearest to W0 is least squares (of least norm)
    followed by a projection onto the r output directions in which the fitted values are largest: reduced-rank
    regression (Izenman 1975). Gradient descent on B A reaches it, since the loss of a two-layer linear network has no
    other local minima (Baldi and Hornik 1989). With n < d_in that holds up to B A0', where A0' is the part of the
    first A that no example shows and that no gradient moves: with LoRA's B = 0 at the start it fades with A0's size.
    """
    solved = np.linalg.lstsq(x, y, rcond=None)[0].T
    directions = np.linalg.svd(x @ solved.T, full_matrices=True)[2]
    ours, true = directions @ solved, directions @ change
    steps = (ours**2).sum(axis=1) - 2 * (ours * true).sum(axis=1)
    return np.square(change).sum() + np.concatenate([[0.0], np.cumsum(steps)])


def simulate(problem: Problem, draws: int, seed: int = 0) -> tuple[Array, Array]:
    """Mean excess risk by rank 0 to d_out over so many data sets, and its standard error.

    The last rank is full fine-tuning.
    """
    random = np.random.default_rng(seed)
    found = np.stack([risks(*draw(problem, random)) for _ in range(draws)])
    return found.mean(axis=0), found.std(axis=0, ddof=1) / math.sqrt(draws)


def descend(x: Array, y: Array, rank: int, size: float, steps: int, seed: int = 0) -> Array:
    """B A after gradient descent on the squared error from LoRA's start: B = 0, A uniform up to size / sqrt(d_in).

    Args:
        x: (n, d_in).
        y: (n, d_out).
        rank: Of B A.
        size: 1 is Kaiming's, as LoRA has it.
        steps: Of descent, with a rate that the data's curvature allows.
        seed: Of A.
    """
    random, n = np.random.default_rng(seed), len(x)
    bound = size / math.sqrt(x.shape[1])
    a, b = random.uniform(-bound, bound, (rank, x.shape[1])), np.zeros((y.shape[1], rank))
    top = np.linalg.norm(x, 2) ** 2 / n
    scale = max(1.0, float(np.linalg.norm(np.linalg.lstsq(x, y, rcond=None)[0], 2)))
    rate = 0.25 / (top * scale)
    for _ in range(steps):
        g = (b @ (a @ x.T) - y.T) @ x / n
        a, b = a - rate * b.T @ g, b - rate * g @ a.T
    product: Array = b @ a
    return product


# --- figure ----------------------------------------------------------------------------------------------------------

SIZES = {"over-determined": 180, "under-determined": 30}  # n, at d_in 60
D_IN, D_OUT, RANK = 60, 40, 4
EFFECTIVE = (2.0, 6.0, 20.0)
NOISES = (0.1, 1.0, 10.0)  # energy of the noise over that of D x


def problem(n: int, effective: float, noise: float) -> Problem:
    """One of the figure's: D of squared norm 1, `noise` the energy of all outputs' noise."""
    return Problem(n, D_IN, D_OUT, noise / D_OUT, decaying(D_OUT, effective))


def figure(path: Path, draws: int) -> list[str]:
    """Draws excess risk by rank, and where LoRA of one rank beats full fine-tuning, and writes a PNG.

    Returns:
        Lines that say how well the formulas' borders fit.
    """
    from molf.report.style import BLUE, GREEN, INK, ORANGE, entitle_all, grid, settings

    colours = dict(zip(NOISES, (GREEN, BLUE, ORANGE), strict=True))
    said = []
    with settings():
        made, panels = grid(12, 6.6, len(SIZES), len(EFFECTIVE) + 1)
        entitle_all(made, "Excess risk of an update of rank r, least squares from the pretrained weight")
        for row, (words, n) in zip(panels, SIZES.items(), strict=True):
            for axes, effective in zip(row, EFFECTIVE, strict=False):
                for noise, colour in colours.items():
                    of = problem(n, effective, noise)
                    mean, error = simulate(of, draws)
                    ranks = np.arange(D_OUT + 1)
                    axes.errorbar(ranks[::2], mean[::2], 2 * error[::2], fmt="o", ms=3, lw=1, color=colour)
                    axes.plot(ranks, spiked_risk(of), color=colour, lw=1.4, label=f"noise {noise:g}")
                    axes.plot(ranks, counted_risk(of), color=colour, lw=1, ls=(0, (1.5, 1.5)))
                    axes.axhline(full_risk(of), color=colour, lw=1, ls=(0, (6, 3)))
                logarithmic(axes, "y")
                axes.set_ylim(0.008, 30)
                if effective != EFFECTIVE[0]:
                    axes.set_yticklabels([])
                axes.set_title(
                    f"n = {n}: {words}\neffective rank of D: {effective:g}", fontsize=9, loc="left", color=INK
                )
                axes.set_xlabel("rank r of the update", fontsize=8.5)
            row[0].set_ylabel("excess risk (1: nothing learnt)", fontsize=8.5)
            right, squares = regimes(row[-1], n, max(4, draws // 4))
            said.append(f"{words}: who wins at rank {RANK} is what both formulas say in {right} of {squares} places")
        panels[1, 0].legend(frameon=False, fontsize=8, loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=100, metadata={"Software": None})
    return said


def regimes(axes: "Axes", n: int, draws: int) -> tuple[int, int]:
    """Who wins at RANK, by D's effective rank and the noise: squares simulated, lines by the two formulas.

    Returns:
        In how many squares both formulas name the simulation's winner, and how many squares there are.
    """
    from matplotlib.colors import ListedColormap

    from molf.report.style import BLUE, INK, ORANGE

    effective, noises = np.geomspace(1.3, 30, 12), np.geomspace(0.03, 30, 12)
    wins = np.zeros((len(noises), len(effective)))
    spiked, counted = np.zeros_like(wins), np.zeros_like(wins)
    for (i, j), _ in np.ndenumerate(wins):
        of = problem(n, float(effective[j]), float(noises[i]))
        mean, _ = simulate(of, draws)
        wins[i, j] = mean[-1] / mean[RANK]
        spiked[i, j], counted[i, j] = full_risk(of) - spiked_risk(of)[RANK], counted_advantage(of, RANK)
    axes.pcolormesh(effective, noises, wins > 1, cmap=ListedColormap([BLUE, ORANGE]), alpha=0.55, vmin=0, vmax=1)
    axes.contour(effective, noises, spiked, levels=[0.0], colors=[INK], linewidths=1.6)
    axes.contour(effective, noises, counted, levels=[0.0], colors=[INK], linewidths=1.2, linestyles="dotted")
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    axes.set_title(f"orange: rank {RANK} beats full\nlines: the formulas' borders", fontsize=9, loc="left", color=INK)
    axes.set_xlabel("effective rank of D", fontsize=8.5)
    axes.set_ylabel("noise over signal", fontsize=8.5)
    agree = ((wins > 1) == (spiked > 0)) & ((wins > 1) == (counted > 0))
    return int(agree.sum()), agree.size


def logarithmic(axes: "Axes", which: str) -> None:
    """A logarithmic axis with plain numbers at a few places."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if which == "x" else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def run(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure and prints where the theory puts the border."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=100, help="data sets for each point (default 100)")
    parser.add_argument("--into", type=Path, default=FOLDER, help="folder of the figure (default docs)")
    options = parser.parse_args(arguments)
    for words, n in SIZES.items():
        print(f"{words}: n = {n}, {D_IN} inputs, {D_OUT} outputs; excess risk, 1 = nothing learnt")
        for effective in EFFECTIVE:
            for noise in NOISES:
                of = problem(n, effective, noise)
                mean, error = simulate(of, options.draws)
                best = int(mean.argmin())
                spiked, counted = spiked_risk(of), counted_risk(of)
                off = float(np.abs(spiked / mean - 1).max())
                print(
                    f"  effective rank {effective:4g}, noise {noise:4g}: full {mean[-1]:.3f} (formula "
                    f"{full_risk(of):.3f}), rank {RANK} {mean[RANK]:.3f} +- {error[RANK]:.3f} (spiked "
                    f"{spiked[RANK]:.3f}, counted {counted[RANK]:.3f}), best rank {best} (spiked {spiked.argmin()}, "
                    f"counted {counted.argmin()}); spiked off by at most {off:.0%}"
                )
    print("\n".join(figure(options.into / "theory.png", options.draws)))
    print(f"{options.into / 'theory.png'} written")


if __name__ == "__main__":
    run()
