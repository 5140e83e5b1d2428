"""MedMCQA (Pal et al. 2022): a question and four options; the answer is a letter."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.tasks import letters
from molf.tasks.columns import differ, given, joined, numbers, of_rows, prepared, text, vector
from molf.tasks.letters import LETTERS, completion, prompt

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.blocks import MedOptions
    from molf.config import Evaluation
    from molf.evaluation import LanguageModel

NAME = "med"
PRIMARY = "accuracy"
COMPONENTS = ["accuracy"]
BINARY = "accuracy"
OPTIONS = ["opa", "opb", "opc", "opd"]
COLUMNS = ["question", *OPTIONS, "cop"]


def columns(options: "MedOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists."""
    return [COLUMNS]


def asked(options: "MedOptions") -> list[list[str]]:
    return [["question", *OPTIONS]]


def raw_schema(options: "MedOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows; `cop` must lie within `options.first_option` and three more."""
    import pandera.pandas as pa

    first = options.first_option

    def is_option(values: pd.Series) -> np.ndarray:
        return np.isin(numbers(values), np.arange(first, first + 4))

    name = f"is an option's number, {first} to {first + 3}"
    return question_schema(options).add_columns(
        {
            "cop": pa.Column(nullable=True, checks=[given(), vector(is_option, name)]),
            "subject_name": text(optional=True, required=False),
        }
    )


def question_schema(options: "MedOptions") -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {"question": text(), **{option: text() for option in OPTIONS}},
        checks=of_rows(lambda frame: differ(frame, OPTIONS), "options differ"),
    )


def tolerated(options: "MedOptions") -> frozenset[str]:
    return frozenset()


def normalise(frame: pd.DataFrame, options: "MedOptions") -> pd.DataFrame:
    """MedMCQA's rows are flat already."""
    return frame


def prepared_schema() -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return prepared(answer=pa.Column(str, pa.Check.isin(list(LETTERS[: len(OPTIONS)]))), subject=text(optional=True))


def hint(failures: pd.DataFrame, options: "MedOptions") -> str | None:
    """Counted from the other end, the wrong values of `cop` are just the one that lies outside."""
    other = 1 - options.first_option
    outside = {"0"} if options.first_option else {"4"}
    if set(failures.loc[failures["column"] == "cop", "value"]) == outside:
        return (
            f"`cop` seems to count from {other}: set options.first_option to {other}, else every answer is off by one"
        )
    return None


def questions(frame: pd.DataFrame, options: "MedOptions") -> pd.DataFrame:
    rows = [[cell.strip() for cell in row] for row in frame[["question", *OPTIONS]].itertuples(index=False)]
    return pd.DataFrame(
        {
            "prompt": [prompt(question, choices) for question, *choices in rows],
            "choices": pd.Series([choices for _, *choices in rows], index=frame.index, dtype=object),
        },
        index=frame.index,
    )


def to_examples(frame: pd.DataFrame, options: "MedOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt, completion, answer (letter) and subject (or None); the index stays."""
    answers = [LETTERS[int(cop) - options.first_option] for cop in frame["cop"]]
    subjects = frame["subject_name"] if "subject_name" in frame else [None] * len(frame)
    return pd.DataFrame(
        {
            "prompt": questions(frame, options)["prompt"],
            "completion": [completion(answer) for answer in answers],
            "answer": answers,
            "subject": pd.Series(
                [subject.strip() if isinstance(subject, str) else None for subject in subjects],
                index=frame.index,
                dtype=str,
            ),
        },
        index=frame.index,
    )


def identity(frame: pd.DataFrame, options: "MedOptions") -> pd.Series:
    """The question and its options."""
    return joined(frame, ["question", *OPTIONS])


def combine(means: dict[str, float]) -> float:
    return means["accuracy"]


def predict(lm: "LanguageModel", examples: pd.DataFrame, evaluation: "Evaluation") -> pd.DataFrame:
    """The letters that `letters.predict` finds, with logprob_A to logprob_D."""
    return letters.predict(lm, examples, [len(OPTIONS)] * len(examples), evaluation.max_new_tokens.med)


def right(answer: str, gold: str) -> bool:
    return answer == gold


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    return letters.metrics(predictions)
