"""How the report's figures look and are written: colours, markers, heat maps, notes on hover, PNG and SVG files.

Colours are Okabe and Ito's and matplotlib's cividis, which colour-blind readers tell apart; markers and dashes help.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
# The four kinds keep their look in every report; further methods take the rest in turn.
KIND_COLOURS = {"fft": BLUE, "lora": ORANGE, "molf": GREEN, "molf-e": PURPLE}
SPARE_COLOURS = ("#56B4E9", "#D55E00", "#4B3B8F", "#8C6D1F", "#1B5E5A", "#882255", "#999933", "#661100")
KIND_MARKERS = {"fft": "o", "lora": "s", "molf": "D", "molf-e": "^"}
SPARE_MARKERS = ("v", "P", "X", "*", "<", ">", "h", "8", "p")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (7, 2, 1.5, 2)),
    (0, (1.5, 1.5)),
    (0, (10, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MAP = "cividis"  # lightness grows evenly from dark blue (0) to yellow (1)
INK, GREY, GRID = "#222222", "#6B6B6B", "#DDDDDD"
DPI = 150
NUMBERED = 12  # layers up to which a heat map has room for numbers
NAME = 26  # characters of a name beside a heat map
SPREAD = 30  # a heat map whose values differ by more than so many times is coloured by their logarithm
BETWEEN = "\u00a6"  # between the notes of one line's markers
MANY = 6  # methods above which a figure shows them together by means, or nobody would scroll to its end
LINE, ABOVE = 0.185, 0.75  # inches: of a legend's line, and of what stands above and below a legend


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure of a report."""

    colour: str
    marker: str
    dash: Any


def settings() -> AbstractContextManager[None]:
    """Matplotlib's settings under which figures are made and written."""
    return matplotlib.rc_context(
        {
            "svg.hashsalt": "molf",  # ids of equal figures are equal
            "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
            "text.parse_math": False,  # a "$" in a name is a dollar
        }
    )


def styles(methods: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """A look for each method; no two share a colour or a marker before all are used up, and then not both.

    Args:
        methods: (method, kind) in the report's order; the first of a kind takes the kind's look.
    """
    found: dict[str, Style] = {}
    firsts = {kind: method for method, kind in reversed(methods)}
    for method, kind in methods:
        own = kind if firsts[kind] == method else None
        colour = _free(own, firsts, KIND_COLOURS, SPARE_COLOURS, [style.colour for style in found.values()])
        marker = _free(own, firsts, KIND_MARKERS, SPARE_MARKERS, [style.marker for style in found.values()])
        found.setdefault(method, Style(colour, marker, DASHES[len(found) % len(DASHES)]))
    return found


def _free(
    own: str | None,
    kinds: Iterable[str],
    looks: Mapping[str, str],
    spare: Sequence[str],
    taken: Sequence[str],
) -> str:
    """The look of a method's `own` kind, else the one fewest methods have and no other of the `kinds` takes."""
    if own is not None and own in looks:
        return looks[own]
    unclaimed = [look for kind, look in looks.items() if kind not in kinds]
    return min([*spare, *unclaimed], key=taken.count)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes in the report's style; sizes in inches."""
    figure, panels = grid(width, height, 1, 1)
    return figure, panels[0, 0]


def grid(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its array of axes (rows x columns); `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def entitle(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK, loc="left", pad=10)


def entitle_all(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left")


def legend(axes: Axes, **options: Any) -> None:
    """The legend beside the axes, since lines and points may lie anywhere within; the figure grows to hold it."""
    made = axes.legend(
        frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.2, **options
    )
    lines = sum(1 + text.get_text().count("\n") for text in made.get_texts())
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(max(figure.get_figheight(), ABOVE + LINE * lines))


def note(artist: Artist, text: str) -> None:
    """What the SVG says of a part of the figure under the pointer; `save` makes a <title> of it."""
    artist.set_gid(f"note:{text}")


def notes(artist: Artist, texts: Sequence[str]) -> None:
    """As `note`, one for each marker of a line or a scatter plot, in their order; all of them must be finite."""
    artist.set_gid(f"notes:{BETWEEN.join(text.replace(BETWEEN, '|') for text in texts)}")


def thinned(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` rows, evenly spaced, the first and the last among them."""
    if len(frame) <= most:
        return frame
    return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, most).round().astype(int))]


def scale(tables: Sequence[pd.DataFrame]) -> Normalize:
    """One colour scale for several heat maps of a size from 0 on; logarithmic where values lie orders apart."""
    values = np.concatenate([table.to_numpy(float).ravel() for table in tables])
    values = values[np.isfinite(values)]
    highest = float(values.max()) if len(values) and values.max() > 0 else 1.0
    above = values[values > 0]
    if len(above) and highest > SPREAD * above.min():
        return LogNorm(max(float(above.min()), highest / 1e4), highest, clip=True)
    return Normalize(0, highest)


def by_method(places: Mapping[str, pd.DataFrame], axis: Literal[0, 1] = 0) -> pd.DataFrame:
    """Of each method's table of module types x layers the means of its layers (0) or types (1), as methods x these."""
    return pd.DataFrame({method: table.mean(axis=axis) for method, table in places.items()}).T


def heat(
    axes: Axes,
    table: pd.DataFrame,
    norm: Normalize,
    said: str,
    show: Any = "{:.2g}".format,
    across: str = "layer ",
) -> None:
    """Draws a heat map of module types (rows) by layers (columns), each square with its number and its note.

    Args:
        axes: Where.
        table: Index types, columns layers; NaN where there is no such module.
        norm: The colour scale.
        said: What a note says before the number.
        show: A value as text.
        across: What a note says before the column's name.
    """
    colours, values = matplotlib.colormaps[MAP], table.to_numpy(float)
    layers, types = list(table.columns), [str(kind) for kind in table.index]
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        shade = float(np.clip(norm(value), 0, 1))
        square = Rectangle((column - 0.5, row - 0.5), 1, 1, fc=colours(shade), ec="white", lw=1.0, clip_on=False)
        note(square, f"{across}{layers[column]}, {types[row]}: {said} {show(value)}")
        square.set_in_layout(False)  # it lies within the axes; measuring each takes most of the time
        axes.add_patch(square)
        if len(layers) <= NUMBERED:
            ink = "white" if shade < 0.55 else INK
            size = 8 if len(layers) <= NUMBERED / 2 else 6.5
            text = show(value).rstrip(" %")
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink, in_layout=False)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(types) - 0.5, -0.5)
    every = max(1, round(len(layers) / 12))
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_yticks(range(len(types)), short(types))
    axes.grid(visible=False)
    axes.tick_params(which="both", length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)


def short(types: Sequence[str]) -> list[str]:
    """Module types by their last part where that tells them apart: "mlp.up_proj" -> "up_proj"."""
    last = [kind.rpartition(".")[2] for kind in types]
    shown = last if len(set(last)) == len(last) else types
    return [name if len(name) <= NAME else f"{name[: NAME - 1]}\u2026" for name in shown]


def colour_bar(figure: Figure, panels: Any, norm: Normalize, ticks: Mapping[float, str] | None = None) -> None:
    """The key to the colours of some panels."""
    bar = figure.colorbar(ScalarMappable(norm, MAP), ax=panels, pad=0.015, aspect=18, fraction=0.06)
    if ticks:
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
    else:  # matplotlib writes powers of ten as formulas
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, and an SVG beside it, whose bytes depend on the figure alone (no date, no version).

    Args:
        figure: With its notes.
        path: Of the PNG. The SVG's ids begin with its stem, so that a page can hold several.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with settings():
        layout = figure.get_layout_engine()
        if layout is not None:  # once for both files; `savefig` would draw five times in all
            layout.execute(figure)
            figure.set_layout_engine("none")
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
        written = StringIO()
        plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(written, metadata=plain)
    path.with_suffix(".svg").write_text(_plain(written.getvalue(), path.stem), encoding="utf-8")


def _plain(svg: str, prefix: str) -> str:
    """Matplotlib's SVG with notes as <title>, ids only where something points at them, and the reader's own font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # An attribute's text is escaped already, for more than an element's needs.
    svg = re.sub(r'<g id="note:([^"]*)">', r'<g class="note"><title>\1</title>', svg)
    for texts in re.findall(r'<g id="notes:([^"]*)">', svg):
        before, after = svg.split(f'<g id="notes:{texts}">', 1)
        each = iter(texts.split(BETWEEN))  # each marker is one <use>; those of other artists come later
        marked = re.sub(
            r"<use ([^>]*)/>",
            lambda use, each=each: f'<use class="note" {use[1]}><title>{next(each)}</title></use>',  # type: ignore[misc]
            after,
            count=texts.count(BETWEEN) + 1,
        )
        svg = f"{before}<g>{marked}"
    pointed = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in pointed else "", svg)
    svg = re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{prefix}-\g<2>", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'DejaVu Sans', sans-serif", svg)
    # A hundredth of a point is finer than any screen; what turns nothing and what is empty is no use.
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<g/>\n", "")
