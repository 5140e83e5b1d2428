"""The report's figures, and the small reductions of the routing record that they show. Colours are Okabe and Ito's."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from molf.paths import Cell

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
# The four kinds keep their colour in every report; further methods take the rest in turn.
KIND_COLOURS = {"fft": BLUE, "lora": ORANGE, "molf": GREEN, "molf-e": PURPLE}
SPARE_COLOURS = ("#56B4E9", "#D55E00", "#4B3B8F", "#8C6D1F", "#1B5E5A")
TWO_SIDED = LinearSegmentedColormap.from_list("two_sided", ["#B35C00", "#F1B65D", "#F7F7F7", "#6BAED6", "#08519C"])
INK, GREY, GRID = "#222222", "#6B6B6B", "#DDDDDD"
DPI = 150


# --- reductions of the routing record --------------------------------------------------------------------------------


def read_routing(train: Path) -> pd.DataFrame:
    """The counted rows of a cell's routing record: step, module, expert, won (bool); experts in the record's order.

    Args:
        train: results/CELL/train.
    """
    frame = pd.read_parquet(train / "routing.parquet", columns=["step", "module", "expert", "won", "counted"])
    experts = list(dict.fromkeys(frame["expert"].astype(str)))
    frame["expert"] = pd.Categorical(frame["expert"].astype(str), categories=experts, ordered=True)
    return frame.loc[frame["counted"], ["step", "module", "expert", "won"]]


def share_so_far(routing: pd.DataFrame) -> pd.DataFrame:
    """Each expert's share of the module-steps it has won up to each step: index step, one column for each expert."""
    if routing.empty:
        return pd.DataFrame(index=pd.Index([], name="step"))
    wins = routing.pivot_table(index="step", columns="expert", values="won", aggfunc="sum", observed=False)
    first = routing[routing["expert"] == routing["expert"].cat.categories[0]]
    share = wins.cumsum().div(first.groupby("step").size().cumsum(), axis=0)
    share.columns = pd.Index([str(expert) for expert in share.columns])
    return share


def first_expert_share(routing: pd.DataFrame) -> pd.DataFrame:
    """Share of the steps that the first expert won: one row for each module type, one column for each layer."""
    first = routing[routing["expert"] == routing["expert"].cat.categories[0]]
    share = first.groupby("module", sort=False)["won"].mean()
    places = [_place(str(module)) for module in share.index]
    table = pd.DataFrame({"type": [p[0] for p in places], "layer": [p[1] for p in places], "share": share.to_numpy()})
    kinds = list(dict.fromkeys(table["type"]))
    return table.pivot_table(index="type", columns="layer", values="share").reindex(kinds)


def _place(module: str) -> tuple[str, int]:
    """Type and layer of a module: "model.layers.3.mlp.up_proj" -> ("mlp.up_proj", 3); without a number, layer 0."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return parts[-1], 0
    return ".".join(parts[numbers[0] + 1 :]), int(parts[numbers[0]])


# --- figures -------------------------------------------------------------------------------------------------------


def colours(methods: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A colour for each method.

    Args:
        methods: (method, kind) in the report's order; the first of a kind takes the kind's colour.
    """
    taken: dict[str, str] = {}
    for method, kind in methods:
        free = [KIND_COLOURS[kind]] if kind in KIND_COLOURS else []
        free += [*SPARE_COLOURS, *KIND_COLOURS.values(), GREY]
        taken.setdefault(method, next((colour for colour in free if colour not in taken.values()), GREY))
    return taken


def score_figure(group: Mapping[str, Any], palette: Mapping[str, str]) -> Figure:
    """Score of every method with its interval, seeds as small dots, the untrained model as a line."""
    methods = group["methods"]
    figure, axes = _canvas(6.4, 1.5 + 0.42 * len(methods))
    top = _top(group)
    for y, m in enumerate(methods):
        colour = palette[m["method"]]
        axes.plot([m["low"], m["high"]], [y, y], color=colour, lw=2.2, solid_capstyle="butt", zorder=2)
        for end in (m["low"], m["high"]):
            axes.plot([end, end], [y - 0.12, y + 0.12], color=colour, lw=2.2, zorder=2)
        axes.plot(m["mean"], y, "o", color=colour, ms=8, zorder=4)
        if len(m["per_seed"]) > 1:
            axes.plot(
                [s["score"] for s in m["per_seed"]],
                [y] * len(m["per_seed"]),
                "o",
                mfc="white",
                mec=colour,
                mew=1.2,
                ms=4.5,
                zorder=3,
            )
        axes.annotate(f"{m['mean']:.3f}", (m["mean"], y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    if group["base"]:
        axes.axvline(group["base"]["mean"], color=GREY, lw=1.4, ls=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"untrained model {group['base']['mean']:.3f}",
            (group["base"]["mean"], 1),
            (5, -11) if group["base"]["mean"] < 0.6 * top else (-5, -11),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if group["base"]["mean"] < 0.6 * top else "right",
            fontsize=8.5,
            color=GREY,
        )
    axes.set_yticks(range(len(methods)), [m["method"] for m in methods])
    axes.set_ylim(len(methods) - 0.5, -1.1)
    axes.set_xlim(0, top)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{_words(group['primary_name'])} on {group['examples']} test examples (best is 1)")
    _entitle(axes, _title(group, "score with interval"))
    return figure


def routing_heat_map(routings: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Share of the steps that the first expert won, by module type and layer; one panel for each method.

    Args:
        routings: Counted routing rows by method, as `read_routing` gives them.
        title: What it is of: model and task.
    """
    tables = {method: first_expert_share(frame) for method, frame in routings.items()}
    rows = [len(table) for table in tables.values()]
    figure = Figure(figsize=(7.2, 0.9 + sum(0.3 * count + 1.15 for count in rows)), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left")
    panels = figure.subplots(len(tables), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for axes, (method, table) in zip(panels, tables.items(), strict=True):
        first, *rest = [_expert(str(e)) for e in routings[method]["expert"].cat.categories]
        image = axes.imshow(table.to_numpy(), cmap=TWO_SIDED, vmin=0, vmax=1, aspect="auto")
        layers = list(table.columns)
        every = max(1, round(len(layers) / 18))
        axes.set_xticks(range(0, len(layers), every), layers[::every])
        axes.set_yticks(range(len(table)), table.index)
        axes.set_xticks(np.arange(len(layers) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(table) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1.2)
        axes.tick_params(which="both", length=0, labelsize=8.5)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer", fontsize=9)
        other = rest[0] if len(rest) == 1 else "another expert"
        axes.set_title(f"{method}: share of steps won by {first}", fontsize=10, loc="left")
        if len(layers) <= 18:
            for (row, column), share in np.ndenumerate(table.to_numpy()):
                if np.isfinite(share):
                    shade = "white" if abs(share - 0.5) > 0.3 else INK
                    size = 8 if len(layers) <= 12 else 6.5
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=shade)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.015, aspect=12)
        bar.ax.set_yticklabels([f"0 %: {other}", "50 %", f"100 %: {first}"], fontsize=8)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def loss_figure(
    group: Mapping[str, Any], histories: Mapping[str, Sequence[pd.DataFrame]], palette: Mapping[str, str]
) -> Figure:
    """Training loss by step: faint as recorded, strong smoothed, one line for each seed."""
    figure, axes = _canvas(6.4, 3.3)
    for method, frames in histories.items():
        for i, frame in enumerate(frames):
            span = max(2.0, len(frame) / 12)
            axes.plot(frame["step"], frame["loss"], color=palette[method], lw=0.8, alpha=0.25)
            smooth = frame["loss"].ewm(span=span).mean()
            axes.plot(frame["step"], smooth, color=palette[method], lw=1.8, label=method if i == 0 else None)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    _entitle(axes, _title(group, "training loss"))
    _legend(axes)
    return figure


def share_figure(group: Mapping[str, Any], routings: Mapping[str, pd.DataFrame], palette: Mapping[str, str]) -> Figure:
    """The first expert's share of the module-steps so far, by step, one line for each routed method."""
    figure, axes = _canvas(6.4, 3.0)
    for method, routing in routings.items():
        share = share_so_far(routing)
        first = str(share.columns[0])
        axes.plot(share.index, share[first], color=palette[method], lw=2, label=f"{method}: {_expert(first)}")
    axes.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)))
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share of updates so far")
    _entitle(axes, _title(group, "routing over time"))
    _legend(axes)
    return figure


def cost_figure(group: Mapping[str, Any], palette: Mapping[str, str]) -> Figure:
    """Score with interval against training time."""
    figure, axes = _canvas(6.4, 3.3)
    for m in group["methods"]:
        colour, bars = palette[m["method"]], [[m["mean"] - m["low"]], [m["high"] - m["mean"]]]
        axes.errorbar(
            m["train_seconds"], m["mean"], yerr=bars, fmt="o", color=colour, ms=8, lw=1.6, capsize=4, label=m["method"]
        )
    longest = max(m["train_seconds"] for m in group["methods"])
    axes.set_xlim(0, 1.12 * longest)
    axes.set_ylim(0, _top(group))
    axes.set_xlabel("training time of one seed (seconds, shorter is better)")
    axes.set_ylabel(_words(group["primary_name"]))
    _entitle(axes, _title(group, "score against time"))
    _legend(axes)
    return figure


def draw(comparison: Mapping[str, Any], root: Path, folder: Path) -> list[dict[str, str]]:
    """Draws and writes every figure of a comparison.

    Args:
        comparison: As `comparison.build` gives it.
        root: Project folder, for histories and routing records.
        folder: Where the PNG files go.

    Returns:
        For each figure model, task, file (its name) and caption, in the order of reading.
    """
    found = []
    for group in comparison["groups"]:
        palette = colours([(m["method"], m["kind"]) for m in group["methods"]])
        cells = {
            m["method"]: [
                root / Cell(group["model"], group["task"], m["method"], seed["seed"]).results / "train"
                for seed in m["per_seed"]
            ]
            for m in group["methods"]
        }
        histories = {name: [pd.read_parquet(t / "history.parquet") for t in trains] for name, trains in cells.items()}
        routings = {
            m["method"]: _pooled([read_routing(train) for train in cells[m["method"]]])
            for m in group["methods"]
            if m["routing_share"]
        }
        routings = {name: frame for name, frame in routings.items() if len(frame)}  # no step counted: nothing to show
        percent = f"{100 * comparison['confidence']:g} %"
        drawn = {
            "score": (
                score_figure(group, palette),
                f"Score of each method with its {percent} bootstrap interval ({comparison['interval']}). The dashed "
                "line is the model before any fine-tuning. Hollow dots, if any, are single seeds.",
            ),
            "loss": (
                loss_figure(group, histories, palette),
                "Training loss: faint as recorded at each step, strong smoothed. Methods saw the same batches in the "
                "same order.",
            ),
        }
        if routings:
            drawn["routing"] = (
                routing_heat_map(routings, _title(group, "where the updates went")),
                "Each square is one linear layer; its number and colour say in how many percent of the steps its "
                "update went to the first expert.",
            )
            drawn["share"] = (
                share_figure(group, routings, palette),
                "Share of all updates so far that went to the first expert; steps with learning rate 0 do not count.",
            )
        if comparison["costs_comparable"]:
            drawn["cost"] = (cost_figure(group, palette), "Score against training time; up and to the left is better.")
        for name, (figure, caption) in drawn.items():
            file = f"{group['model']}-{group['task']}-{name}.png"
            save(figure, folder / file)
            found.append({"model": group["model"], "task": group["task"], "file": file, "caption": caption})
    return found


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the figure alone (no date, no version)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _pooled(routings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The routing rows of several seeds as one; categories stay, since the seeds of a method share their experts."""
    return pd.concat(routings, ignore_index=True)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes in the report's style; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _entitle(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK, loc="left", pad=10)


def _legend(axes: Axes) -> None:
    """The legend beside the axes, since lines and points may lie anywhere within."""
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _top(group: Mapping[str, Any]) -> float:
    """Upper end of a score axis that starts at 0: 1, or less where all scores are low."""
    highest = max([m["high"] for m in group["methods"]] + ([group["base"]["high"]] if group["base"] else []))
    return min(1.0, math.ceil(11.5 * highest + 0.01) / 10)


def _title(group: Mapping[str, Any], what: str) -> str:
    return f"{group['model']}, {group['task']}: {what}" + (" (generated data)" if group["generated"] else "")


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _expert(name: str) -> str:
    """An expert's name in words: "full" -> "the full weight", "lora_r128" -> "LoRA r = 128"."""
    return "the full weight" if name == "full" else name.replace("lora_r", "LoRA r = ")
