"""Where methods that move ranks put them: module types by layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from molf.modules import place
from molf.paths import read_json
from molf.report.style import INK, colour_bar, entitle_all, grid, heat


def read_ranks(trains: Sequence[Path]) -> pd.DataFrame | None:
    """Rank of each module at the end, the mean over a method's seeds, as module types x layers.

    Args:
        trains: results/CELL/train of each seed.

    Returns:
        None where the method moves no ranks, or an earlier molf trained it. A module that the record leaves out has
        none: 0.
    """
    found = [(read_json(train / "summary.json").get("adaptation") or {}).get("ranks") or {} for train in trains]
    if not found or not all(found):
        return None
    rows = [(*place(module), i, rank) for i, ranks in enumerate(found) for module, rank in ranks.items()]
    frame = pd.DataFrame(rows, columns=["type", "layer", "seed", "rank"])
    table = frame.pivot_table(index="type", columns="layer", values="rank", aggfunc="sum", fill_value=0) / len(found)
    return table.reindex(list(dict.fromkeys(frame["type"])))


def ranks_figure(title: str, tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Heat maps below each other in one colour scale.

    Args:
        title: What it is of: model and task.
        tables: By method, as `read_ranks` gives them; what stands in one of them alone has rank 0 in the others.
    """
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind in table.index))
    layers = sorted({layer for table in tables.values() for layer in table.columns})
    tables = {name: table.reindex(index=kinds, columns=layers).fillna(0) for name, table in tables.items()}
    norm = Normalize(0, max(float(table.to_numpy().max()) for table in tables.values()))
    figure, panels = grid(6.4, 0.8 + (0.28 * len(kinds) + 0.85) * len(tables), len(tables), 1)
    entitle_all(figure, title)
    for axes, (method, table) in zip(panels[:, 0], tables.items(), strict=True):
        heat(axes, table, norm, f"{method}, rank", "{:.3g}".format)
        mean = float(table.to_numpy().mean())
        axes.set_title(f"{method}: rank of each module, {mean:.3g} on average", fontsize=9.5, loc="left", color=INK)
    panels[-1, 0].set_xlabel("layer", fontsize=8.5)
    colour_bar(figure, panels, norm)
    return figure
