"""From a group's numbers to sentences: MoLF's verdicts, which method to use, and what the comparison cannot show."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from molf.paths import BASE_METHOD
from molf.report.controls import is_control
from molf.report.statistics import Interval, Outcome, non_inferiority

# MoLF must keep up with both of these kinds, each on its own: never with the better of two picked from the same data.
REFERENCE_KINDS = ("fft", "lora")
CANDIDATE_KINDS = ("molf", "molf-e")
ADAPTIVE_KINDS = ("adalora", "eva")  # what MoLF-Efficient claims to beat: earlier LoRA whose ranks move
NAMED = 3  # cells that lack which a sentence names; more are counted
SAME_MEMORY = 1.02  # peaks within so much of the least count as equal: they differ from run to run

Difference = Mapping[str, Any]


def references(group: Mapping[str, Any]) -> list[str]:
    """The methods of a group that MoLF is held against."""
    return [m["method"] for m in group["methods"] if m["kind"] in REFERENCE_KINDS]


def verdicts(group: Mapping[str, Any], margin: float, seeds: int) -> list[dict[str, Any]]:
    """Non-inferiority of each MoLF method, controls and ablations aside, to every fft and lora method.

    DESIGN.md section 3.

    Args:
        group: With methods, differences and examples, as in comparison.json, and with the cells that lack, if any: then
            a method may fail by what is there, but none holds that needs one of them.
        margin: What counts as not worse.
        seeds: How many each method has if none lack.
    """
    lacking = group.get("lacking", [])
    kinds = {m["method"]: m["kind"] for m in group["methods"]}
    kinds |= {of["method"]: of["method_kind"] for of in lacking}
    against = [name for name, kind in kinds.items() if kind in REFERENCE_KINDS]
    if {kinds[name] for name in against} != set(REFERENCE_KINDS):
        return []
    found = []
    beside = {of["method"] for of in (*group["methods"], *lacking) if of.get("control")}
    for method in (name for name, kind in kinds.items() if kind in CANDIDATE_KINDS and name not in beside):
        differences = [d for d in group["differences"] if d["method"] == method and d["versus"] in against]
        absent = [of["cell"] for of in lacking if of["method"] in (method, *against)]
        outcome = _outcome([d for d in differences if _whole(d, group)], margin)
        if absent and outcome is not Outcome.FAILS:
            outcome = Outcome.UNDECIDED
        shown = ", ".join(f"{signed(d)} against {d['versus']}{_on_seeds(d, group)}" for d in differences)
        words = {
            Outcome.HOLDS: f"keeps up: {'both' if len(differences) == 2 else 'all'} lower bounds lie above -{margin:g}",
            Outcome.FAILS: f"falls behind: an upper bound lies below -{margin:g}",
            Outcome.UNDECIDED: f"undecided: {_that_lack(absent)}"
            if absent
            else f"undecided: the bounds allow more and less than -{margin:g}",
        }[outcome]
        needs = None
        if outcome is Outcome.UNDECIDED:
            needs = _results_of(absent) if absent else _needs(differences, margin, seeds, group)
        found.append(
            {
                "method": method,
                "versus": against,
                "outcome": str(outcome),
                "sentence": f"{method} {words}" + (f" ({shown})" if shown else ""),
                "needs": needs,
            }
        )
    return found


def _whole(difference: Difference, group: Mapping[str, Any]) -> bool:
    """Whether no cell of either method lacks."""
    return not any(of["method"] in (difference["method"], difference["versus"]) for of in group.get("lacking", []))


def _on_seeds(difference: Difference, group: Mapping[str, Any]) -> str:
    if _whole(difference, group):
        return ""
    seeds = list(map(str, difference["seeds"]))
    return f" on seed{'s' * (len(seeds) > 1)} {listed(seeds)} alone"


def _that_lack(cells: Sequence[str]) -> str:
    """ "a lacks", "a and b lack"; of many only how many."""
    if len(cells) > NAMED:
        return f"{len(cells)} cells lack"
    return f"{listed(cells)} {'lacks' if len(cells) == 1 else 'lack'}"


def _results_of(cells: Sequence[str]) -> str:
    return f"the results of {listed(cells) if len(cells) <= NAMED else f'these {len(cells)} cells'}"


def recommendation(group: Mapping[str, Any], margin: float, seeds: int) -> dict[str, Any]:
    """Which method to use: of those that are non-inferior to every other, the one that takes least memory, then time.

    A control is never recommended; whether it beats the others counts all the same.

    Args:
        group: With methods, differences, examples, costs_comparable and why_not_comparable, as in comparison.json; none
            is recommended where cells lack, which might be better.
        margin, seeds: As in `verdicts`.

    Returns:
        `method` or None, `sentence`, `needs`: what would decide it, None where it is decided or nobody can say; and
        `candidates`: the methods that are non-inferior to every other.
    """
    methods = {m["method"]: m for m in group["methods"]}
    if group.get("lacking"):
        absent, leader = [of["cell"] for of in group["lacking"]], _leader(group)
        said = (
            f"On {group['task']}, it is undecided which method to use: {_that_lack(absent)}; "
            f"of those that are there {leader} {_leads(group)} ({methods[leader]['mean']:.3f})"
        )
        return _recommended(None, said, needs=_results_of(absent))
    if len(methods) == 1:
        return _recommended(None, f"On {group['task']}, {next(iter(methods))} alone was trained: nothing to choose")
    versus = {name: [d for d in group["differences"] if d["method"] == name] for name in methods}
    unbeaten = [name for name, found in versus.items() if _outcome(found, margin) is Outcome.HOLDS]
    good = [name for name in unbeaten if not is_control(methods[name])]
    if unbeaten and not good:
        said = (
            f"On {group['task']}, it is undecided which method to use: that no other beats it by more than {margin:g} "
            f"is sure of {listed(unbeaten)} alone, there as a control"
        )
        return _recommended(None, said)
    if not good:
        leader = _leader(group)
        rivals = [d["versus"] for d in versus[leader] if d["low"] <= -margin]
        said = (
            f"On {group['task']}, it is undecided which method to use: {leader} {_leads(group)} "
            f"({methods[leader]['mean']:.3f}), but {listed(rivals, 'or')} may beat it by more than {margin:g}"
        )
        return _recommended(None, said, needs=_needs(versus[leader], margin, seeds, group))
    if len(good) > 1 and not group["costs_comparable"]:
        said = (
            f"On {group['task']}, {listed(good, 'or')}: no other method beats one of these by more than {margin:g}; "
            f"which is the cheapest cannot be said, for {group['why_not_comparable']}"
        )
        return _recommended(None, said, good)
    least = min(methods[name]["peak_memory_bytes"] for name in good)
    light = [name for name in good if methods[name]["peak_memory_bytes"] <= SAME_MEMORY * least]
    chosen = min(light, key=lambda name: methods[name]["train_seconds"])
    reason = f"no other method beats it by more than {margin:g}"
    if len(good) > 1:
        cost = "takes the least memory" if len(light) == 1 else "is the fastest of those that take the least memory"
        reason += f", and of {listed(good)}, for which that holds, it {cost}"
    if methods[chosen]["over_base"]["low"] <= 0:
        reason += f"; but it is not surely better than the untrained model ({group['base']['mean']:.3f})"
    said = f"On {group['task']}, use {chosen} ({methods[chosen]['mean']:.3f}): {reason}"
    return _recommended(chosen, said, good)


def _recommended(
    method: str | None, sentence: str, candidates: Sequence[str] = (), needs: str | None = None
) -> dict[str, Any]:
    return {"method": method, "sentence": sentence, "needs": needs, "candidates": list(candidates)}


def _leader(group: Mapping[str, Any]) -> str:
    """The method with the highest score, the first of several."""
    return str(max(group["methods"], key=lambda m: m["mean"])["method"])


def _leads(group: Mapping[str, Any]) -> str:
    """What can be said of the leader's score beside the others', behind its name."""
    if len(group["methods"]) == 1:
        return "is alone"
    highest = max(m["mean"] for m in group["methods"])
    alike = sum(math.isclose(m["mean"], highest, abs_tol=1e-9) for m in group["methods"])
    return "scores highest" if alike == 1 else "scores as high as any"


def sentence(comparison: Mapping[str, Any]) -> str:
    """The verdict for a reader in a hurry: which method to use on each task, how sure that is, and what MoLF is."""
    groups = comparison["groups"]
    data = " (generated data)" if all(group["generated"] for group in groups) else ""
    percent = f"{100 * comparison['confidence']:g} %"
    return (
        f"{_uses(comparison)}{data}. {lacks(comparison)}{_on_molf(comparison)} "
        f"Margin {comparison['margin']:g}, {percent} intervals, {comparison['interval']}."
    )


def lacks(comparison: Mapping[str, Any]) -> str:
    """How many cells of the grid lack, and of which tasks nothing is there, with a space behind; empty if none do."""
    lacking = [of for of in comparison.get("lacking_cells", []) if of["method_kind"] != BASE_METHOD]
    if not lacking:
        return ""
    every = math.prod(len(comparison["grid"][axis]) for axis in ("models", "tasks", "methods", "seeds"))
    there = [(group["model"], group["task"]) for group in comparison["groups"]]
    without = [_place(comparison, of) for of in lacking if (of["model"], of["task"]) not in there]
    nothing = f", so nothing is said of {listed(list(dict.fromkeys(without)))}" if without else ""
    return f"{len(lacking)} of {every} cells {'lacks' if len(lacking) == 1 else 'lack'}{nothing}. "


def _uses(comparison: Mapping[str, Any]) -> str:
    """On which task which method is recommended, tasks of one method together."""
    chosen: dict[str, list[str]] = {}
    unranked, undecided = [], []
    for group in comparison["groups"]:
        place, found = _place(comparison, group), group["recommendation"]
        if found["method"]:
            chosen.setdefault(found["method"], []).append(place)
        elif found["candidates"]:
            unranked.append(f"on {place}, use {listed(found['candidates'], 'or')}, whose costs cannot be compared")
        elif len(group["methods"]) > 1 or group.get("lacking"):
            undecided.append(f"{place} ({_leader(group)} {_leads(group)})")
    parts = [f"on {listed(places)}, use {method}" for method, places in chosen.items()] + unranked
    if undecided:
        parts.append(f"it is undecided which method to use on {listed(undecided)}")
    text = "; ".join(parts) or "only one method was trained"
    return text[0].upper() + text[1:]


def _on_molf(comparison: Mapping[str, Any]) -> str:
    by_method: dict[str, dict[str, list[str]]] = {}
    for group in comparison["groups"]:
        for verdict in group["verdicts"]:
            places = by_method.setdefault(verdict["method"], {})
            places.setdefault(verdict["outcome"], []).append(_place(comparison, group))
    if not by_method:
        return "No verdict on MoLF: the grid must hold fft, lora and molf or molf-e."
    words = {
        Outcome.HOLDS: "keeps up with full fine-tuning and LoRA on",
        Outcome.FAILS: "falls behind full fine-tuning or LoRA on",
        Outcome.UNDECIDED: "is undecided on",
    }
    parts = [
        f"{method} " + ", ".join(f"{words[o]} {listed(places[o])}" for o in Outcome if o in places)
        for method, places in by_method.items()
    ]
    return f"MoLF: {'; '.join(parts)}."


def paper_sentence(metric: str, group: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> str:
    """What the paper's own score says: of MoLF, of fft against lora, of MoLF-Efficient against adaptive LoRA.

    Args:
        metric: Name of the score.
        group: With methods and differences on that score.
        judged: The verdicts on it.
    """
    kinds = {m["method"]: m["kind"] for m in group["methods"]}
    beside = {m["method"] for m in group["methods"] if m.get("control")}
    asked = [REFERENCE_KINDS, *(("molf-e", kind) for kind in ADAPTIVE_KINDS)]
    pairs = [
        d
        for d in group["differences"]
        if (kinds[d["method"]], kinds[d["versus"]]) in asked and d["method"] not in beside
    ]
    parts = [verdict["sentence"] for verdict in judged] + [_which(d, group) for d in pairs]
    return f"On the paper's own score, {metric}: {'; '.join(parts) or 'no two methods to compare'}"


def _which(d: Difference, group: Mapping[str, Any]) -> str:
    """Which of two methods is better, if any surely is and no cell of them lacks."""
    pair = f"{d['method']} and {d['versus']}"
    if not _whole(d, group):
        return f"of {pair} cells lack ({signed(d)}{_on_seeds(d, group)})"
    better = d["method"] if d["low"] > 0 else d["versus"] if d["high"] < 0 else None
    return f"{f'of {pair} {better} is better' if better else f'{pair} cannot be told apart'} ({signed(d)})"


def limits(comparison: Mapping[str, Any]) -> list[str]:
    """What the comparison is too small to show, in sentences."""
    margin, groups = comparison["margin"], comparison["groups"]
    found = [_of_seeds(len(comparison["grid"]["seeds"]))]
    if said := lacks(comparison):
        found.append(
            f"{said}What needs them is undecided: verdicts that a method keeps up, and which one to use where they "
            "belong. Cells may well fail for what would be their score: those that are there are no fair sample."
        )
    for group in groups:
        widths = [d["high"] - d["low"] for d in group["differences"]]
        if not widths:
            continue
        half, where = float(np.median(widths)) / 2, f"{group['model']}, {group['task']}"
        text = f"{where}: {group['examples']} examples tell differences above about {half:.3f}"
        open_ones = [d for d in group["differences"] if not _decided(d, margin)]
        if open_ones:
            text += f"; {len(open_ones)} of {len(widths)} differences are undecided at a margin of {margin:g}"
            needs = [d["examples_needed"] for d in open_ones]
            if None not in needs:
                text += f", which would need some {_rounded(max(needs)):,} examples in all"
        found.append(text + ".")
        useless = [m["method"] for m in group["methods"] if m["over_base"]["low"] <= 0]
        if useless:
            verb = "is" if len(useless) == 1 else "are"
            found.append(f"{where}: {listed(useless)} {verb} not surely better than the untrained model.")
    if any(not _decided(d, margin) for group in groups for d in group["differences"]):
        found.append(
            "Numbers of seeds or examples that would decide something do so in about 4 of 5 cases, if differences and "
            "variances are what they were estimated to be."
        )
    generated = sorted({group["task"] for group in groups if group["generated"]})
    if generated:
        found.append(f"Data of {listed(generated)} is generated: a result on it says nothing about real data.")
    return [*found, *_of_rates(groups), *_of_costs(groups)]


def _of_rates(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether a method may have been held back by its learning rate."""
    if not any(group.get("sweeps") for group in groups):  # a comparison of an earlier molf has none
        return [
            "Every method ran at the learning rates of its block (grid.tune is empty, so no sweep chose them): one "
            "that falls behind may do better at others."
        ]
    ends = [
        f"{of['method']} ({group['model']}, {group['task']})"
        for group in groups
        for of in group["sweeps"]
        if of["edge"] is not None
    ]
    if not ends:
        return []
    verb = "is" if len(ends) == 1 else "are"
    return [f"The best learning rate of {listed(ends)} {verb} at an end of the sweep; a wider one may find a better."]


def _of_seeds(seeds: int) -> str:
    if seeds == 1:
        return (
            "One seed: the intervals hold for these very weights, on other examples of the same kind. Another seed may "
            "move a score by more than they show."
        )
    if seeds == 2:
        return (
            "2 seeds: how much seeds differ is told by one difference; the intervals cover the truth less often than "
            "they say. Take them as exploratory."
        )
    return (
        f"{seeds} seeds: the intervals hold for other seeds and other examples of the same kind; not for other "
        "training data, nor for other settings of a method."
    )


def _of_costs(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    unlike: dict[str, list[str]] = {}
    for group in groups:
        if group["why_not_comparable"]:
            unlike.setdefault(group["why_not_comparable"], []).append(f"{group['model']}, {group['task']}")
    found = [
        f"{'; '.join(places)}: times and memory are not comparable and are not ranked: {why}."
        for why, places in unlike.items()
    ]
    if len(unlike) < len(groups):
        found.append("Times and memory hold for this machine.")
    if any(m["contended"] is None for group in groups for m in group["methods"]):
        found.append("Whether other programs kept the machine busy meanwhile is not known of every cell.")
    return found


def _outcome(differences: Iterable[Difference], margin: float) -> Outcome:
    return non_inferiority([Interval(d["mean"], d["low"], d["high"]) for d in differences], margin)


def _decided(difference: Difference, margin: float) -> bool:
    return bool(difference["low"] > -margin or difference["high"] < -margin)


def _needs(differences: Iterable[Difference], margin: float, seeds: int, group: Mapping[str, Any]) -> str:
    """What would decide all of the differences that are undecided, to be read behind "to decide it:"."""
    undecided = [d for d in differences if not _decided(d, margin)]
    more_seeds, more_examples = ([d[key] for d in undecided] for key in ("seeds_needed", "examples_needed"))
    ways = []
    if None not in more_seeds:
        ways.append(f"{max(more_seeds)} seeds (now {seeds})")
    if None not in more_examples:
        ways.append(f"some {_rounded(max(more_examples)):,} examples (now {group['examples']:,})")
    if not ways:
        return "no number of examples alone" if seeds == 1 else "no number of seeds alone, nor of examples alone"
    return " or ".join(ways) + (", for these very weights" if seeds == 1 else "")


def _rounded(count: int) -> int:
    """Up to two significant digits: estimates of this kind have no more."""
    step = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return -(-count // step) * step


def _place(comparison: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    several = len(comparison["grid"]["models"]) > 1
    return f"{group['task']} with {group['model']}" if several else str(group["task"])


def signed(difference: Difference) -> str:
    """ "+0.012 [-0.004, +0.028]"."""
    return f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def listed(names: Sequence[str], word: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
