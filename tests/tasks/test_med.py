import pandas as pd
import pytest

from molf.blocks import MedOptions
from molf.tasks import med
from tests.tasks.helpers import EVALUATION, StandIn, real, rejected, with_ids

ONE, ZERO = MedOptions(first_option=1), MedOptions(first_option=0)


def rows(count: int = 3, changes: dict[str, list[object]] | None = None) -> pd.DataFrame:
    own: dict[str, list[object]] = {
        "question": [f"Question {i}?" for i in range(count)],
        **{name: [f"{name} of {i}" for i in range(count)] for name in med.OPTIONS},
        "cop": [1 + i % 4 for i in range(count)],
    }
    return pd.DataFrame({**own, **(changes or {})})


@pytest.mark.parametrize(("options", "letters"), [(ONE, ["A", "B", "C", "D"]), (ZERO, ["B", "C", "D"])])
def test_cop_counts_from_the_first_option(options: MedOptions, letters: list[str]) -> None:
    frame = rows(len(letters))
    assert rejected(med.raw_schema(options), frame) == set()
    examples = with_ids(med.to_examples(frame, options))
    assert examples["answer"].tolist() == letters
    assert examples["completion"].tolist() == [f" {letter}" for letter in letters]
    med.prepared_schema().validate(examples, lazy=True)


def test_the_index_and_subjects_stay() -> None:
    frame = rows(changes={"subject_name": ["Surgery", None, " Anatomy "]}).set_index(pd.Index([7, 3, 9]))
    examples = med.to_examples(frame, ONE)
    assert examples.index.tolist() == [7, 3, 9]
    assert [subject if isinstance(subject, str) else None for subject in examples["subject"]] == [
        "Surgery",
        None,
        "Anatomy",
    ]


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"cop": [1, 0, 2]}, "is an option's number, 1 to 4"),
        ({"cop": [1, 5, 2]}, "is an option's number, 1 to 4"),
        ({"cop": [1, 2.5, 2]}, "is an option's number, 1 to 4"),
        ({"cop": [1, "2", 2]}, "is an option's number, 1 to 4"),
        ({"cop": [1, True, 2]}, "is an option's number, 1 to 4"),
        ({"cop": [1, None, 2]}, "is given"),
        ({"question": ["a", None, "c"]}, "is given"),
        ({"question": ["a", " \n", "c"]}, "is not empty"),
        ({"question": ["a", "b\x07", "c"]}, "has no control characters"),
        ({"opa": ["a", 7, "c"]}, "is text"),
        ({"subject_name": ["a", 7, None]}, "is text"),
        ({"opb": ["a", "opa of 1 ", "c"]}, "options differ"),
    ],
)
def test_a_bad_row_is_found_with_its_check(changes: dict[str, list[object]], check: str) -> None:
    assert rejected(med.raw_schema(ONE), rows(changes=changes)) == {(check, 1)}


def test_all_problems_at_once() -> None:
    frame = rows(changes={"cop": [9, 1, 1], "question": ["a", "", "c"]})
    found = rejected(med.raw_schema(ONE), frame)
    assert found == {("is an option's number, 1 to 4", 0), ("is not empty", 1)}


def test_numbers_are_no_text() -> None:
    assert rejected(med.raw_schema(ONE), rows(changes={"opa": [1, 2, 3]})) == {("is text", row) for row in range(3)}


def test_scores_of_hand_made_answers() -> None:
    frame = rows(4, {"subject_name": ["Surgery", "Surgery", "Anatomy", None]})  # answers A, B, C, D
    examples = with_ids(med.to_examples(frame, ONE))
    likeliest, said = ["A", "B", "A", "D"], [" A", " C", " C.", " nothing"]
    place = {prompt: i for i, prompt in enumerate(examples["prompt"])}
    lm = StandIn(
        lambda prompt: said[place[prompt]],
        lambda prompt, choice: [-0.1 if choice == f" {likeliest[place[prompt]]}" else -3.0],
    )
    predictions = med.predict(lm, examples, EVALUATION)  # type: ignore[arg-type]
    assert lm.calls == ["choose 4"]
    assert predictions["prediction"].tolist() == likeliest
    assert predictions["example_id"].tolist() == examples["example_id"].tolist()
    assert predictions["logprob_A"].tolist() == [-0.1, -3.0, -0.1, -3.0]
    scores = med.metrics(predictions)
    assert scores == {
        "primary": 0.75,
        "primary_name": "accuracy",
        "n": 4,
        "left_out": {},
        "accuracy": 0.75,
        "accuracy_generated": 0.5,
        "invalid_rate": 0.25,
        "accuracy/Surgery": 1.0,
        "accuracy/Anatomy": 0.0,
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_rows(split: str) -> None:
    frame = med.normalise(real(f"med/{split}.jsonl.gz"), ONE)
    found = rejected(med.raw_schema(ONE), frame)
    assert {check for check, _ in found} <= {"options differ"} and len(found) < 0.01 * len(frame)
    frame = frame.drop(index=sorted({row for _, row in found}))
    examples = with_ids(med.to_examples(frame, ONE))
    med.prepared_schema().validate(examples, lazy=True)
    answers = dict(zip(examples["prompt"], examples["completion"], strict=True))
    lm = StandIn(answers.__getitem__, lambda prompt, choice: [0.0 if answers[prompt] == choice else -1.0])
    examples = examples.drop_duplicates("prompt")
    scores = med.metrics(med.predict(lm, examples, EVALUATION))  # type: ignore[arg-type]
    assert (scores["accuracy"], scores["accuracy_generated"], scores["invalid_rate"]) == (1.0, 1.0, 0.0)
    # Counted from 0, the same files have answers outside the four options.
    assert ("is an option's number, 0 to 3") in {check for check, _ in rejected(med.raw_schema(ZERO), frame)}
