"""Figures of the routing: which expert won where and when; and the reductions of the routing record that they show."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from molf.modules import place
from molf.report.style import (
    DASHES,
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
    short,
)

WINDOWS = 24  # points of a curve over a training
SHARE = Normalize(0, 1)
SHARES = {0.0: "0 %: never", 0.5: "50 %", 1.0: "100 %: always"}
# Of module types, which are no methods: Okabe and Ito's others, dark to light.
TYPE_COLOURS = ("#000000", "#0072B2", "#D55E00", "#56B4E9", "#CC79A7", "#8C6D1F", "#009E73")
TYPE_MARKERS = "os^Dv*P"


# --- reductions of the routing record --------------------------------------------------------------------------------


def read_routing(train: Path) -> pd.DataFrame:
    """The counted rows of a cell's routing record: step, module, expert, won, score; experts in the record's order.

    Args:
        train: results/CELL/train.
    """
    columns = ["step", "module", "expert", "won", "score"]
    frame = pd.read_parquet(train / "routing.parquet", columns=[*columns, "counted"])
    experts = list(dict.fromkeys(frame["expert"].astype(str)))
    frame["expert"] = pd.Categorical(frame["expert"].astype(str), categories=experts, ordered=True)
    return frame.loc[frame["counted"], columns]


def pooled(routings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The routing rows of several seeds as one, a column `seed` more (0, 1, ...); the seeds share their experts."""
    return pd.concat([frame.assign(seed=i) for i, frame in enumerate(routings)], ignore_index=True)


def share_so_far(routing: pd.DataFrame) -> pd.DataFrame:
    """Each expert's share of the module-steps it has won up to each step: index step, one column for each expert."""
    if routing.empty:
        return pd.DataFrame(index=pd.Index([], name="step"))
    wins = routing.pivot_table(index="step", columns="expert", values="won", aggfunc="sum", observed=False)
    first = routing[routing["expert"] == routing["expert"].cat.categories[0]]
    share = wins.cumsum().div(first.groupby("step").size().cumsum(), axis=0)
    share.columns = pd.Index([str(expert) for expert in share.columns])
    return share


def share_by_place(routing: pd.DataFrame, expert: str) -> pd.DataFrame:
    """Share of the steps that an expert won: one row for each module type, one column for each layer."""
    share = routing[routing["expert"] == expert].groupby("module", sort=False)["won"].mean()
    places = [place(str(module)) for module in share.index]
    table = pd.DataFrame({"type": [p[0] for p in places], "layer": [p[1] for p in places], "share": share.to_numpy()})
    kinds = list(dict.fromkeys(table["type"]))
    return table.pivot_table(index="type", columns="layer", values="share").reindex(kinds)


def share_by_type(routing: pd.DataFrame) -> pd.DataFrame:
    """Share of the steps that the first expert won, by window (index: its last step) and module type."""
    first = routing[routing["expert"] == experts(routing)[0]]
    kinds = {module: place(str(module))[0] for module in first["module"].unique()}
    keys = [windows(first["step"]), first["module"].map(kinds).rename("type")]
    table = first.groupby(keys, sort=True)["won"].mean().unstack("type")
    return table[list(dict.fromkeys(kinds.values()))]


def score_ratio(routing: pd.DataFrame) -> pd.DataFrame:
    """The first expert's score over the best other's, in each window (index: its last step).

    Returns:
        Columns low, median, high: the 10 %, 50 % and 90 % quantiles over modules, steps and seeds. Where a score is 0,
        there is no ratio, and none is counted.
    """
    first, *others = experts(routing)
    keys = ["seed", "step", "module"] if "seed" in routing else ["step", "module"]
    wide = routing.set_index([*keys, "expert"])["score"].unstack("expert")
    ratio = (wide[first] / wide[others].max(axis=1)).rename("ratio").reset_index()
    ratio = ratio[np.isfinite(ratio["ratio"]) & (ratio["ratio"] > 0)]
    table = ratio.groupby(windows(ratio["step"]))["ratio"].quantile([0.1, 0.5, 0.9]).unstack()
    table.columns = pd.Index(["low", "median", "high"])
    return table


def windows(steps: pd.Series) -> pd.Series:
    """For each step the last step of its window; a training has at most `WINDOWS`, of about equal width."""
    known = np.sort(steps.unique())
    window = np.arange(len(known)) * min(WINDOWS, len(known)) // max(1, len(known))
    last = known[np.searchsorted(window, window, side="right") - 1]
    return steps.map(dict(zip(known, last, strict=True))).rename("step")


def experts(routing: pd.DataFrame) -> list[str]:
    """The experts of a record, in its order."""
    return [str(expert) for expert in routing["expert"].cat.categories]


def expert_words(name: str) -> str:
    """An expert's name in words: "full" -> "the full weight", "lora_r8" -> "LoRA r = 8", "lora_r8_2" its second."""
    rank, _, which = name.removeprefix("lora_r").partition("_")
    return "the full weight" if name == "full" else f"LoRA r = {rank}" + (f" (no. {which})" if which else "")


# --- figures ---------------------------------------------------------------------------------------------------------


def routing_heat_map(routings: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Share of the steps that each expert won, by module type and layer: a row of panels for each method.

    Of more than `MANY` methods it is the first expert's alone: methods by layers, and methods by module types.

    Args:
        routings: Counted routing rows by method, as `read_routing` gives them.
        title: What it is of: model and task.
    """
    if len(routings) > MANY:
        return _first_experts(routings, title)
    tables = {
        method: {expert: share_by_place(frame, expert) for expert in experts(frame)}
        for method, frame in routings.items()
    }
    heights = [len(next(iter(of.values()))) for of in tables.values()]
    columns = max(len(of) for of in tables.values())
    figure, panels = grid(
        1.6 + 2.8 * columns,
        0.8 + sum(0.28 * count + 0.95 for count in heights),
        len(tables),
        columns,
        gridspec_kw={"height_ratios": heights},
    )
    entitle_all(figure, title)
    for row, (method, of) in zip(panels, tables.items(), strict=True):
        for axes, (expert, table) in zip(row, of.items(), strict=False):
            words = expert_words(expert)
            heat(axes, table, SHARE, f"{words} won", lambda value: f"{100 * value:.0f} %")
            axes.set_title(f"{method}: {words}", fontsize=9.5, loc="left", color=INK)
            axes.set_xlabel("layer", fontsize=8.5)
        for axes in row[1 : len(of)]:
            axes.set_yticklabels([])
        for axes in row[len(of) :]:
            axes.set_visible(False)
    colour_bar(figure, panels, SHARE, SHARES)
    return figure


def _first_experts(routings: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Share of the steps that each method's first expert won: methods by layers beside methods by module types."""
    firsts = {method: experts(frame)[0] for method, frame in routings.items()}
    places = {
        f"{method}: {expert_words(firsts[method]).removeprefix('the ')}": share_by_place(frame, firsts[method])
        for method, frame in routings.items()
    }
    figure, panels = grid(9.6, 1.7 + 0.26 * len(places), 1, 2)
    entitle_all(figure, title)
    by_layer, by_type = by_method(places), by_method(places, axis=1)
    by_type.columns = pd.Index(short([str(kind) for kind in by_type]))
    left, right = panels[0]
    for axes, table, across in ((left, by_layer, "layer "), (right, by_type, "")):
        heat(axes, table, SHARE, "first expert won", lambda value: f"{100 * value:.0f} %", across)
        axes.set_title(f"first expert, by {across or 'type'}", fontsize=9.5, loc="left", color=INK)
    left.set_yticklabels(list(places))  # whole, where `heat` cuts them
    left.set_xlabel("layer", fontsize=8.5)
    right.set_yticklabels([])
    right.tick_params(axis="x", rotation=45)
    colour_bar(figure, panels, SHARE, SHARES)
    return figure


def share_figure(title: str, routings: Mapping[str, pd.DataFrame], looks: Mapping[str, Style]) -> Figure:
    """The first expert's share of the steps over the training, one panel for each method, one line for each type.

    Of more than `MANY` methods it is one panel with a line for each, the mean of all its modules.
    """
    if len(routings) > MANY:
        return _shares_together(title, routings, looks)
    figure, panels = grid(7.4, 0.4 + 2.5 * len(routings), len(routings), 1, sharex=True)
    entitle_all(figure, title)
    for axes, (method, routing) in zip(panels[:, 0], routings.items(), strict=True):
        table, words = share_by_type(routing), expert_words(experts(routing)[0])
        for i, (kind, label) in enumerate(zip(table, short([str(kind) for kind in table]), strict=True)):
            colour, marker = TYPE_COLOURS[i % len(TYPE_COLOURS)], TYPE_MARKERS[i % len(TYPE_MARKERS)]
            dash = DASHES[i % len(DASHES)]
            line = axes.plot(table.index, table[kind], color=colour, lw=1.5, ls=dash, marker=marker, ms=4, label=label)
            said = f"{method}, {kind}, up to step"
            notes(line[0], [f"{said} {step}: {words} won {100 * x:.0f} %" for step, x in table[kind].items()])
        _share_axis(axes)
        axes.set_title(f"{method}: share of steps won by {words}", fontsize=9.5, loc="left", color=INK)
        legend(axes)
    panels[-1, 0].set_xlabel("optimizer step", fontsize=9)
    return figure


def _shares_together(title: str, routings: Mapping[str, pd.DataFrame], looks: Mapping[str, Style]) -> Figure:
    """The first expert's share of the module-steps in each window, one line for each method."""
    figure, axes = canvas(7.4, 3.1)
    entitle(axes, title)
    for method, routing in routings.items():
        words, look = expert_words(experts(routing)[0]), looks[method]
        first = routing[routing["expert"] == experts(routing)[0]]
        share = first.groupby(windows(first["step"]))["won"].mean()
        label = f"{method}: {words}"
        style = {"color": look.colour, "ls": look.dash, "marker": look.marker, "lw": 1.6, "ms": 4.5}
        line = axes.plot(share.index, share, label=label, **style)
        notes(line[0], [f"{method}, up to step {step}: {words} won {100 * x:.0f} %" for step, x in share.items()])
    _share_axis(axes)
    axes.set_xlabel("optimizer step", fontsize=9)
    legend(axes)
    return figure


def _share_axis(axes: Axes) -> None:
    """From 0 to 100 %, with a line at half, over steps."""
    axes.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)))
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def ratio_figure(title: str, routings: Mapping[str, pd.DataFrame], looks: Mapping[str, Style]) -> Figure:
    """The first expert's score over the best other's, by step, on a logarithmic axis: median and the middle 80 %."""
    figure, axes = canvas(7.4, 3.1)
    entitle(axes, title)
    for method, routing in routings.items():
        table, look, names = score_ratio(routing), looks[method], experts(routing)
        first, others = expert_words(names[0]), " or ".join(map(expert_words, names[1:]))
        axes.fill_between(table.index, table["low"], table["high"], color=look.colour, alpha=0.18, lw=0)
        label = f"{method}: {first}\nover {others}"
        line = axes.plot(
            table.index,
            table["median"],
            color=look.colour,
            ls=look.dash,
            marker=look.marker,
            lw=1.8,
            ms=4.5,
            label=label,
        )
        said = "{}, up to step {}: score of {} is {:.3g} times that of {} (for 80 % of the modules {:.3g} to {:.3g})"
        of_steps = zip(table.index, table["median"], table["low"], table["high"], strict=True)
        notes(line[0], [said.format(method, step, first, mid, others, low, high) for step, mid, low, high in of_steps])
    axes.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel("score ratio (above 1: the first wins)", fontsize=9)
    legend(axes)
    return figure


def overview_figure(
    tables: Mapping[tuple[str, str], Mapping[str, pd.DataFrame]], title: str, said: str, share: bool
) -> Figure:
    """Heat maps of all tasks beside each other, a row of panels for each model and method, in one colour scale.

    Args:
        tables: {(model, method and its first expert): {task: module types x layers}}.
        title: What the colours show.
        said: What a note says before the number.
        share: Whether the values are shares of 1; else sizes from 0 on.
    """
    tasks = list(dict.fromkeys(task for of in tables.values() for task in of))
    every = [table for of in tables.values() for table in of.values()]
    norm = Normalize(0, 100) if share else scale(every)
    several = len({model for model, _ in tables}) > 1
    shown = "{:.0f} %" if share else "{:.3g}"
    heights = [max(len(table) for table in of.values()) for of in tables.values()]
    figure, panels = grid(
        1.7 + 2.3 * len(tasks),
        0.8 + sum(0.26 * count + 0.75 for count in heights),
        len(tables),
        len(tasks),
        gridspec_kw={"height_ratios": heights},
    )
    entitle_all(figure, title)
    for row, ((model, method), of) in zip(panels, tables.items(), strict=True):
        for axes, task in zip(row, tasks, strict=True):
            if task not in of:
                axes.set_visible(False)
                continue
            table = 100 * of[task] if share else of[task]
            heat(axes, table, norm, f"{task}, {method}: {said}".replace("\n", " "), shown.format)
            axes.set_title(f"{task}: {shown.format(np.nanmean(table))}", fontsize=9.5, loc="left", color=INK)
            if task != tasks[0]:
                axes.set_yticklabels([])
        row[0].set_ylabel(f"{model}\n{method}" if several else method, fontsize=9.5, fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("layer", fontsize=8.5)
    colour_bar(figure, panels, SHARE if share else norm, SHARES if share else None)
    return figure
