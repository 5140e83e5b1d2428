"""A question with options by letter: how it is asked, and how its answers are scored."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from molf.evaluation import LanguageModel

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A letter that stands alone at the start: "A", "A.", "(A)", but not the article of "A patient".
ANSWER = re.compile(r"\s*\(?([A-Z])\s*(?:[).:,\n]|$)")


def prompt(question: str, options: Sequence[str]) -> str:
    """The question, its options by letter, and the word that asks for the letter."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS[: len(options)], options, strict=True))
    return f"{question}\n{listed}\nAnswer:"


def completion(letter: str) -> str:
    return f" {letter}"


def parse_letter(text: str, count: int) -> str | None:
    """The letter that a text begins with, alone or before a full stop, bracket, colon, comma or line end.

    Args:
        text: What a model said.
        count: Options that there are: only their letters are answers.
    """
    match = ANSWER.match(text)
    return match.group(1) if match and match.group(1) in LETTERS[:count] else None


def listed(prompt: str) -> list[str]:
    """The options that a prompt lists as `prompt` above does: the last that go by A, B, ... in order; none: no list."""
    found: list[str] = []
    for line in prompt.removesuffix("\nAnswer:").split("\n"):
        if line.startswith("A. "):
            found = [line[3:]]
        elif found and len(found) < len(LETTERS) and line.startswith(f"{LETTERS[len(found)]}. "):
            found.append(line[3:])
        elif found:
            found[-1] += f"\n{line}"
    return found


def predict(lm: "LanguageModel", examples: pd.DataFrame, counts: Sequence[int], max_new_tokens: int) -> pd.DataFrame:
    """The likeliest letter of each example and the letter that greedy text begins with, from one run of the prompt.

    Args:
        lm: Who is asked.
        examples: Prepared rows with example_id, prompt, answer (letter) and subject.
        counts: Options of each.
        max_new_tokens: Of the greedy text.

    Returns:
        example_id, prediction (the likeliest of the example's own letters), generated (text), answer, subject,
        logprob_A and so on (natural logarithms, NaN where the example has no such option), and 0 or 1 each: accuracy,
        accuracy_generated, invalid (the text begins with none of the example's letters).
    """
    prompts, letters = examples["prompt"].tolist(), LETTERS[: max(counts)]
    logprobs, generated = lm.choose(prompts, [completion(letter) for letter in letters], max_new_tokens)
    logprobs[np.arange(len(letters)) >= np.asarray(counts)[:, None]] = np.nan
    likeliest = [letters[i] for i in np.nanargmax(logprobs, axis=1)]
    said = [parse_letter(text, count) for text, count in zip(generated, counts, strict=True)]
    answers = examples["answer"].tolist()
    return pd.DataFrame(
        {
            "example_id": examples["example_id"].to_numpy(),
            "prediction": likeliest,
            "generated": generated,
            "answer": answers,
            "subject": examples["subject"].to_numpy(),
            **{f"logprob_{letter}": logprobs[:, i] for i, letter in enumerate(letters)},
            "accuracy": [float(a == b) for a, b in zip(likeliest, answers, strict=True)],
            "accuracy_generated": [float(a == b) for a, b in zip(said, answers, strict=True)],
            "invalid": [float(letter is None) for letter in said],
        }
    )


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """Means over all examples, and `accuracy/SUBJECT` where subjects are known."""
    accuracy = float(predictions["accuracy"].mean())
    known = predictions[predictions["subject"].notna()]
    by_subject = {f"accuracy/{name}": float(mean) for name, mean in known.groupby("subject")["accuracy"].mean().items()}
    return {
        "primary": accuracy,
        "primary_name": "accuracy",
        "n": len(predictions),
        "left_out": {},
        "accuracy": accuracy,
        "accuracy_generated": float(predictions["accuracy_generated"].mean()),
        "invalid_rate": float(predictions["invalid"].mean()),
        **by_subject,
    }
