import json
from functools import partial
from typing import Any

import pandas as pd
import pytest

from molf.blocks import ChoiceOptions
from molf.tasks import choice
from molf.tasks.columns import NotUnicode
from tests.tasks import helpers
from tests.tasks.helpers import EVALUATION, StandIn, rejected, with_ids

NAMES = ["o1", "o2", "o3", "o4"]


def form(answer_is: str = "letter", columns: str | list[str] | None = None, **other: Any) -> ChoiceOptions:
    return ChoiceOptions.model_validate(
        {"question": "asked", "options": columns or NAMES, "answer": "right", "answer_is": answer_is, **other}
    )


def raw(**columns: list[Any]) -> pd.DataFrame:
    """Three rows of four options as a file gives them, with changes."""
    own: dict[str, list[Any]] = {
        "asked": [f"Question {i}?" for i in range(3)],
        **{name: [f"{name} of {i}" for i in range(3)] for name in NAMES},
        "right": ["A", "B", "C"],
    }
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in (own | columns).items()})


found, examples = partial(helpers.found, choice), partial(helpers.examples, choice)


def test_a_row_becomes_a_question_with_lettered_options() -> None:
    frame = raw(o3=[" o3 of 0 ", None, "x"], o4=["y", None, None], topic=["Art ", None, 2])
    made = examples(frame.set_index(pd.Index([7, 3, 9])), form(subject="topic"))
    assert made.loc[7].to_dict() == {
        "prompt": "Question 0?\nA. o1 of 0\nB. o2 of 0\nC. o3 of 0\nD. y\nAnswer:",
        "completion": " A",
        "answer": "A",
        "subject": "Art",
        "options": 4,
    }
    assert made["options"].tolist() == [4, 2, 3]
    assert made.loc[3, "prompt"] == "Question 1?\nA. o1 of 1\nB. o2 of 1\nAnswer:"
    assert made["subject"].isna().tolist() == [False, True, False] and made.loc[9, "subject"] == "2"


def test_the_columns_that_must_be_there() -> None:
    templated = form(question="{asked} ({topic})", subject="topic")
    assert choice.columns(templated) == [["asked", "topic", "o1", "o2", "right"]]
    assert choice.columns(form(columns="listed")) == [["asked", "listed", "right"]]
    # A file whose rows have fewer options need not have the columns of the others.
    made = examples(raw(right=["A", "B", "b"]).drop(columns=["o3", "o4"]), form())
    assert made["options"].tolist() == [2, 2, 2]


def test_a_template_asks_and_numbers_are_text() -> None:
    frame = raw(asked=[2, 3, 4], o1=[1, 2.5, "x"], o2=[2, 1, 5], topic=["sums"] * 3)
    made = examples(frame, form(question="{topic}: {asked}\n"))
    assert made.loc[1, "prompt"] == "sums: 3\n\nA. 2.5\nB. 1\nC. o3 of 1\nD. o4 of 1\nAnswer:"


def test_options_and_answers_lie_at_paths() -> None:
    texts = [["a", "b"], ["c", "d", "e"]]
    frame = pd.DataFrame(
        {
            "asked": [{"stem": "One?"}, {"stem": "Two?"}],
            "choices": [{"text": own, "label": list("ABC")} for own in texts],  # as ARC's
            "listed": [[{"text": text} for text in own] for own in texts],
            "by": [dict(zip("ABC", own, strict=False)) for own in texts],
            "key": [["B"], ["C"]],
        }
    )
    for options in ("choices.text", "listed.*.text", ["by.A", "by.B", "by.C"]):
        nested = ChoiceOptions(question="asked.stem", options=options, answer="key.0", answer_is="letter")
        made = examples(frame, nested)
        assert made["prompt"].tolist() == ["One?\nA. a\nB. b\nAnswer:", "Two?\nA. c\nB. d\nC. e\nAnswer:"]
        assert made["answer"].tolist() == ["B", "C"]
    assert choice.columns(nested)[1] == ["asked", "by", "key"]


@pytest.mark.parametrize("many", [2, 5, 26])
def test_options_in_one_list(many: int) -> None:
    lists = [[f" option {i} " for i in range(many)], [3, "4"], ["x", 1.5, "z"]]
    made = examples(raw(listed=lists, right=[many - 1, "1", 2.0]), form("index0", "listed"))
    assert made["options"].tolist() == [many, 2, 3]
    assert made["answer"].tolist() == [choice.LETTERS[many - 1], "B", "C"]
    assert made.loc[1, "prompt"] == "Question 1?\nA. 3\nB. 4\nAnswer:"


@pytest.mark.parametrize(
    ("answer_is", "answers"),
    [
        ("letter", ["A", "b", " C. "]),
        ("letter", ["(a)", "B)", "c:"]),
        ("index0", [0, "1", 2.0]),
        ("index0", ["0.0", 1, "2."]),
        ("index1", [1, "2", " 3 "]),
        ("text", ["o1 of 0", " o2 of 1 ", "o3 of 2\n"]),
    ],
)
def test_an_answer_in_each_form(answer_is: str, answers: list[Any]) -> None:
    made = examples(raw(right=answers), form(answer_is))
    assert made["answer"].tolist() == ["A", "B", "C"] and made["completion"].tolist() == [" A", " B", " C"]


def test_the_answers_may_be_the_first_options() -> None:
    frame = raw(right=["yes", "true", 10**400])
    made = examples(frame, form("text", ["right", "o1"], subject="right"))
    assert made["answer"].tolist() == ["A"] * 3 and made["subject"].tolist()[:2] == ["yes", "true"]
    assert made["prompt"].iloc[0] == "Question 0?\nA. yes\nB. o1 of 0\nAnswer:"
    assert found(frame, form("letter", ["right", "o1"])) == {("is a letter", i) for i in range(3)}


def test_an_answer_that_is_a_number_among_the_options() -> None:
    made = examples(raw(o1=[1, 1, 1], o2=["2", 2, 2.0], o3=[3] * 3, o4=[4] * 3, right=["2", 2, 3]), form("text"))
    assert made["answer"].tolist() == ["B", "B", "C"]


@pytest.mark.parametrize(
    ("answer_is", "value", "check"),
    [
        *[(kind, None, "is given") for kind in ("letter", "index0", "index1", "text")],
        *[(kind, [0], choice.FORM[kind]) for kind in ("letter", "index0", "index1", "text")],
        *[(kind, True, choice.FORM[kind]) for kind in ("letter", "index0", "index1", "text")],
        ("letter", "AB", "is a letter"),
        ("letter", 1, "is a letter"),
        ("letter", "", "is a letter"),
        ("letter", NotUnicode("\ud800"), "is UTF-8"),
        ("letter", "E", choice.INSIDE),
        ("index0", 4, choice.INSIDE),
        ("index0", -1, choice.INSIDE),
        ("index0", 1.5, "is a whole number"),
        ("index0", "A", "is a whole number"),
        ("index0", float("inf"), "is a whole number"),
        ("index1", "0", choice.INSIDE),
        ("index1", 5, choice.INSIDE),
        ("text", "other", choice.INSIDE),
        ("text", "O2 OF 1", choice.INSIDE),
        ("text", "", choice.INSIDE),
    ],
)
def test_a_bad_answer_is_found_with_its_check(answer_is: str, value: Any, check: str) -> None:
    good = {"letter": "A", "index0": 0, "index1": 1, "text": "x"}[answer_is]
    frame = raw(o1=["x", "x", "x"], right=[good, value, good])
    assert found(frame, form(answer_is)) == {(check, 1)}


def test_an_answer_must_be_one_of_the_row_s_own_options() -> None:
    frame = raw(o3=["x", None, "z"], o4=[None, None, "w"], right=["C", "C", "D"])
    assert found(frame, form()) == {(choice.INSIDE, 1)}
    listed = raw(listed=[["a", "b"], ["a", "b"], ["a", "b", "c"]], right=["B", "C", "C"])
    assert found(listed, form(columns="listed")) == {(choice.INSIDE, 1)}


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"asked": ["a", " ", "c"]}, "is not empty"),
        ({"asked": ["a", ["b"], "c"]}, "is text or a finite number"),
        ({"o1": ["a", None, "c"]}, "is given"),
        ({"o2": ["a", None, "c"], "o3": ["a1", None, "c1"], "o4": ["a2", None, "c2"]}, "is given"),
        ({"o3": ["a", None, "c"]}, choice.GAP),
        ({"o3": ["a", "", "c"]}, "is not empty"),
        ({"o4": ["a", "o1 of 1 ", "c"]}, choice.DIFFER),
        ({"o4": ["a", False, "c"]}, "is text or a finite number"),
        ({"o4": ["a", "b\x07", "c"]}, "has no control characters"),
        ({"o3": [1, 1, 1], "o4": [2, "1", 2]}, choice.DIFFER),
        ({"topic": ["a", [7], "c"]}, "is text or a finite number"),
    ],
)
def test_a_bad_row_is_found_with_its_check(changes: dict[str, list[Any]], check: str) -> None:
    options = form(subject="topic" if "topic" in changes else None)
    assert found(raw(**changes), options) == {(check, 1)}


def test_options_that_are_fewer_must_differ_too() -> None:
    assert found(raw(o2=["x", "o1 of 1", "y"], o3=[None] * 3, o4=[None] * 3, right=["A"] * 3), form()) == {
        (choice.DIFFER, 1)
    }


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (None, "is given"),
        ("a, b, c", choice.LIST),
        ({"text": ["a", "b"]}, choice.LIST),
        ([], choice.LIST),
        (["a"], choice.LIST),
        ([f"{i}" for i in range(27)], choice.LIST),
        (["a", None], "option is given"),
        (["a", ["b"]], "option is text or a finite number"),
        (["a", True], "option is text or a finite number"),
        (["a", " "], "option is not empty"),
        (["a", "b\x00"], "option has no control characters"),
        (["a", "b", "a "], choice.DIFFER),
        ([1, "1"], choice.DIFFER),
    ],
)
def test_a_bad_list_is_found_with_its_check(value: Any, check: str) -> None:
    frame = raw(listed=[["a", "b"], value, ["a", "b"]], right=["A", "A", "B"])
    assert found(frame, form(columns="listed")) == {(check, 1)}


def hint(options: ChoiceOptions, frame: pd.DataFrame) -> str | None:
    """What is said of the rows that a schema rejects, as `prepare` hands them on."""
    flat = choice.normalise(frame, options)
    rows = [
        {"column": "right", "check": check, "value": str(flat.at[row, "right"]), "record": frame.loc[row].to_json()}
        for check, row in rejected(choice.raw_schema(options), flat)
    ]
    return choice.hint(pd.DataFrame(rows, columns=["column", "check", "value", "record"]), options)


@pytest.mark.parametrize("values", [["0", "1", "3"], [0, 1, 3], [0.0, 1.0, 0.0]])
def test_answers_that_count_from_0_are_recognised(values: list[Any]) -> None:
    said = "`right` seems to count from 0: set options.answer_is to index0"
    assert hint(form("index1"), raw(right=values)) == f"{said}, else every answer is off by one"
    assert hint(form("letter"), raw(right=values)) == said
    assert hint(form("text"), raw(right=values)) == said


@pytest.mark.parametrize("columns", [NAMES, "listed"])
def test_answers_that_count_from_1_are_recognised(columns: Any) -> None:
    frame = raw(right=[1, "4", 3], listed=[["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c"]])
    said = "`right` seems to count from 1: set options.answer_is to index1"
    assert hint(form("index0", columns), frame) == f"{said}, else every answer is off by one"
    assert hint(form("letter", columns), frame) == said


def test_other_forms_are_recognised_and_nothing_is_made_up() -> None:
    assert hint(form("index0"), raw(right=["A", "b", "(C)"])) == (
        "`right` seems to hold letters: set options.answer_is to letter"
    )
    texts = raw(right=["o1 of 0", "o2 of 1", "o1 of 2"])
    for kind in ("letter", "index1"):
        assert hint(form(kind), texts) == "`right` seems to hold options: set options.answer_is to text"
    assert hint(form("index1"), raw(right=[9, 9, 1])) is None
    assert hint(form("index0"), raw(right=[9, 9, 1])) is None
    assert hint(form(), raw(right=["A", "E", "B"])) is None
    assert hint(form(), raw()) is None


def test_a_misspelled_column_of_options_is_recognised() -> None:
    frame = raw(right=["D", "A", "C"])
    options = form(columns=["o1", "o2", "o_3", "o_4"])
    assert hint(options, frame) == "no rejected row has o_3, o_4, which options.options names: is it spelled so?"
    assert json.loads(frame.loc[0].to_json())["o3"] == "o3 of 0"


def test_near_copies_are_found_by_what_is_a_row_s_own() -> None:
    frame = raw(o3=[None] * 3, o4=[None] * 3, right=["A"] * 3)
    options = form(question="Choose! {asked}")
    assert choice.identity(choice.normalise(frame, options), options)[1] == "Question 1?\no1 of 1\no2 of 1"
    listed = raw(listed=[["a", "b "]] * 3, right=["A"] * 3)
    options = form(columns="listed")
    assert choice.identity(choice.normalise(listed, options), options)[2] == "Question 2?\na\nb"


def test_scores_of_hand_made_answers() -> None:
    frame = raw(o3=["x", None, "z"], o4=[None, None, "w"], right=["A", "B", "C"], topic=["s", "s", "t"])
    made = with_ids(examples(frame, form(subject="topic")))
    place = {prompt: i for i, prompt in enumerate(made["prompt"])}
    likes, said = ["A", "D", "C"], [" A", " C", " nothing"]
    lm = StandIn(
        lambda prompt: said[place[prompt]],
        lambda prompt, option: [-0.1 if option == f" {likes[place[prompt]]}" else -3.0 - (option > " B")],
    )
    predictions = choice.predict(lm, made, EVALUATION)  # type: ignore[arg-type]
    assert lm.calls == ["choose 4"]
    # The second row has no D, so that the likeliest of its own letters counts.
    assert predictions["prediction"].tolist() == ["A", "A", "C"]
    assert choice.metrics(predictions) == {
        "primary": pytest.approx(2 / 3),
        "primary_name": "accuracy",
        "n": 3,
        "left_out": {},
        "accuracy": pytest.approx(2 / 3),
        "accuracy_generated": pytest.approx(1 / 3),
        "invalid_rate": pytest.approx(2 / 3),
        "accuracy/s": 0.5,
        "accuracy/t": 1.0,
    }
