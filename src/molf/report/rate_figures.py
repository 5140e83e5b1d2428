"""A figure of the report: what each learning rate of a sweep scored on validation rows, and which was taken."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from molf.report.style import GREY, Style, canvas, entitle, legend, notes


def rates_figure(group: Mapping[str, Any], title: str, looks: Mapping[str, Style]) -> Figure:
    """Score on the validation rows by factor of the learning rates, a line a method; the chosen factor filled.

    Args:
        group: With `sweeps`, as `tuning.sweep` gives each.
        title: Of the figure.
        looks: Of its methods; one whose cells all lack has none and is left out.
    """
    figure, axes = canvas(6.4, 3.3)
    shown = [of for of in group["sweeps"] if of["method"] in looks]
    factors = sorted({trial["factor"] for of in shown for trial in of["trials"]})
    scores = [trial["score"] for of in shown for trial in of["trials"] if trial["score"] is not None]
    for of in shown:
        look, sound = looks[of["method"]], [trial for trial in of["trials"] if trial["score"] is not None]
        if not sound:
            continue
        x, y = [trial["factor"] for trial in sound], [trial["score"] for trial in sound]
        axes.plot(x, y, color=look.colour, lw=1.6, ls=look.dash, zorder=2)
        spots = axes.plot(x, y, look.marker, mfc="white", mec=look.colour, mew=1.4, ms=6, ls="", zorder=3)
        notes(spots[0], [f"{of['method']} at {_rates(trial)}: {trial['score']:.3f}" for trial in sound])
        at = [trial for trial in sound if trial["factor"] == of["chosen"]]
        taken = axes.plot(
            [t["factor"] for t in at], [t["score"] for t in at], look.marker, color=look.colour, ms=9, ls=""
        )
        if at:
            taken[0].set_zorder(4)
            notes(taken[0], [f"{of['method']}, chosen: {_rates(at[0])}"])
        axes.plot([], [], color=look.colour, marker=look.marker, ms=6, lw=1.6, ls=look.dash, label=of["method"])
    broken = sorted({trial["factor"] for of in shown for trial in of["trials"] if trial["diverged"] is not None})
    for factor in broken:
        names = [of["method"] for of in shown if any(t["factor"] == factor and t["diverged"] for t in of["trials"])]
        spot = axes.plot([factor], [0], "x", color=GREY, ms=9, mew=2, clip_on=False, zorder=5)
        notes(spot[0], [f"diverged at factor {factor:g}: {', '.join(names)}"])
    axes.set_xscale("log")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_ylim(0, min(1.0, math.ceil(11.5 * max(scores, default=1.0) + 0.01) / 10))
    axes.set_xlabel("factor of the method's learning rates")
    axes.set_ylabel(f"{group['primary_name'].replace('_', ' ')}, validation rows", fontsize=9)
    entitle(axes, title)
    legend(axes)
    return figure


def _rates(trial: Mapping[str, Any]) -> str:
    return " and ".join(f"{rate:g}" for rate in trial["rates"].values())
