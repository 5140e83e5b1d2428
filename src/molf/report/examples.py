"""The examples on which cells of a comparison differ, for the page's example browser."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from molf.paths import BASE_METHOD, Cell
from molf.tasks import TASKS

MOST = 200  # examples of one model and task
BYTES = 1_200_000  # of all examples of a page together
LONGEST = {"prompt": 1500, "gold": 600, "prediction": 600}  # characters of a text that are shown
UNTRAINED = "untrained model"


def collect(comparison: Mapping[str, Any], root: Path) -> list[dict[str, Any]]:
    """For each group the examples on which any two of its cells differ: one right, or both wrong in unlike ways.

    Where they are too many, those whose ids have the smallest hashes stay, so that equal results give equal choices.

    Args:
        comparison: As `comparison.build` gives it.
        root: Project folder, for predictions.parquet.

    Returns:
        For each group, in the comparison's order: `model`, `task`, `metric` (what says right or wrong), `cells` (their
        names), `differing` (how many differ), `cut` (how many texts were shortened) and `examples`, each with `id`,
        `prompt`, `gold`, `answers` (unlike texts) and `given`: for each cell the index of its answer, and 1 (right),
        0 (wrong) or null (left out).
    """
    share = BYTES // max(1, len(comparison["groups"]))
    return [_of_group(group, root, share) for group in comparison["groups"]]


def _of_group(group: Mapping[str, Any], root: Path, room: int) -> dict[str, Any]:
    place = group["model"], group["task"]
    names, frames = [], []
    for m in group["methods"]:
        for seed in m["per_seed"]:
            names.append(f"{m['method']}, seed {seed['seed']}" if len(m["per_seed"]) > 1 else m["method"])
            frames.append(_predictions(root, Cell(*place, m["method"], seed["seed"])))
    names.append(UNTRAINED)
    frames.append(_predictions(root, Cell(*place, BASE_METHOD, 0)))
    task = TASKS[group["task_kind"]]
    metric = task.BINARY or task.COMPONENTS[0]
    right = np.stack([frame[metric].to_numpy(float) for frame in frames], axis=1)  # examples x cells; NaN: left out
    answers = np.stack([frame["prediction"].astype(str).to_numpy() for frame in frames], axis=1)
    differing = [i for i in range(len(right)) if _differ(right[i], answers[i])]
    ids = frames[0]["example_id"].astype(str).to_numpy()
    kept: dict[int, dict[str, Any]] = {}
    cut = 0
    for i in sorted(differing, key=lambda i: hashlib.sha256(str(ids[i]).encode()).digest())[:MOST]:
        example, shortened = _example(ids[i], frames[0].iloc[i], answers[i], right[i])
        room -= len(json.dumps(example, ensure_ascii=False).encode())
        if room < 0:
            break
        kept[i] = example
        cut += shortened
    return {
        "model": group["model"],
        "task": group["task"],
        "metric": metric,
        "cells": names,
        "differing": len(differing),
        "cut": cut,
        "examples": [kept[i] for i in sorted(kept)],
    }


def _predictions(root: Path, cell: Cell) -> pd.DataFrame:
    return pd.read_parquet(root / cell.results / "evaluation/predictions.parquet")


def _differ(right: np.ndarray, answers: np.ndarray) -> bool:
    """Whether one cell is right and another wrong, or two are wrong in unlike ways."""
    scored = np.isfinite(right)
    good = right[scored] >= 0.5
    return bool((good.any() and not good.all()) or len(set(answers[scored][~good])) > 1)


def _example(name: str, row: pd.Series, answers: np.ndarray, right: np.ndarray) -> tuple[dict[str, Any], int]:
    """An example as the page holds it, and how many of its texts were cut."""
    texts = [("prompt", row.get("prompt")), ("gold", row.get("gold"))]
    unlike = list(dict.fromkeys(answers))
    shown = {kind: _cut(text, LONGEST[kind]) for kind, text in texts}
    shown_answers = [_cut(text, LONGEST["prediction"]) for text in unlike]
    example = {
        "id": name,
        **shown,
        "answers": shown_answers,
        "given": [
            [unlike.index(text), int(good >= 0.5) if np.isfinite(good) else None]
            for text, good in zip(answers, right, strict=True)
        ],
    }
    pairs = [*((shown[kind], text) for kind, text in texts), *zip(shown_answers, unlike, strict=True)]
    return example, sum(new != old for new, old in pairs if isinstance(old, str))


def _cut(text: Any, longest: int) -> str | None:
    """A text, or its beginning with a mark; None for what an earlier molf did not keep."""
    if not isinstance(text, str):
        return None
    if len(text) <= longest:
        return text
    return f"{text[:longest]} \u2026 [cut: {len(text):,} characters in all]"


def as_json(value: Any) -> str:
    """JSON that may stand in a page's <script>: nothing in it can end the element or a line of JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
