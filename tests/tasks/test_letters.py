import pandas as pd
import pytest

from molf.tasks import letters
from tests.tasks.helpers import StandIn


def test_the_prompt_lists_the_options_and_the_completion_is_a_letter() -> None:
    assert letters.prompt("Which?", ["w", "x", "y", "z"]) == "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert letters.prompt("Which?", ["w"] * 26).endswith("\nZ. w\nAnswer:")
    assert letters.completion("C") == " C"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" A", "A"),
        ("B.", "B"),
        (" (C) because", "C"),
        ("D\nQuestion", "D"),
        (" A: x", "A"),
        (" A patient", None),
        ("E", None),
        ("", None),
        ("The answer is A", None),
        ("Aspirin", None),
    ],
)
def test_a_letter_is_read_from_what_was_said(text: str, letter: str | None) -> None:
    assert letters.parse_letter(text, 4) == letter


def test_only_the_letters_of_the_options_are_answers() -> None:
    assert [letters.parse_letter(" C.", count) for count in (2, 3, 26)] == [None, "C", "C"]


def test_each_example_is_answered_among_its_own_letters() -> None:
    examples = pd.DataFrame(
        {
            "example_id": ["a", "b", "c"],
            "prompt": ["two", "three", "five"],
            "answer": ["A", "C", "E"],
            "subject": ["x", "x", None],
        }
    )
    likes = {" A": -3.0, " B": -4.0, " C": -2.0, " D": -5.0, " E": -1.0}
    said = {"two": " C", "three": " C", "five": "E."}
    lm = StandIn(said.__getitem__, lambda prompt, choice: [likes[choice]])
    predictions = letters.predict(lm, examples, [2, 3, 5], 4)  # type: ignore[arg-type]
    assert predictions["prediction"].tolist() == ["A", "C", "E"]
    assert predictions[[f"logprob_{letter}" for letter in "ABCDE"]].notna().sum(axis=1).tolist() == [2, 3, 5]
    assert predictions["accuracy"].tolist() == [1, 1, 1]
    assert predictions["accuracy_generated"].tolist() == [0, 1, 1] and predictions["invalid"].tolist() == [1, 0, 0]
    scores = letters.metrics(predictions)
    assert scores["primary"] == scores["accuracy"] == 1 and scores["accuracy/x"] == 1
    assert scores["invalid_rate"] == pytest.approx(1 / 3)


def test_options_are_read_back_from_a_prompt() -> None:
    options = ["red", "blue\nor nearly", "B. Brecht"]
    assert letters.listed(letters.prompt("A. is a letter?\nWhich", options)) == options
    assert letters.listed("Which? Answer:") == []
