"""How often the forecasts were right: each beside the comparison that was measured. Pure, but for `find`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molf.errors import UserError
from molf.paths import REPORTS, read_json
from molf.probe.rule import pick

PROBE = "probe"  # the folder of forecasts, beside a comparison.json
RESULTS = Path("docs/results")
CONFIDENCE = 0.95


def exact_interval(hits: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of a share by the binomial distribution itself (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    bounds = binomtest(hits, of).proportion_ci(confidence, method="exact")
    return float(bounds.low), float(bounds.high)


def judge(found: Mapping[str, Any], group: Mapping[str, Any], margin: float) -> dict[str, Any] | None:
    """A forecast beside what was measured; None where the two share fewer than two methods.

    Only methods that were both forecast and measured count; `least` is the one of least error, margin or not. The good
    ones are those whose mean lies within the margin of the best mean: a forecast of any of them is a hit. Whether the
    comparison can tell the methods apart at all is said beside it: some method's interval of the difference to the best
    lies below -margin.

    Args:
        found: A probe's file.
        group: Of comparison.json, the same model and task.
        margin: The comparison's.
    """
    means = {m["method"]: float(m["mean"]) for m in group["methods"]}
    known = [of for of in found["forecast"]["methods"] if of["method"] in means]
    if len(known) < 2:
        return None
    order, forecast = [of["method"] for of in known], pick(known, found["forecast"]["margin"])
    best = max(order, key=lambda method: means[method])
    good = [method for method in order if means[method] >= means[best] - margin - 1e-12]
    worse = [
        d["method"]
        for d in group["differences"]
        if d["versus"] == best and d["method"] in order and d["high"] is not None and d["high"] < -margin
    ]
    return {
        "model": group["model"],
        "task": group["task"],
        "methods": order,
        "forecast": forecast,
        "best": best,
        "good": good,
        "hit": forecast in good,
        "least": order[0],
        "least_hit": order[0] in good,
        "tells_apart": bool(worse),
        "means": {method: means[method] for method in order},
        "agreement": [found["forecast"]["agreement"], found["forecast"]["halvings"]],
        "other_data": _differs(found, group),
    }


def _differs(found: Mapping[str, Any], group: Mapping[str, Any]) -> bool | None:
    """Whether the probe saw other data than the comparison; None where one of the two does not say."""
    theirs = (group.get("data") or {}).get("data_hash") or group.get("data_hash")
    return None if theirs is None or not found.get("data_hash") else theirs != found["data_hash"]


def tally(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hits of how many, beside guesses that need no probe.

    Returns:
        hits, of, low, high (exact interval of the share); least_hits (had the least error been named, without the
        rule's margin); always (the method that, named everywhere, hits most often, chosen in hindsight, and its hits);
        chance (expected hits of a method drawn at random); tells_apart (how many comparisons can tell the methods
        apart) and hits_there.
    """
    constant: Counter[str] = Counter()
    for each in judged:
        constant.update({method: int(method in each["good"]) for method in each["methods"]})
    always = max(constant, key=lambda method: constant[method])
    hits = sum(each["hit"] for each in judged)
    low, high = exact_interval(hits, len(judged))
    return {
        "hits": hits,
        "of": len(judged),
        "low": low,
        "high": high,
        "least_hits": sum(each["least_hit"] for each in judged),
        "always": {"method": always, "hits": constant[always], "by_method": dict(constant)},
        "chance": sum(len(each["good"]) / len(each["methods"]) for each in judged),
        "tells_apart": sum(each["tells_apart"] for each in judged),
        "hits_there": sum(each["hit"] and each["tells_apart"] for each in judged),
    }


def find(folders: Iterable[Path] = ()) -> list[dict[str, Any]]:
    """Every forecast that lies beside a comparison of its model and task, judged.

    Args:
        folders: With comparison.json and a folder `probe` each; none: reports and all of docs/results.

    Raises:
        UserError: There is no such pair; with what to type.
    """
    asked = list(folders)
    looked = asked or [REPORTS, *sorted(path for path in RESULTS.glob("*") if path.is_dir())]
    judged = []
    for folder in looked:
        if not (folder / "comparison.json").is_file():
            continue
        comparison = read_json(folder / "comparison.json")
        for group in comparison["groups"]:
            file = folder / PROBE / group["model"] / f"{group['task']}.json"
            each = judge(read_json(file), group, comparison["margin"]) if file.is_file() else None
            if each is not None:
                judged.append({"folder": str(folder), **each})
    if not judged:
        named = ", ".join(map(str, looked))
        raise UserError(
            f"no forecast lies beside a comparison in {named} (FOLDER/comparison.json with "
            f"FOLDER/{PROBE}/MODEL/TASK.json); `molf probe` makes the forecasts of the grid, `make run` the comparison"
        )
    return judged


def table(judged: Sequence[Mapping[str, Any]]) -> str:
    """The judged forecasts and what they come to."""
    from molf.report.sheets import aligned

    rows = [("comparison", "forecast", "measured best", "as good", "hit", "")]
    for each in judged:
        others = [method for method in each["good"] if method != each["best"]]
        said = [] if each["tells_apart"] else ["no method is shown to be worse"]
        said += ["other data"] * bool(each["other_data"])
        rows.append(
            (
                f"{each['folder']}: {each['model']}/{each['task']}",
                each["forecast"],
                f"{each['best']} {each['means'][each['best']]:.3f}",
                ", ".join(others) or "-",
                "yes" if each["hit"] else "no",
                "; ".join(said),
            )
        )
    sums = tally(judged)
    always = sums["always"]
    lines = [
        *aligned(rows, 160),
        "",
        f"{sums['hits']} of {sums['of']} forecasts hit: they name a method within the margin of the best mean. Exact "
        f"{CONFIDENCE:.0%} interval {sums['low']:.2f} to {sums['high']:.2f}, were the comparisons independent",
        f"without the margin the least error alone would have hit {sums['least_hits']}",
        f"without a probe: always {always['method']}, chosen in hindsight, hits {always['hits']}; a method drawn at "
        f"random {sums['chance']:.1f}",
        f"{sums['tells_apart']} of the comparisons show any method to be worse than the best; of these "
        f"{sums['hits_there']} hit",
    ]
    return "\n".join(lines)
