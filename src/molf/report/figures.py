"""The report's figures: scores, costs and losses here, and the order in which a reader meets all of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from molf.paths import Cell
from molf.report.controls import named, said
from molf.report.rank_figures import ranks_figure, read_ranks
from molf.report.rate_figures import rates_figure
from molf.report.routing_figures import (
    expert_words,
    experts,
    overview_figure,
    pooled,
    ratio_figure,
    read_routing,
    routing_heat_map,
    share_by_place,
    share_figure,
)
from molf.report.style import (
    GREY,
    MANY,
    Style,
    by_method,
    canvas,
    entitle,
    entitle_all,
    grid,
    legend,
    notes,
    save,
    settings,
    styles,
    thinned,
)
from molf.report.weight_figures import (
    by_place,
    forgetting_figure,
    intruder_figure,
    moved_figure,
    read_weights,
)

LOSS_POINTS = 400  # most points of a loss curve
LOSS_MARKERS = 12  # of them with a marker and a note
COSTS = {  # of a method: the axis, a divisor, and the unit
    "train_seconds": ("training time of one seed (s)", 1.0, "s"),
    "peak_memory_bytes": ("peak memory (GB)", 1e9, "GB"),
}

Frames = Mapping[str, pd.DataFrame]
Drawn = tuple[str, Figure, str]  # name, figure, caption


def draw(comparison: Mapping[str, Any], root: Path, folder: Path) -> list[dict[str, str]]:
    """Draws and writes every figure of a comparison.

    Args:
        comparison: As `comparison.build` gives it.
        root: Project folder, for histories, routing records and what evaluations saw of the weights.
        folder: Where the PNG files and the SVG files of the same stems go.

    Returns:
        For each figure model, task (both "" where it is of several), name, file (the PNG's) and caption, in the order
        of reading.
    """
    found = []
    routed: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}
    firsts: dict[tuple[str, str], str] = {}  # of `routed`, the expert in words
    ranks: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}

    def add(model: str, task: str, name: str, figure: Figure, caption: str) -> None:
        file = "-".join(filter(None, (model, task, name))) + ".png"
        save(figure, folder / file)
        found.append({"model": model, "task": task, "name": name, "file": file, "caption": caption})

    with settings():
        for group in comparison["groups"]:
            histories, routings, weights = _records(group, root)
            given = _ranks(group, root)
            for drawn in _of_group(comparison, group, histories, routings, weights, given):
                add(group["model"], group["task"], *drawn)
            names = {m["method"]: named(m) for m in group["methods"]}
            for name, routing in routings.items():
                first, row = experts(routing)[0], (group["model"], names[name])
                firsts[row] = expert_words(first)
                routed.setdefault(row, {})[group["task"]] = share_by_place(routing, first)
            for method, frame in weights.items():
                rank = by_place(frame, "effective_rank")
                ranks.setdefault((group["model"], method), {})[group["task"]] = rank
        several = len(comparison["groups"]) > 1
        for drawn in _overviews(comparison, routed, firsts, ranks) if several else ():
            add("", "", *drawn)
    return found


def _records(group: Mapping[str, Any], root: Path) -> tuple[dict[str, list[pd.DataFrame]], Frames, Frames]:
    """Histories of every seed, routing rows of all seeds, and moves of the weights, by method, where there are any."""
    histories, routings, weights = {}, {}, {}
    for m in group["methods"]:
        name = m["method"]
        cells = [root / Cell(group["model"], group["task"], name, s["seed"]).results for s in m["per_seed"]]
        histories[name] = [pd.read_parquet(cell / "train/history.parquet") for cell in cells]
        if m["routing_share"]:
            routing = pooled([read_routing(cell / "train") for cell in cells])
            if len(routing):  # else no step counted: nothing to show
                routings[name] = routing
        moved = read_weights([cell / "evaluation" for cell in cells])
        if moved is not None:
            weights[name] = moved
    return histories, routings, weights


def _ranks(group: Mapping[str, Any], root: Path) -> dict[str, pd.DataFrame]:
    """Ranks by module type and layer, of the methods that move them."""
    found = {}
    for m in group["methods"]:
        cells = [Cell(group["model"], group["task"], m["method"], s["seed"]) for s in m["per_seed"]]
        table = read_ranks([root / cell.results / "train" for cell in cells]) if m.get("ranks") else None
        if table is not None:
            found[m["method"]] = table
    return found


def _of_group(
    comparison: Mapping[str, Any],
    group: Mapping[str, Any],
    histories: Mapping[str, Sequence[pd.DataFrame]],
    routings: Frames,
    weights: Frames,
    ranks: Frames,
) -> Iterator[Drawn]:
    """The figures of one model and task."""
    looks = styles([(m["method"], m["kind"]) for m in group["methods"]])
    names = {m["method"]: named(m) for m in group["methods"]}
    routings = {names[method]: routing for method, routing in routings.items()}
    looks_by_name = {names[method]: look for method, look in looks.items()}
    together = len(routings) > MANY
    beside = " ".join(f"{text}." for text in said(group))
    percent = f"{100 * comparison['confidence']:g} %"
    yield (
        "score",
        score_figure(group, looks),
        f"Score of each method with its {percent} interval ({comparison['interval']}). The dashed line is the model "
        "before any fine-tuning. Hollow marks, if any, are single seeds.",
    )
    if group["pareto"]:
        yield (
            "cost",
            cost_figure(group, looks),
            "Score against what it costs. Up and to the left is better. A method on the line is the best that its "
            "time, or its memory, can buy; one below it is not worth its cost.",
        )
    yield (
        "loss",
        loss_figure(group, histories, looks),
        "Training loss, smoothed; faint as recorded. Methods saw the same batches in the same order.",
    )
    if group["sweeps"]:
        yield (
            "rates",
            rates_figure(group, _title(group, "learning rates tried"), looks),
            "Each method's sweep: score on validation rows at each factor of its learning rates, the chosen one "
            "filled. A cross at the bottom: the training diverged there. A line that still rises at its end wants a "
            "wider sweep.",
        )
    if routings:
        yield (
            "routing",
            routing_heat_map(routings, _title(group, "where the updates went")),
            f"Each square is {'the mean of several linear layers' if together else 'one linear layer'}. "
            "Its colour and number say in how many percent of the steps the named "
            "expert won the update. Yellow under \u201cthe full weight\u201d: this layer wants full rank. "
            f"{beside}".strip(),
        )
        yield (
            "share",
            share_figure(_title(group, "routing over time"), routings, looks_by_name),
            f"Share of the steps that the first expert won{'' if together else ', by kind of layer'}. "
            "A line that falls: LoRA takes over. "
            f"{beside}".strip(),
        )
    contested = {method: routing for method, routing in routings.items() if len(experts(routing)) > 1}
    if contested:
        yield (
            "ratio",
            ratio_figure(_title(group, "how clear the choice was"), contested, looks_by_name),
            "Score of the first expert over that of the best other; the higher score wins. Near 1 the choice was a "
            f"toss-up. The band holds 80 % of the layers. {beside}".strip(),
        )
    if ranks:
        yield (
            "ranks",
            ranks_figure(_title(group, "where the ranks went"), ranks),
            "Rank of each linear layer's adapter at the end of training, for the methods that share out a budget of "
            "ranks. Yellow: the method found that this layer needs many directions.",
        )
    if weights:
        yield (
            "moved",
            moved_figure(_title(group, "which weights moved"), weights),
            "Left: how far each layer moved, in percent of its size before. Right: in how many directions it moved "
            "(effective rank). Few directions: a small LoRA would do; many: the task wants full rank.",
        )
    if any(m["general"] for m in group["methods"]):
        yield (
            "forgetting",
            forgetting_figure(group, _title(group, "what was forgotten"), looks),
            f"How much worse the model became at text that has nothing to do with the task, with {percent} interval. "
            "Zero is the untrained model.",
        )
    if weights:
        yield (
            "intruders",
            intruder_figure(_title(group, "intruder dimensions"), weights, looks),
            "Share of the strongest directions of each layer's new weight that resemble none of the old weight's. Many "
            "intruders go with forgetting (Shuttleworth et al. 2024).",
        )


def _overviews(
    comparison: Mapping[str, Any],
    routed: Mapping[Any, Frames],
    firsts: Mapping[Any, str],
    ranks: Mapping[Any, Frames],
) -> Iterator[Drawn]:
    """Tasks and models beside each other."""
    data = " (generated data)" if comparison["generated"] else ""
    if routed:
        if many := len(routed) > MANY:
            routed = _all_methods(routed)
        else:
            routed = {(model, f"{name}:\n{firsts[model, name]}"): of for (model, name), of in routed.items()}
        yield (
            "overview-routing",
            overview_figure(routed, f"Where each task wants the first expert{data}", "first expert won", share=True),
            "Share of steps won by the first expert, in one colour scale for all"
            + (", as the mean of a layer's modules" if many else "")
            + ". For molf the first expert is the "
            "full weight: a yellow map is a task that wants full rank, in a dark one LoRA's update serves. "
            "The number above each map is its mean.",
        )
    if ranks:
        if many := len(ranks) > MANY:
            ranks = _all_methods(ranks)
        yield (
            "overview-rank",
            overview_figure(
                ranks, f"In how many directions each task moved the weights{data}", "effective rank", share=False
            ),
            "Effective rank of each layer's change, in one colour scale for all"
            + (", as the mean of its modules" if many else "")
            + ". The brighter, the more directions the "
            "change needs. The number above each map is its mean.",
        )


def _all_methods(ranks: Mapping[tuple[str, str], Frames]) -> dict[tuple[str, str], Frames]:
    """One row of panels for each model: methods by layers."""
    found: dict[tuple[str, str], Frames] = {}
    for model in dict.fromkeys(model for model, _ in ranks):
        of = {method: tables for (other, method), tables in ranks.items() if other == model}
        tasks = dict.fromkeys(task for tables in of.values() for task in tables)
        found[model, "all methods"] = {
            task: by_method({method: tables[task] for method, tables in of.items() if task in tables}) for task in tasks
        }
    return found


def score_figure(group: Mapping[str, Any], looks: Mapping[str, Style]) -> Figure:
    """Score of every method with its interval, seeds as hollow marks, the untrained model as a line."""
    methods = group["methods"]
    figure, axes = canvas(6.4, 1.5 + 0.42 * len(methods))
    top = _top(group)
    for y, m in enumerate(methods):
        look = looks[m["method"]]
        axes.plot([m["low"], m["high"]], [y, y], color=look.colour, lw=2.2, solid_capstyle="butt", zorder=2)
        for end in (m["low"], m["high"]):
            axes.plot([end, end], [y - 0.12, y + 0.12], color=look.colour, lw=2.2, zorder=2)
        spot = axes.plot(m["mean"], y, look.marker, color=look.colour, ms=8, zorder=4)
        notes(spot[0], [f"{m['method']}: {_interval(m)}"])
        if len(m["per_seed"]) > 1:
            seeds = axes.plot(
                [s["score"] for s in m["per_seed"]],
                [y] * len(m["per_seed"]),
                look.marker,
                mfc="white",
                mec=look.colour,
                mew=1.2,
                ms=4.5,
                zorder=3,
            )
            notes(seeds[0], [f"{m['method']}, seed {s['seed']}: {s['score']:.3f}" for s in m["per_seed"]])
        axes.annotate(f"{m['mean']:.3f}", (m["mean"], y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    base = group["base"]["mean"]
    left = base < 0.6 * top
    axes.axvline(base, color=GREY, lw=1.4, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"untrained model {base:.3f}",
        (base, 1),
        (5 if left else -5, -11),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if left else "right",
        fontsize=8.5,
        color=GREY,
    )
    axes.set_yticks(range(len(methods)), [named(m) for m in methods])
    axes.set_ylim(len(methods) - 0.5, -1.1)
    axes.set_xlim(0, top)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{_words(group['primary_name'])} on {group['examples']} test examples (best is 1)")
    entitle(axes, _title(group, "score with interval"))
    return figure


def cost_figure(group: Mapping[str, Any], looks: Mapping[str, Style]) -> Figure:
    """Score with interval against training time and against memory, with the Pareto front as steps."""
    figure, panels = grid(8.2, 3.2, 1, 2, sharey=True)
    entitle_all(figure, _title(group, "score against cost"))
    for axes, (cost, (label, divisor, unit)) in zip(panels[0], COSTS.items(), strict=True):
        for m in group["methods"]:
            look, x = looks[m["method"]], m[cost] / divisor
            axes.plot([x, x], [m["low"], m["high"]], color=look.colour, lw=1.6, zorder=2)
            spot = axes.plot(x, m["mean"], look.marker, color=look.colour, ms=8, ls="", label=m["method"], zorder=4)
            on = ", on the front" if m["method"] in group["pareto"][cost] else ""
            notes(spot[0], [f"{m['method']}: {_interval(m)} at {x:.3g} {unit}{on}"])
        front = sorted((m[cost] / divisor, m["mean"]) for m in group["methods"] if m["method"] in group["pareto"][cost])
        highest = 1.12 * max(m[cost] for m in group["methods"]) / divisor
        # From each method on, more cost buys nothing until the next.
        steps = [*front, (highest, front[-1][1])]
        axes.step(*zip(*steps, strict=True), where="post", color=GREY, lw=1.2, ls=(0, (5, 2)), zorder=1)
        axes.set_xlim(0, highest)
        axes.set_ylim(0, _top(group))
        axes.set_xlabel(label, fontsize=9)
    panels[0, 0].set_ylabel(_words(group["primary_name"]), fontsize=9)
    legend(panels[0, 1])
    return figure


def loss_figure(
    group: Mapping[str, Any], histories: Mapping[str, Sequence[pd.DataFrame]], looks: Mapping[str, Style]
) -> Figure:
    """Training loss by step: faint as recorded, strong smoothed, one line for each seed."""
    figure, axes = canvas(6.4, 3.3)
    for method, frames in histories.items():
        look = looks[method]
        for i, (frame, seed) in enumerate(zip(frames, _seeds(group, method), strict=True)):
            smooth = frame["loss"].ewm(span=max(2.0, len(frame) / 12)).mean()
            curve = thinned(frame[["step", "loss"]].assign(smooth=smooth), LOSS_POINTS)
            marked = thinned(curve, LOSS_MARKERS)
            axes.plot(curve["step"], curve["loss"], color=look.colour, lw=0.8, alpha=0.25)
            axes.plot(curve["step"], curve["smooth"], color=look.colour, lw=1.6)
            spots = axes.plot(marked["step"], marked["smooth"], look.marker, color=look.colour, ms=4, ls="")
            said = f"{method}, seed {seed}, step"
            notes(
                spots[0],
                [f"{said} {step}: {loss:.3f}" for step, loss in zip(marked["step"], marked["smooth"], strict=True)],
            )
            if i == 0:
                axes.plot([], [], color=look.colour, marker=look.marker, ms=4, lw=1.6, label=method)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    entitle(axes, _title(group, "training loss"))
    legend(axes)
    return figure


def _seeds(group: Mapping[str, Any], method: str) -> list[int]:
    return [s["seed"] for m in group["methods"] if m["method"] == method for s in m["per_seed"]]


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _top(group: Mapping[str, Any]) -> float:
    """Upper end of a score axis that starts at 0: 1, or less where all scores are low."""
    highest = max(row["high"] for row in [*group["methods"], group["base"]])
    return min(1.0, math.ceil(11.5 * highest + 0.01) / 10)


def _title(group: Mapping[str, Any], what: str) -> str:
    return f"{group['model']}, {group['task']}: {what}" + (" (generated data)" if group["generated"] else "")


def _words(metric: str) -> str:
    return metric.replace("_", " ")
