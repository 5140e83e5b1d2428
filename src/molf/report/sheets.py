"""A comparison's numbers as tables of text, for the page, the terminal and Markdown; and numbers with their units."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molf.paths import BASE_METHOD
from molf.report.verdicts import references, signed

Item = tuple[str, float | None]  # what is shown, and by what it is sorted if not by its text
UNKNOWN: Item = ("-", None)


@dataclass(frozen=True)
class Sheet:
    """A table: its rows' texts, each with the number that it stands for.

    Attributes:
        places: (model, task) of each row where rows are of several.
    """

    title: str
    header: list[str]
    rows: list[list[Item]]
    note: str = ""
    places: list[tuple[str, str]] = field(default_factory=list)

    def texts(self) -> list[list[str]]:
        """Header and rows as text."""
        return [self.header, *([text for text, _ in row] for row in self.rows)]


def glance(comparison: Mapping[str, Any]) -> Sheet:
    """A row for each model and task: what to use there, and what came of each MoLF method."""
    groups = comparison["groups"]
    judged = list(dict.fromkeys(v["method"] for group in groups for v in group["verdicts"]))
    rows, places = [], []
    for group in groups:
        chosen = group["recommendation"]["method"]
        candidates = group["recommendation"].get("candidates") or []
        means = {m["method"]: m["mean"] for m in group["methods"]}
        best = max(means, key=lambda name: means[name])
        outcomes = {v["method"]: v["outcome"] for v in group["verdicts"]}
        places.append((group["model"], group["task"]))
        rows.append(
            [
                (group["task"], None),
                (group["model"], None),
                (chosen or " or ".join(candidates) or "undecided", None),
                _number(means[chosen]) if chosen else UNKNOWN,
                (f"{best} {means[best]:.3f}", means[best]),
                _number(group["base"]["mean"]),
                *((outcomes.get(method, "-"), None) for method in judged),
            ]
        )
    header = [
        "task",
        "model",
        "use",
        "its score",
        "highest score",
        "untrained",
        *(f"{name} keeps up" for name in judged),
    ]
    return Sheet("At a glance", header, rows, places=places)


def scores(group: Mapping[str, Any], over_base: bool = True) -> Sheet:
    """Score with interval, differences to fft and lora, and to the untrained model if asked for."""
    against = references(group)
    blank: list[Item] = [("", None)] * (len(against) + over_base)
    rows: list[list[Item]] = [[(BASE_METHOD, None), _interval(group["base"]), *blank]]
    differences = {(d["method"], d["versus"]): d for d in group["differences"]}
    for m in group["methods"]:
        found = [differences.get((m["method"], name)) for name in against]
        shown = [(signed(d), d["mean"]) if d else UNKNOWN for d in found]
        last = [(signed(m["over_base"]), m["over_base"]["mean"])] if over_base else []
        rows.append([(m["method"], None), _interval(m), *shown, *last])
    header = ["method", "score", *(f"vs {name}" for name in against), *(["vs untrained"] if over_base else [])]
    return Sheet("Scores", header, rows)


def costs(group: Mapping[str, Any]) -> Sheet:
    """Time, speed, memory, sizes, energy where it is known, and where updates and ranks went."""
    energy = any(m["energy_joules"] is not None for m in group["methods"])
    ranks = any(m.get("ranks") for m in group["methods"])
    header = ["method", "time", "tokens/s", "memory", "trained", "on disk", *(["energy"] if energy else [])]
    rows: list[list[Item]] = []
    for m in group["methods"]:
        joules = m["energy_joules"]
        shown = [(f"{joules:,.0f} J", joules) if joules is not None else UNKNOWN] if energy else []
        rows.append(
            [
                (m["method"], None),
                (seconds(m["train_seconds"]), m["train_seconds"]),
                (f"{m['tokens_per_second']:,.0f}", m["tokens_per_second"]),
                (size(m["peak_memory_bytes"]), m["peak_memory_bytes"]),
                (count(m["trained_parameters"]), m["trained_parameters"]),
                (size(m["weights_bytes"]), m["weights_bytes"]),
                *shown,
                (seconds(m["evaluation_seconds"]), m["evaluation_seconds"]),
                _routed(m),
                *([_ranks(m)] if ranks else []),
            ]
        )
    sources = dict.fromkeys(m["energy_source"] for m in group["methods"] if m["energy_source"])
    note = f"Energy: {', '.join(sources)}." if sources else ""
    return Sheet("Costs", [*header, "evaluation", "routed", *(["ranks"] if ranks else [])], rows, note)


def rates(group: Mapping[str, Any]) -> Sheet | None:
    """Each method's sweep: what every factor of its learning rates scored on validation rows, and what was taken."""
    sweeps = group.get("sweeps")  # a comparison of an earlier molf has none
    if not sweeps:
        return None
    factors = sorted({trial["factor"] for of in sweeps for trial in of["trials"]})
    rows: list[list[Item]] = []
    for of in sweeps:
        found = {trial["factor"]: trial for trial in of["trials"]}
        row: list[Item] = [(of["method"], None)]
        for factor in factors:
            trial = found.get(factor)
            row.append(UNKNOWN if trial is None else _tried(trial, factor == of["chosen"]))
        taken = found.get(of["chosen"], {}).get("rates", {})
        row.append((", ".join(f"{rate:g}" for rate in taken.values()) or "none", next(iter(taken.values()), None)))
        seconds_of = [trial["train_seconds"] for trial in of["trials"] if trial["train_seconds"] is not None]
        rows.append([*row, (seconds(sum(seconds_of)), sum(seconds_of))])
    count_of = next((trial["n"] for of in sweeps for trial in of["trials"] if trial["n"] is not None), None)
    note = (
        f"Scores on {count_of} validation rows, of one training each, under one seed for all; a star marks the chosen "
        "one. Of equal scores the lower loss on these rows decides, then the smaller rate. No test row was read."
    )
    reasons = [f"{of['method']}: nothing was chosen, for {of['why']}." for of in sweeps if of["chosen"] is None]
    tied = [of["method"] for of in sweeps if of["tied"]]
    said = [f"Decided among equal scores: {', '.join(tied)}."] if tied else []
    header = ["method", *(f"rate x {factor:g}" for factor in factors), "chosen rate", "time of the sweep"]
    return Sheet("Learning rates", header, rows, " ".join([note, *said, *reasons]))


def _tried(trial: Mapping[str, Any], chosen: bool) -> Item:
    if trial["score"] is None:
        return "diverged", -1.0
    return f"{trial['score']:.3f}" + " *" * chosen, trial["score"]


def damage(group: Mapping[str, Any]) -> Sheet | None:
    """Loss on general text and its change, and how the weights moved; None where neither was looked at."""
    methods = group["methods"]
    general, weights = (any(m[key] for m in methods) for key in ("general", "weights"))
    if not general and not weights:
        return None
    header = ["method"]
    rows: list[list[Item]] = [[(name, None)] for name in (BASE_METHOD, *(m["method"] for m in methods))]
    if general:
        header += ["general loss", "forgotten"]
        base = group["base"]["general"]
        rows[0] += [_number(base["loss"]) if base else UNKNOWN, ("", None)]
        for row, m in zip(rows[1:], methods, strict=True):
            found = m["general"]
            row += [_number(found["loss"]), (signed(found), found["mean"])] if found else [UNKNOWN, UNKNOWN]
    if weights:
        header += ["weights moved", "effective rank", "intruders"]
        rows[0] += [("", None)] * 3
        for row, m in zip(rows[1:], methods, strict=True):
            row += _moved(m["weights"]) if m["weights"] else [UNKNOWN] * 3
    return Sheet("Forgetting", header, rows)


def more(group: Mapping[str, Any]) -> list[Sheet]:
    """What few readers need: all pairs, exact tests, the paper's score, every metric."""
    found = [
        Sheet(
            "Difference of each pair of methods",
            ["method", "against", "difference", "seeds that would decide it", "examples that would decide it"],
            [
                [
                    (d["method"], None),
                    (d["versus"], None),
                    (signed(d), d["mean"]),
                    _needed(d["seeds_needed"]),
                    _needed(d["examples_needed"]),
                ]
                for d in group["differences"]
            ],
            "A dash: it is decided already, or more would not decide it.",
        ),
        Sheet(
            "Exact tests of each pair (McNemar)",
            ["method", "against", "seed", "only the first right", "only the second right", "p", "p corrected"],
            [
                [
                    (t["method"], None),
                    (t["versus"], None),
                    (str(t["seed"]), t["seed"]),
                    (str(t["only_method"]), t["only_method"]),
                    (str(t["only_versus"]), t["only_versus"]),
                    (_p(t["p"]), t["p"]),
                    (_p(t["p_holm"]), t["p_holm"]),
                ]
                for t in group["tests"]
            ],
            f"On {group['tests'][0]['metric']}, one test a seed; p corrected by Holm over all tests of this page."
            if group["tests"]
            else "",
        ),
    ]
    if group["paper"]:
        found.append(
            Sheet(
                f"The paper's own score: {group['paper']['metric']}",
                ["method", "score"],
                [[(m["method"], None), _interval(m)] for m in group["paper"]["methods"]],
            )
        )
    every = [{**group["base"], "method": BASE_METHOD}, *group["methods"]]
    kinds = list(dict.fromkeys(kind for m in every for kind in m["errors"]))
    if kinds:
        found.append(
            Sheet(
                "Answers that did not run, by reason",
                ["method", *(kind.replace("_", " ") for kind in kinds)],
                [[(m["method"], None), *(_counted(m["errors"].get(kind, 0)) for kind in kinds)] for m in every],
                "Counts of answers, the mean over seeds.",
            )
        )
    names = list(dict.fromkeys(name for m in group["methods"] for name in m["metrics"]))
    found.append(
        Sheet(
            f"All scores of {group['task']}",
            ["method", *names, "final loss", "steps", "training rows"],
            [
                [
                    (m["method"], None),
                    *(_number(m["metrics"].get(name)) for name in names),
                    _number(m["final_loss"]),
                    (str(m["steps"]), m["steps"]),
                    (str(m["train_examples"]), m["train_examples"]),
                ]
                for m in group["methods"]
            ],
        )
    )
    return [sheet for sheet in found if sheet.rows]


def aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows of text as lines whose columns stand under each other.

    Columns that would pass `width` stand in a block below, after the first column once more.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks, used = [[0]], widths[0]
    for i, needed in enumerate(widths[1:], 1):
        if used + 2 + needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + needed
    return ["  ".join(row[i].ljust(widths[i]) for i in block).rstrip() for block in blocks for row in rows]


def seconds(value: float) -> str:
    """A duration: "48 s", "3 min 05 s", "2 h 10 min"."""
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    """A number of bytes: "820 MB", "2.14 GB"."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def count(value: float) -> str:
    """A number of parameters: "850 k", "1.72 M", "1.54 B"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def _interval(row: Mapping[str, Any]) -> Item:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", row["mean"]


def _number(value: float | None) -> Item:
    return UNKNOWN if value is None else (f"{value:.3f}", value)


def _needed(value: int | None) -> Item:
    return UNKNOWN if value is None else (f"{value:,}", value)


def _counted(value: float) -> Item:
    return f"{value:,.4g}", value


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _moved(weights: Mapping[str, float]) -> Iterable[Item]:
    share = weights["intruders"] / weights["looked_at"] if weights["looked_at"] else 0.0
    return [
        (f"{100 * weights['relative_change']:.3g} %", weights["relative_change"]),
        (f"{weights['effective_rank']:.3g}", weights["effective_rank"]),
        (f"{weights['intruders']:.0f} of {weights['looked_at']:.0f}", share),
    ]


def _ranks(method: Mapping[str, Any]) -> Item:
    """From which rank of a module to which, where a method moves ranks."""
    found = method.get("ranks")
    return (f"{found['low']:g} to {found['high']:g}", found["high"]) if found else UNKNOWN


def _routed(method: Mapping[str, Any]) -> Item:
    """Share of the updates that went to the first expert, and whether routing stayed on one side or was none."""
    if not method["routing_share"]:
        return UNKNOWN
    expert, share = next(iter(method["routing_share"].items()))
    shown = f"{100 * share:.0f} % {expert}" + ("  ONE-SIDED" if method["one_sided"] else "")
    return shown + (f" ({method['control']['words']})" if method.get("control") else ""), share
