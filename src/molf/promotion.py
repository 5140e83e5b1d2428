"""The gate: which models may become their task's champion, and what becomes of the best. Pure; champions.py acts on it.

Where a figure has an interval, its less favourable bound must meet the limit: evidence, not luck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from molf.blocks import Gate
from molf.paths import Cell
from molf.report import statistics
from molf.report.controls import is_control
from molf.report.sheets import seconds, size
from molf.report.statistics import Interval, Outcome
from molf.report.verdicts import listed, signed

GB = 10**9


class Action(StrEnum):
    """What becomes of a task's champion."""

    PROMOTED = "promoted"
    UNCHANGED = "unchanged"  # the best model is the champion already
    KEPT = "kept"  # the champion is better, or not beaten by enough
    NONE = "nothing passed"
    FAILED = "failed"


@dataclass(frozen=True)
class Candidate:
    """A method of a model and task: the model that would stand for it, its figures and what the gate says.

    Attributes:
        cell: Of the seed whose score lies nearest the method's mean, the lowest of such: never the best of several.
        fingerprint: Of that cell's training.
        score: That cell's own.
        seeds: How many the method has.
        interval: Of the method's score.
        verdict: Non-inferiority to every other method of its model; None where one of them lacks.
        figures: The method's entry in comparison.json.
        failed: Why it does not pass, in words; nothing where it does.
    """

    cell: Cell
    fingerprint: str
    score: float
    seeds: int
    interval: Interval
    verdict: Outcome | None
    figures: Mapping[str, Any]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Rival:
    """What is known of the champion that a candidate is held against.

    Attributes:
        name: As it is shown.
        fingerprint: Of its training.
        score: Its own, as measured; anew if the comparison holds it.
        measured: What its score is of: kind of task, name of the score, hashes of the data and of the test rows.
    """

    name: str
    fingerprint: str
    score: float
    measured: "Measured"


@dataclass(frozen=True)
class Measured:
    """What a score is of: two scores are comparable where their names and their test rows are the same."""

    task_kind: str
    primary_name: str
    data_hash: str
    test_rows: str | None  # sha256 of their file; an earlier molf noted none

    def unlike(self, other: "Measured") -> str:
        """Why a score of this cannot be held against one of the other; empty where it can."""
        if (self.task_kind, self.primary_name) != (other.task_kind, other.primary_name):
            return f"its score is {other.task_kind}'s {other.primary_name}"
        same_rows = self.test_rows is not None and self.test_rows == other.test_rows
        if self.data_hash != other.data_hash and not same_rows:
            return f"its score is on other test rows (data {other.data_hash}, now {self.data_hash})"
        return ""


@dataclass(frozen=True)
class Decision:
    """What becomes of a task's champion, and why."""

    action: Action
    sentence: str


def candidates(comparison: Mapping[str, Any], task: str, gate: Gate) -> list[Candidate]:
    """Every model and method of a task that was compared, the highest mean score first.

    Args:
        comparison: What comparison.json holds.
        task: Of its grid.
        gate: The task's.
    """
    found = [
        _candidate(comparison, group, method, gate)
        for group in comparison["groups"]
        if group["task"] == task
        for method in group["methods"]
    ]
    return sorted(found, key=lambda one: (-one.interval.mean, one.cell))


def best(found: Sequence[Candidate]) -> Candidate | None:
    """Of the candidates that pass the one with the highest mean score; None where none passes."""
    return next((one for one in found if not one.failed), None)


def decide(one: Candidate | None, now: Measured | None, champion: Rival | None, gate: Gate) -> Decision:
    """What becomes of the champion.

    Args:
        one: The best that passes.
        now: What its score is of; None without a best.
        champion: The present one, if there is any.
        gate: The task's.
    """
    if one is None or now is None:
        stays = f"; the champion stays {champion.name}" if champion else ""
        return Decision(Action.NONE, f"nothing passes the gate{stays}")
    name = one.cell.name
    if champion is None:
        return Decision(Action.PROMOTED, f"{name} passes the gate and is the first champion")
    if one.fingerprint == champion.fingerprint:
        return Decision(Action.UNCHANGED, f"{name} is the champion already")
    if why := now.unlike(champion.measured):
        return Decision(
            Action.PROMOTED,
            f"{name} passes the gate; it cannot be held against the champion, {champion.name}: {why}. "
            "The gate alone decides then",
        )
    gain, least = one.score - champion.score, gate.gain.champion
    shown = f"{name} scores {one.score:.4f}, the champion, {champion.name}, {champion.score:.4f}"
    if gain <= 0:
        return Decision(Action.KEPT, f"{shown}: no better, so that the champion stays")
    if gain < least:
        return Decision(Action.KEPT, f"{shown}: better by less than gain.champion, {least:g}, so that it stays")
    return Decision(Action.PROMOTED, f"{shown}")


# --- one candidate ---------------------------------------------------------------------------------------------------


def _candidate(
    comparison: Mapping[str, Any], group: Mapping[str, Any], method: Mapping[str, Any], gate: Gate
) -> Candidate:
    seeds, grid = method["per_seed"], comparison["grid"]
    mean = sum(seed["score"] for seed in seeds) / len(seeds)
    chosen = min(seeds, key=lambda seed: (round(abs(seed["score"] - mean), 9), seed["seed"]))
    interval = Interval(method["mean"], method["low"], method["high"])
    versus = {d["versus"]: d for d in group["differences"] if d["method"] == method["method"]}
    short = {of["method"] for of in group.get("lacking", [])}  # differences to these are not over all seeds
    others = [name for name in grid["methods"] if name != method["method"]]
    lacking = [name for name in others if name not in versus or name in short]
    verdict = None
    if not lacking:
        intervals = [Interval(d["mean"], d["low"], d["high"]) for d in versus.values()]
        verdict = statistics.non_inferiority(intervals, comparison["margin"])
    missing = [str(seed) for seed in grid["seeds"] if seed not in [one["seed"] for one in seeds]]
    failed = [f"the comparison lacks seed {listed(missing)} of it"] if missing else []
    failed += [f"it is a control: {method['control']['words']}"] if is_control(method) else []
    failed += _verdict(gate, verdict, lacking, list(versus.values()), comparison["margin"])
    failed += _score(gate, interval, method["over_base"])
    failed += _cost(gate, method)
    failed += _forgetting(gate, method["general"])
    cell = Cell(group["model"], group["task"], method["method"], chosen["seed"])
    return Candidate(
        cell, chosen["train_fingerprint"], chosen["score"], len(seeds), interval, verdict, method, tuple(failed)
    )


def _verdict(
    gate: Gate, verdict: Outcome | None, lacking: Sequence[str], differences: Sequence[Mapping[str, Any]], margin: float
) -> list[str]:
    if gate.verdict == "any":
        return []
    if verdict is None:
        return [f"verdict: the comparison lacks cells of {listed(lacking)}, which it must be held against"]
    if verdict is Outcome.FAILS:
        worse = [f"{signed(d)} against {d['versus']}" for d in differences if d["high"] < -margin]
        return [f"verdict: worse by more than {margin:g} ({', '.join(worse)})"]
    if verdict is Outcome.UNDECIDED and gate.verdict == "holds":
        unsure = [f"{signed(d)} against {d['versus']}" for d in differences if d["low"] <= -margin]
        return [f"verdict: undecided at {margin:g} ({', '.join(unsure)}), and it must hold"]
    return []


def _score(gate: Gate, interval: Interval, over_base: Mapping[str, Any]) -> list[str]:
    found = []
    if gate.score is not None and not interval.low >= gate.score:  # a NaN fails too
        found.append(f"score: lower bound {interval.low:.3f}, at least {gate.score:g} is asked")
    least = gate.gain.untrained
    if least is not None and not over_base["low"] >= least:
        found.append(f"gain over the untrained model: lower bound {over_base['low']:+.3f}, at least {least:g} is asked")
    return found


def _cost(gate: Gate, method: Mapping[str, Any]) -> list[str]:
    limits = (
        ("peak memory", "peak_memory_bytes", gate.cost.peak_memory_gb, GB, size),
        ("training", "train_seconds", gate.cost.train_seconds, 1, seconds),
        ("weights", "weights_bytes", gate.cost.weights_gb, GB, size),
    )
    return [
        f"cost: {name} {show(method[key])}, at most {show(limit * unit)}"
        for name, key, limit, unit, show in limits
        if limit is not None and not method[key] <= limit * unit
    ]


def _forgetting(gate: Gate, general: Mapping[str, Any] | None) -> list[str]:
    if gate.forgetting is None:
        return []
    if general is None:
        return ["forgetting: not measured (`general` in params.yaml), and there is a limit"]
    if not general["high"] <= gate.forgetting:
        return [f"forgetting: upper bound {general['high']:+.3f} nats per token, at most {gate.forgetting:g}"]
    return []


# --- shown -----------------------------------------------------------------------------------------------------------

HEADER = ("method", "score", "over untrained", "verdict", "memory", "training", "weights", "forgot", "gate")


def table(found: Sequence[Candidate]) -> list[str]:
    """The candidates with their figures, one line each, and below each why it fails, as lines."""
    rows = [HEADER, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row, one in zip(rows, [None, *found], strict=True):
        lines.append("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"  {text}" for text in (one.failed if one else ())]
    return lines


def _row(one: Candidate) -> tuple[str, ...]:
    figures = one.figures
    return (
        f"{one.cell.model}/{one.cell.method}",
        f"{one.interval.mean:.3f} [{one.interval.low:.3f}, {one.interval.high:.3f}]",
        signed(figures["over_base"]),
        str(one.verdict) if one.verdict else "lacks cells",
        size(figures["peak_memory_bytes"]),
        seconds(figures["train_seconds"]) + (" (busy machine)" if figures.get("contended") else ""),
        size(figures["weights_bytes"]),
        signed(figures["general"]) if figures["general"] else "not measured",
        "fails" if one.failed else "passes",
    )
