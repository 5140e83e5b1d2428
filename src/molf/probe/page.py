"""What the probe found, for a reader: a table of layers, one of module types, a heat map."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 132
FULL = "full"


def lines(found: Mapping[str, Any]) -> list[str]:
    """A probe's file as lines: what was looked at, a row a layer, a row a type, the forecast."""
    from molf.report.sheets import aligned

    rows, ranks = found["modules"], found["ranks"]
    return [
        f"{found['model']}/{found['task']}: gradients of {len(rows)} modules over {found['rows']} of "
        f"{found['training_rows']} rows in {found['seconds']:.0f} s",
        "",
        *aligned(_table("layer", rows, ranks, found["choices"]), WIDTH),
        "",
        *aligned(_table("type", rows, ranks, found["choices"]), WIDTH),
        "",
        *(
            f"{method}'s first {of['steps']} steps: " + ", ".join(f"{name} {x:.0%}" for name, x in of["share"].items())
            for method, of in found["choices"].items()
        ),
        found["forecast"]["sentence"],
    ]


def _table(
    key: str, modules: Sequence[Mapping[str, Any]], ranks: Sequence[int], choices: Mapping[str, Any]
) -> list[list[str]]:
    """A row for each layer or type, means over its modules."""
    from molf.report.style import short

    head = [key, "eff. rank", "stable"] + [f"top {rank}" for rank in ranks]
    head += ["step: eff. rank"] + [f"top {rank}" for rank in ranks] + ["noise", "best rank"]
    head += [f"{method}: {of['experts'][0]}" for method, of in choices.items()]
    table = [head]
    values = list(dict.fromkeys(module[key] for module in modules))
    named = dict(zip(values, short([str(value) for value in values]), strict=True))
    for value in values:
        own = [module for module in modules if module[key] == value]

        def mean(of: Callable[[Mapping[str, Any]], float], own: list[Mapping[str, Any]] = own) -> float:
            return float(np.mean([of(module) for module in own]))

        row = [named[value], f"{mean(lambda m: m['effective_rank']):.1f}", f"{mean(lambda m: m['stable_rank']):.1f}"]
        row += [f"{mean(lambda m, r=rank: m['energy'][str(r)]):.0%}" for rank in ranks]  # type: ignore[misc]
        row += [f"{mean(lambda m: m['step_effective_rank']):.1f}"]
        row += [f"{mean(lambda m, r=rank: m['step_energy'][str(r)]):.0%}" for rank in ranks]  # type: ignore[misc]
        best = sorted(module["best_rank"] or min(module["shape"]) for module in own)
        row += [f"{mean(lambda m: m['noise_share']):.0%}", str(best[len(best) // 2])]
        for of in choices.values():
            first = of["experts"][0]
            shares = [of["share_by_module"][m["module"]][first] for m in own if m["module"] in of["share_by_module"]]
            row.append(f"{np.mean(shares):.0%}" if shares else "-")
        table.append(row)
    return table


def heat_map(found: Mapping[str, Any]) -> "Figure":
    """Effective rank, energy, noise, the rank of least error and EPD's first choices, module types by layers."""
    from matplotlib.colors import Normalize

    from molf.report.style import INK, colour_bar, entitle_all, grid, heat, scale

    frame = pd.DataFrame(found["modules"])
    kinds = list(dict.fromkeys(frame["type"]))

    def by_place(values: Any) -> pd.DataFrame:
        table = frame.assign(value=values).pivot_table(index="type", columns="layer", values="value")
        return table.reindex(kinds)

    rank = str(max(found["ranks"])) if found["ranks"] else None
    ranks = {"effective rank of the gradient": frame["effective_rank"]}
    ranks["effective rank of AdamW's step"] = frame["step_effective_rank"]
    shape = frame["shape"].map(min)
    ranks["rank nearest to the true gradient"] = frame["best_rank"].fillna(shape).astype(float)
    shares = {"noise in a batch's gradient, %": 100 * frame["noise_share"]}
    if rank:
        shares[f"gradient's energy in its top {rank} directions, %"] = 100 * frame["energy"].map(lambda of: of[rank])
    for method, of in found["choices"].items():
        first = of["experts"][0]
        known = frame["module"].map(lambda name, of=of, first=first: of["share_by_module"].get(name, {}).get(first))
        shares[f"{method}'s first steps won by {first}, %"] = 100 * known.astype(float)
    panels_of = [*((words, values, scale([by_place(values)])) for words, values in ranks.items())]
    panels_of += [(words, values, Normalize(0, 100)) for words, values in shares.items()]
    rows = (len(panels_of) + 1) // 2
    figure, panels = grid(11, 0.6 + rows * (0.3 * len(kinds) + 0.95), rows, 2)
    entitle_all(figure, f"{found['model']}, {found['task']}: the gradient before any training")
    for axes, (words, values, norm) in zip(panels.flat, panels_of, strict=False):
        heat(axes, by_place(values), norm, words, "{:.3g}".format)
        axes.set_title(words, fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel("layer", fontsize=8.5)
        colour_bar(figure, axes, norm)
    for axes in list(panels.flat)[len(panels_of) :]:
        axes.set_visible(False)
    return figure
