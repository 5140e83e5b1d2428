"""A user's own files through the real stages, without a line of code: pairs, a quiz, conversations."""

import csv
import json
from typing import Any

import pandas as pd
import pytest

from tests.conftest import Project

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


def block(kind: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": kind,
        "source": {"kind": "file", "path": path},
        "license": "unknown",
        "limits": {"train": None, "validation": None, "test": None},
        "split": {"validation": 0.15, "test": 0.2, "seed": 0, "group": None},
        "duplicates": {"similarity": None, "across": "drop"},
        "max_rejected": 0.05,
        "options": options,
        "training": {},
    }


def write_files(project: Project) -> None:
    sums = [(i, j) for i in range(1, 7) for j in range(1, 7)]
    with (project.root / "pairs.jsonl").open("w") as file:
        for i, j in sums:
            file.write(json.dumps({"left": i, "right": j, "sum": i + j}) + "\n")
    with (project.root / "quiz.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "a", "b", "c", "d", "right", "topic"])
        for i, j in sums:
            options = [i + j, i + j + 1, i + j + 2, "" if i == j else i + j + 3]
            writer.writerow([f"{i} and {j}?", *options, 1, "sums"])
        writer.writerow(["Broken?", 1, 2, 3, "", 4, "sums"])
    with (project.root / "talks.jsonl").open("w") as file:
        for i, j in sums:
            turns = [("user", f"{WORDS[i - 1]} and {j}?"), ("assistant", str(i + j))]
            turns += [("user", "And one more?"), ("assistant", str(i + j + 1))] if i % 2 else []
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_files_become_a_comparison(project: Project) -> None:
    write_files(project)
    options = ["a", "b", "c", "d"]
    project.edit(
        {
            "tasks.sums": block("completion", "pairs.jsonl", {"prompt": "{left} + {right} =", "completion": "sum"}),
            "tasks.quiz": block(
                "choice",
                "quiz.csv",
                {
                    "question": "question",
                    "options": options,
                    "answer": "right",
                    "answer_is": "index1",
                    "subject": "topic",
                },
            ),
            "tasks.talks": block("completion", "talks.jsonl", {"messages": "messages"}),
            "grid.tasks": ["sums", "quiz", "talks"],
            "grid.methods": ["fft"],
            "training.max_steps": 4,
        }
    )
    project.repro("compare")
    prepared = {
        task: pd.read_parquet(project.root / f"data/prepared/{task}/train.parquet") for task in ("sums", "quiz")
    }
    assert set(prepared["sums"]["prompt"].str.fullmatch(r"\d \+ \d =")) == {True}
    assert set(prepared["quiz"]["options"]) == {3, 4} and set(prepared["quiz"]["answer"]) == {"A"}
    bad = pd.read_parquet(project.root / "data/prepared/quiz/rejected.parquet")
    assert bad[["source_row", "column", "check", "value"]].values.tolist() == [
        [38, "right", "is one of the row's options", "4"]
    ]
    for task, primary in (("sums", "exact_match"), ("quiz", "accuracy"), ("talks", "exact_match")):
        for method in ("base", "fft"):
            cell = project.root / f"results/tiny/{task}/{method}/seed-0"
            scores = json.loads((cell / "evaluation/metrics.json").read_text())
            predictions = pd.read_parquet(cell / "evaluation/predictions.parquet")
            assert scores["primary_name"] == primary and scores["n"] == len(predictions) > 3
            assert scores["primary"] == pytest.approx(predictions[primary].mean())
        history = pd.read_parquet(cell / "train/history.parquet")
        assert len(history) == 4 and history["loss"].notna().all()
        warnings = json.loads((cell / "train/summary.json").read_text())["warnings"]
        assert any("no chat template" in warning for warning in warnings) == (task == "talks")
    assert (
        "accuracy/sums"
        in json.loads((project.root / "results/tiny/quiz/fft/seed-0/evaluation/metrics.json").read_text())["metrics"]
    )
    groups = json.loads((project.root / "reports/comparison.json").read_text())["groups"]
    assert {group["task"] for group in groups} == {"sums", "quiz", "talks"}
