import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from molf.blocks import CompletionOptions
from molf.errors import UserError
from molf.tasks import completion
from molf.tasks.columns import NotUnicode
from tests.tasks import helpers
from tests.tasks.helpers import EVALUATION, StandIn, with_ids

PLAIN = CompletionOptions(prompt="question", completion="answer")
ALPACA = CompletionOptions(prompt="{instruction}\n{input}\n\n### Response:\n", completion="{output}")
CHAT = CompletionOptions(messages="talk")


def raw(**columns: list[Any]) -> pd.DataFrame:
    """Columns as the rows of a file give them."""
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


found, examples = partial(helpers.found, completion), partial(helpers.examples, completion)


def test_a_column_alone_is_stripped_and_the_completion_starts_with_one_space() -> None:
    made = examples(raw(question=[" Two and two? \n", "Why?"], answer=["  Four ", "So."]), PLAIN)
    assert made["prompt"].tolist() == ["Two and two?", "Why?"]
    assert made["completion"].tolist() == [" Four", " So."]


def test_a_template_is_taken_to_the_letter() -> None:
    frame = raw(instruction=["Add ", "Say"], input=["2, 2", ""], output=[" 4 ", "hi"]).set_index(pd.Index([7, 3]))
    made = examples(frame, ALPACA)
    assert made["prompt"].tolist() == ["Add \n2, 2\n\n### Response:\n", "Say\n\n\n### Response:\n"]
    assert made["completion"].tolist() == [" 4 ", "hi"]


@pytest.mark.parametrize(
    ("template", "columns", "text"),
    [
        ("{{set}} {a b.c[0]:d}!", ["a b.c[0]:d"], "{set} x!"),
        ("{a b.c[0]:d}{{{a b.c[0]:d}}}", ["a b.c[0]:d"], "x{x}"),
        ("{é}{}", ["é", ""], "yz"),
        ("a b.c[0]:d", ["a b.c[0]:d"], "x"),
        ("{{é}}", ["{{é}}"], "braces"),
        ("self", ["self"], "own"),
    ],
)
def test_any_column_may_stand_in_braces_and_doubled_braces_are_the_text_s(
    template: str, columns: list[str], text: str
) -> None:
    options = CompletionOptions(prompt=template, completion="answer")
    frame = raw(**{"a b.c[0]:d": ["x"], "é": ["y"], "": ["z"], "{{é}}": ["braces"], "self": ["own"], "answer": ["1"]})
    assert completion.columns(options)[0] == [*columns, "answer"]
    assert examples(frame, options)["prompt"].tolist() == [text]


@pytest.mark.parametrize(
    ("template", "said"), [("{a} }", "character 5"), ("{{a} {b}", "character 4"), ("{a\x07}{b}{", "no partner")]
)
def test_a_brace_without_a_partner_is_named(template: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{said}.*is written twice"):
        completion.columns(CompletionOptions(prompt=template, completion="answer"))


@pytest.mark.parametrize("character", ["\x07", "\ufffd", "\ud800"])
def test_control_characters_of_a_template_are_named(character: str) -> None:
    with pytest.raises(UserError, match=r'has control characters.* a line break is "\\n" and a tab "\\t"'):
        completion.columns(CompletionOptions(prompt=f"{character}{{a}}", completion="answer"))


def test_numbers_are_written_as_json_writes_them() -> None:
    numbers = [7, 2.5, 1.0, 1e22, -0.0, 10**25, -(10**400), True, False]
    made = examples(raw(question=["q"] * len(numbers), answer=numbers), PLAIN)
    assert made["completion"].tolist() == [f" {json.dumps(number)}" for number in numbers]
    truths = pd.DataFrame({"question": ["q", "r"], "answer": [True, False]})
    assert examples(truths, PLAIN)["completion"].tolist() == [" true", " false"]
    # Columns of one type, as pandas holds them.
    typed = pd.DataFrame({"question": [1, 2], "answer": [0.5, 2.0]})
    assert examples(typed, PLAIN)["completion"].tolist() == [" 0.5", " 2.0"]


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (None, "is given"),
        (float("nan"), "is given"),
        (["a"], "is text or a finite number"),
        ({"a": "b"}, "is text or a finite number"),
        (float("inf"), "is text or a finite number"),
        (" \n", "is not empty"),
        ("a\x00", "has no control characters"),
        ("a\ufffd", "has no lost characters (U+FFFD)"),
        (NotUnicode("\ud800"), "is UTF-8"),
        ("a" * 1_000_001, "is at most 1,000,000 characters"),
    ],
)
@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_bad_value_is_found_with_its_check(column: str, value: Any, check: str) -> None:
    frame = raw(question=["a", "b", "c"], answer=["d", 5, "f"])
    frame.at[1, column] = value
    assert found(frame, PLAIN) == {(check, 1)}


def test_of_several_columns_of_a_template_one_must_have_text() -> None:
    frame = raw(instruction=["a", "", "  ", None], input=["", "b", "", "c"], output=["x", "", "y", "z"])
    assert found(frame, ALPACA) == {("is not empty", 1), ("prompt is not empty", 2)}
    # CSV cannot tell what is empty from what is missing.
    frame.loc[0, "input"] = None
    assert examples(frame.iloc[[0, 3]], ALPACA)["prompt"].tolist() == [
        "a\n\n\n### Response:\n",
        "\nc\n\n### Response:\n",
    ]


def test_paths_lead_into_objects_and_lists() -> None:
    frame = raw(
        data=[{"q": "Who?", "a": {"text": ["I", "you"]}}, {"q": "What?", "a": {"text": []}}, "no object"],
        answer=["x", "y", "z"],
    )
    options = CompletionOptions(prompt="{data.q} Say:", completion="data.a.text.0")
    assert completion.columns(options) == [["data.q", "data.a.text.0"], ["data"]]
    assert found(frame, options) == {("is given", 1), ("is given", 2)}
    made = examples(frame.iloc[:1], options)
    assert made[["prompt", "completion"]].values.tolist() == [["Who? Say:", " I"]]
    # A column of that very name goes before a path.
    named = pd.DataFrame({"data.q": ["own"], "data": [{"q": "inner"}], "answer": ["x"]})
    own = CompletionOptions(prompt="data.q", completion="answer")
    assert examples(named, own)["prompt"].tolist() == ["own"]


def test_texts_that_are_long_together_are_prepared() -> None:
    made = examples(raw(instruction=["a" * 900_000], input=["b" * 900_000], output=["c"]), ALPACA)
    assert len(made["prompt"][0]) > 1_800_000


def talk(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


TALK = talk(
    ("system", "Be brief."), ("user", "Two and two?"), ("assistant", "Four."), ("user", "3?"), ("assistant", "7")
)


def test_a_conversation_keeps_its_turns(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " Hello\n"}]
    extra = [{"role": "user", "content": "Hi", "name": "Bob"}, {"role": "assistant", "content": "Bye", "weight": 1}]
    made = examples(raw(talk=[TALK, shared, extra]), CHAT)
    assert list(made) == ["prompt", "completion", "messages"]
    assert made["prompt"].tolist() == [
        "System: Be brief.\nUser: Two and two?\nAssistant: Four.\nUser: 3?",
        "User: Hi",
        "User: Hi",
    ]
    assert made["completion"].tolist() == ["7", " Hello\n", "Bye"]
    assert made["messages"].tolist() == [
        TALK,
        talk(("user", "Hi"), ("assistant", " Hello\n")),
        talk(("user", "Hi"), ("assistant", "Bye")),
    ]
    with_ids(made).to_parquet(tmp_path / "rows.parquet")
    again = pd.read_parquet(tmp_path / "rows.parquet")
    completion.prepared_schema().validate(again, lazy=True)
    assert list(again["messages"][0]) == TALK
    assert completion.columns(CHAT) == [["talk"]]


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (None, "is given"),
        ("text", completion.TURNS),
        ({"role": "user", "content": "x"}, completion.TURNS),
        ([], completion.TURNS),
        (["text", "more"], completion.TURNS),
        ([{"role": "user"}], completion.TURNS),
        ([{"from": "human", "content": "x"}], completion.TURNS),
        (talk(("user", "x"), ("tool", "y"), ("assistant", "z")), completion.ROLE),
        (talk((["user"], "x"), ("assistant", "z")), completion.ROLE),
        ([{"from": "bing", "value": "x"}], completion.ROLE),
        (talk(("system", "x"), ("user", "y")), completion.ANSWERED),
        (talk(("assistant", "x"), ("user", "y"), ("assistant", "z")), completion.FIRST),
        (talk(("user", "x"), ("assistant", "y"), ("user", "z")), completion.LAST),
        (talk(("user", None), ("assistant", "y")), "content is given"),
        (talk(("user", [{"type": "text", "text": "x"}]), ("assistant", "y")), "content is text"),
        (talk(("user", 5), ("assistant", "y")), "content is text"),
        (talk(("user", "x"), ("assistant", " ")), "content is not empty"),
        (talk(("user", "x"), ("assistant", "y\x00")), "content has no control characters"),
        (talk(("user", NotUnicode("\ud800")), ("assistant", "y")), "content is UTF-8"),
    ],
)
def test_a_bad_conversation_is_found_with_its_check(value: Any, check: str) -> None:
    assert found(raw(talk=[TALK, value, TALK]), CHAT) == {(check, 1)}


def test_what_is_wrong_with_a_conversation_is_shown() -> None:
    shown = completion.normalise(raw(talk=[talk(("user", "x"), ("tool", "y")), talk(("user", "x"))]), CHAT)["talk"]
    assert [str(wrong) for wrong in shown] == ["tool", "user"]


def test_near_copies_are_found_by_what_is_a_row_s_own() -> None:
    frame = completion.normalise(raw(instruction=["Add", "Say"], input=[2, ""], output=["4", "hi"]), ALPACA)
    assert completion.identity(frame, ALPACA).tolist() == ["Add\n2\n4", "Say\n\nhi"]
    talks = completion.normalise(raw(talk=[TALK]), CHAT)
    assert completion.identity(talks, CHAT).tolist() == ["Two and two?\nFour.\n3?\n7"]


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("The cat sat", "a cat sat.", 1.0),
        ("cat sat down", "the cat", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("cat cat", "cat", 2 * 0.5 * 1 / 1.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "The.", 1.0),
        ("theatre", "the atre", 0.0),
        ("well-known", "wellknown", 1.0),
    ],
)
def test_token_f1_is_squad_s(answer: str, gold: str, score: float) -> None:
    assert completion.token_f1(answer, gold) == pytest.approx(score)
    assert completion.token_f1(gold, answer) == pytest.approx(score)


def test_exact_match_collapses_white_space_and_nothing_else() -> None:
    assert completion.right(" a  b\n", "a b")
    assert not completion.right("A b", "a b")
    assert not completion.right("ab", "a b")
    assert not completion.right("a b.", "a b")


@pytest.mark.parametrize("form", ["pair", "chat"])
def test_scores_of_hand_made_answers(form: str) -> None:
    said = {"q0": " Four ", "q1": "the four", "q2": "five"}
    if form == "pair":
        made = examples(raw(question=list(said), answer=["Four", "Four", "Four"]), PLAIN)
    else:
        made = examples(raw(talk=[talk(("user", q), ("assistant", "Four")) for q in said]), CHAT)
    lm = StandIn(said.__getitem__)
    predictions = completion.predict(lm, with_ids(made), EVALUATION)  # type: ignore[arg-type]
    assert lm.calls == ["generate 16" if form == "pair" else "chat 16"]
    assert predictions.to_dict("list") == {
        "example_id": ["row-0", "row-1", "row-2"],
        "prediction": ["Four", "the four", "five"],
        "completion": ["Four"] * 3,
        "exact_match": [1.0, 0.0, 0.0],
        "token_f1": [1.0, 1.0, 0.0],
    }
    scores = completion.metrics(predictions)
    third = pytest.approx(1 / 3)
    assert scores == {
        "primary": third,
        "primary_name": "exact_match",
        "n": 3,
        "left_out": {},
        "exact_match": third,
        "token_f1": pytest.approx(2 / 3),
    }
