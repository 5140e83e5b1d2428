"""MedMCQA (Pal et al. 2022): a question and four options; the answer is a letter."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.tasks.columns import differ, given, joined, numbers, of_rows, prepared, text, vector

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.config import Evaluation, MedOptions
    from molf.evaluation import LanguageModel

NAME = "med"
PRIMARY = "accuracy"
COMPONENTS = ["accuracy"]
BINARY = "accuracy"
LETTERS = "ABCD"
OPTIONS = ["opa", "opb", "opc", "opd"]
# A letter that stands alone at the start: "A", "A.", "(A)", but not the article of "A patient".
ANSWER = re.compile(r"\s*\(?([A-D])\s*(?:[).:,\n]|$)")


def prompt(question: str, options: Sequence[str]) -> str:
    """The question, its four options by letter, and the word that asks for the letter."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return f"{question}\n{listed}\nAnswer:"


def completion(letter: str) -> str:
    return f" {letter}"


def columns(options: "MedOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists."""
    return [["question", *OPTIONS, "cop"]]


def raw_schema(options: "MedOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows; `cop` must lie within `options.first_option` and three more."""
    import pandera.pandas as pa

    first = options.first_option

    def is_option(values: pd.Series) -> np.ndarray:
        return np.isin(numbers(values), np.arange(first, first + 4))

    name = f"is an option's number, {first} to {first + 3}"
    return pa.DataFrameSchema(
        {
            "question": text(),
            **{option: text() for option in OPTIONS},
            "cop": pa.Column(nullable=True, checks=[given(), vector(is_option, name)]),
            "subject_name": text(optional=True, required=False),
        },
        checks=of_rows(lambda frame: differ(frame, OPTIONS), "options differ"),
    )


def tolerated(options: "MedOptions") -> frozenset[str]:
    return frozenset()


def normalise(frame: pd.DataFrame, options: "MedOptions") -> pd.DataFrame:
    """MedMCQA's rows are flat already."""
    return frame


def prepared_schema() -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return prepared(answer=pa.Column(str, pa.Check.isin(list(LETTERS))), subject=text(optional=True))


def hint(failures: pd.DataFrame, options: "MedOptions") -> str | None:
    """Counted from the other end, the wrong values of `cop` are just the one that lies outside."""
    other = 1 - options.first_option
    outside = {"0"} if options.first_option else {"4"}
    if set(failures.loc[failures["column"] == "cop", "value"]) == outside:
        return (
            f"`cop` seems to count from {other}: set options.first_option to {other}, else every answer is off by one"
        )
    return None


def to_examples(frame: pd.DataFrame, options: "MedOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt, completion, answer (letter) and subject (or None); the index stays."""
    letters = [LETTERS[int(cop) - options.first_option] for cop in frame["cop"]]
    rows = frame[["question", *OPTIONS]].itertuples(index=False)
    subjects = frame["subject_name"] if "subject_name" in frame else [None] * len(frame)
    return pd.DataFrame(
        {
            "prompt": [prompt(row[0].strip(), [option.strip() for option in row[1:]]) for row in rows],
            "completion": [completion(letter) for letter in letters],
            "answer": letters,
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
    """The likeliest letter of each example in one forward, and the letter that greedy text begins with.

    Returns:
        example_id, prediction (the likeliest letter), generated (text), answer, subject, logprob_A to logprob_D
        (natural logarithms), and 0 or 1 each: accuracy, accuracy_generated, invalid (the text begins with no letter).
    """
    prompts = examples["prompt"].tolist()
    logprobs = lm.choice_logprobs(prompts, [completion(letter) for letter in LETTERS])
    generated = lm.generate(prompts, evaluation.max_new_tokens.med)
    likeliest = [LETTERS[i] for i in logprobs.argmax(axis=1)]
    letters = [parse_letter(text) for text in generated]
    answers = examples["answer"].tolist()
    return pd.DataFrame(
        {
            "example_id": examples["example_id"].to_numpy(),
            "prediction": likeliest,
            "generated": generated,
            "answer": answers,
            "subject": examples["subject"].to_numpy(),
            **{f"logprob_{letter}": logprobs[:, i] for i, letter in enumerate(LETTERS)},
            "accuracy": [float(a == b) for a, b in zip(likeliest, answers, strict=True)],
            "accuracy_generated": [float(a == b) for a, b in zip(letters, answers, strict=True)],
            "invalid": [float(letter is None) for letter in letters],
        }
    )


def parse_letter(text: str) -> str | None:
    """The letter A to D that the text begins with, alone or before a full stop, bracket, colon, comma or line end."""
    match = ANSWER.match(text)
    return match.group(1) if match else None


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """Means over all examples, and `accuracy/SUBJECT` where subjects are known."""
    accuracy = float(predictions["accuracy"].mean())
    known = predictions[predictions["subject"].notna()]
    by_subject = {f"accuracy/{name}": float(mean) for name, mean in known.groupby("subject")["accuracy"].mean().items()}
    return {
        "primary": combine({"accuracy": accuracy}),
        "primary_name": PRIMARY,
        "n": len(predictions),
        "left_out": {},
        "accuracy": accuracy,
        "accuracy_generated": float(predictions["accuracy_generated"].mean()),
        "invalid_rate": float(predictions["invalid"].mean()),
        **by_subject,
    }
