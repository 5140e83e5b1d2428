"""Figures of what training did to the weights and to what the model could do before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from molf.report.style import (
    GREY,
    INK,
    MANY,
    Style,
    by_method,
    canvas,
    colour_bar,
    entitle,
    entitle_all,
    grid,
    heat,
    legend,
    notes,
    scale,
)


def read_weights(evaluations: Sequence[Path]) -> pd.DataFrame | None:
    """How each matrix moved, as the mean over a method's seeds; None where an evaluation did not look at it.

    Args:
        evaluations: results/CELL/evaluation of each seed.

    Returns:
        type, layer, relative_change (norm of the change over that of the base), effective_rank, intruders, top.
    """
    files = [folder / "weights.parquet" for folder in evaluations]
    if not files or not all(file.is_file() for file in files):
        return None
    frame = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    frame["relative_change"] = frame["change_norm"] / frame["base_norm"]
    numbers = ["relative_change", "effective_rank", "intruders", "top"]
    return frame.groupby(["type", "layer"], sort=False)[numbers].mean().reset_index()


def by_place(weights: pd.DataFrame, number: str) -> pd.DataFrame:
    """One of the numbers of `read_weights` as module types x layers."""
    kinds = list(dict.fromkeys(weights["type"]))
    return weights.pivot_table(index="type", columns="layer", values=number).reindex(kinds)


def moved_figure(title: str, weights: Mapping[str, pd.DataFrame]) -> Figure:
    """How far each matrix moved, and in how many directions: a row of two heat maps for each method.

    Of more than `MANY` methods it is one row of two, methods by layers.

    Args:
        title: What it is of: model and task.
        weights: By method, as `read_weights` gives them.
    """
    numbers = {"relative_change": "size of the change", "effective_rank": "effective rank of the change"}
    tables = {method: {n: by_place(frame, n) for n in numbers} for method, frame in weights.items()}
    for of in tables.values():
        of["relative_change"] = 100 * of["relative_change"]
    if len(tables) > MANY:
        tables = {"all methods": {n: by_method({method: of[n] for method, of in tables.items()}) for n in numbers}}
    heights = [len(of["effective_rank"]) for of in tables.values()]
    figure, panels = grid(
        8.2, 0.8 + sum(0.26 * count + 0.85 for count in heights), len(tables), 2, gridspec_kw={"height_ratios": heights}
    )
    entitle_all(figure, title)
    for column, (number, words) in enumerate(numbers.items()):
        norm = scale([of[number] for of in tables.values()])
        unit = " %" if number == "relative_change" else ""
        for axes, (method, of) in zip(panels[:, column], tables.items(), strict=True):
            heat(axes, of[number], norm, f"{method}, {words}", ("{:.3g}" + unit).format)
            axes.set_title(f"{method}: {words}" + (", %" if unit else ""), fontsize=9.5, loc="left", color=INK)
            axes.set_xlabel("layer", fontsize=8.5)
            if column:
                axes.set_yticklabels([])
        colour_bar(figure, panels[:, column], norm)
    return figure


def forgetting_figure(group: Mapping[str, Any], title: str, looks: Mapping[str, Style]) -> Figure:
    """Change of the loss on general text by method with its interval; right of zero the model has forgotten."""
    methods = [m for m in group["methods"] if m["general"]]
    figure, axes = canvas(6.4, 1.3 + 0.42 * len(methods))
    entitle(axes, title)
    for y, m in enumerate(methods):
        look, found = looks[m["method"]], m["general"]
        axes.plot([found["low"], found["high"]], [y, y], color=look.colour, lw=2.2, solid_capstyle="butt", zorder=2)
        for end in (found["low"], found["high"]):
            axes.plot([end, end], [y - 0.12, y + 0.12], color=look.colour, lw=2.2, zorder=2)
        spot = axes.plot(found["mean"], y, look.marker, color=look.colour, ms=8, zorder=4)
        said = f"{m['method']}: {found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] nats per token"
        notes(spot[0], [said])
        axes.annotate(
            f"{found['mean']:+.3f}", (found["mean"], y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    axes.axvline(0, color=GREY, lw=1.4, ls=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(methods)), [m["method"] for m in methods])
    axes.set_ylim(len(methods) - 0.5, -0.8)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("change of the loss on general text (nats per token; 0: untrained, right: forgot)", fontsize=9)
    return figure


def intruder_figure(title: str, weights: Mapping[str, pd.DataFrame], looks: Mapping[str, Style]) -> Figure:
    """Intruder dimensions by layer, one line for each method: their share among the top singular vectors looked at."""
    figure, axes = canvas(6.4, 2.9)
    entitle(axes, title)
    for method, frame in weights.items():
        counts = frame.groupby("layer")[["intruders", "top"]].sum()
        share, look = 100 * counts["intruders"] / counts["top"].replace(0, np.nan), looks[method]
        share = share.dropna()
        line = axes.plot(
            share.index, share, color=look.colour, ls=look.dash, marker=look.marker, lw=1.6, ms=5, label=method
        )
        notes(line[0], [f"{method}, layer {layer}: {value:.1f} % intruders" for layer, value in share.items()])
    axes.set_ylim(bottom=-0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("intruders among the top\nsingular vectors (%)", fontsize=9)
    legend(axes)
    return figure
