"""A stand-in for the language model, real files, and what a schema rejects."""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.errors
import pandera.pandas as pa
import pytest

from molf.config import Evaluation, NewTokens
from molf.encoding import Messages
from molf.evaluation import Answer, Question
from molf.tasks import Task

SHARED = Path(__file__).parents[2] / "../shared/data"
TOKENS = NewTokens(sql=64, med=4, fact=8, completion=16, choice=4)
EVALUATION = Evaluation(batch_size=8, max_new_tokens=TOKENS, weights=None)


class StandIn:
    """Answers as told.

    Args:
        says: Prompt -> greedy text.
        logprobs: (prompt, completion) -> log-probability of each of the completion's tokens.
    """

    def __init__(self, says: Callable[[str], str], logprobs: Callable[[str, str], list[float]] | None = None) -> None:
        self.says, self.logprobs = says, logprobs
        self.calls: list[str] = []

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        self.calls.append(f"generate {max_new_tokens}")
        return [self.says(prompt) for prompt in prompts]

    def chat(self, conversations: Sequence[Messages], max_new_tokens: int) -> list[str]:
        self.calls.append(f"chat {max_new_tokens}")
        return [self.says(talk[-1]["content"]) for talk in conversations]

    def answer(self, questions: Iterable[Question]) -> list[Answer]:
        self.calls.append("answer")
        assert self.logprobs is not None
        return [
            Answer(
                [np.array(self.logprobs(prompt, completion)) for completion in completions],
                self.says(prompt) if longest else "",
            )
            for prompt, completions, longest in questions
        ]

    def choose(
        self, prompts: Sequence[str], choices: Sequence[str], max_new_tokens: int
    ) -> tuple[np.ndarray, list[str]]:
        self.calls.append(f"choose {max_new_tokens}")
        assert self.logprobs is not None
        logprobs = np.array([[self.logprobs(prompt, choice)[0] for choice in choices] for prompt in prompts])
        return logprobs, [self.says(prompt) if max_new_tokens else "" for prompt in prompts]


def real(name: str) -> pd.DataFrame:
    """Rows of a real file; the test is skipped where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real file {name} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return pd.DataFrame([json.loads(line) for line in lines])


def rejected(schema: pa.DataFrameSchema, frame: pd.DataFrame) -> set[tuple[str, int]]:
    """What a schema finds: (check, row)."""
    try:
        schema.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        return {(check, int(row)) for check, row in zip(cases["check"], cases["index"], strict=True)}
    return set()


def with_ids(examples: pd.DataFrame) -> pd.DataFrame:
    return examples.assign(example_id=[f"row-{i}" for i in range(len(examples))])


def found(task: Task, frame: pd.DataFrame, options: Any) -> set[tuple[str, int]]:
    """What a task's schema finds in raw rows: (check, row)."""
    return rejected(task.raw_schema(options), task.normalise(frame, options))


def examples(task: Task, frame: pd.DataFrame, options: Any) -> pd.DataFrame:
    """Prepared rows of raw ones that are all good, held against the task's schema."""
    assert found(task, frame, options) == set()
    made = task.to_examples(task.normalise(frame, options), options)
    assert made.index.equals(frame.index)
    task.prepared_schema().validate(with_ids(made), lazy=True)
    return made
