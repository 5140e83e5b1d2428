"""A user's own questions, each with two to 26 options: scored by the likeliest letter."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.tasks import letters
from molf.tasks.columns import (
    IS_UNICODE,
    NotUnicode,
    as_list,
    as_texts,
    distinct,
    given,
    is_missing,
    joined,
    missing,
    of_rows,
    prepared,
    text,
)
from molf.tasks.generic import (
    IS_WORDED,
    Template,
    Wrong,
    as_worded,
    flaws,
    no_wrong,
    replaced,
    schema,
    ways,
    with_paths,
    worded,
    words,
)
from molf.tasks.letters import LETTERS

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.blocks import ChoiceOptions
    from molf.config import Evaluation
    from molf.evaluation import LanguageModel

NAME = "choice"
PRIMARY = "accuracy"
COMPONENTS = ["accuracy"]
BINARY = "accuracy"
LIST = f"is a list of 2 to {len(LETTERS)} options"
DIFFER = "options differ"
GAP = "no option is missing before another"
FORM = {"letter": "is a letter", "index0": "is a whole number", "index1": "is a whole number", "text": IS_WORDED}
INSIDE = "is one of the row's options"
LETTER = re.compile(r"\s*[(\[]?([A-Za-z])[)\]]?[.:]?\s*")  # "A", "a", "A.", "(A)"
WHOLE = re.compile(r"\s*[+-]?[0-9]{1,15}(\.0*)?\s*")
SAYS = {"index0": "count from 0", "index1": "count from 1", "letter": "hold letters", "text": "hold options"}


def columns(options: "ChoiceOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists. Of the options' columns only the first two must."""
    own = [options.options] if isinstance(options.options, str) else options.options[:2]
    subject = [] if options.subject is None else [options.subject]
    return ways([*Template.parse(options.question).columns, *own, options.answer, *subject])


def asked(options: "ChoiceOptions") -> list[list[str]]:
    own = [options.options] if isinstance(options.options, str) else options.options[:2]
    return ways([*Template.parse(options.question).columns, *own])


def _answer(options: "ChoiceOptions") -> str:
    """The normalised column of the answers' letters: the answers' own, unless that is also asked or an option."""
    asked = [*Template.parse(options.question).columns, options.subject]
    asked += [options.options] if isinstance(options.options, str) else options.options
    return f"{options.answer} (as the answer)" if options.answer in asked else options.answer


def raw_schema(options: "ChoiceOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows: the question's texts, the options, and whether the answer is one of them."""
    import pandera.pandas as pa

    schema = question_schema(options)
    texts = dict(schema.columns)
    answers = no_wrong(IS_UNICODE, FORM[options.answer_is], INSIDE)
    if options.subject is not None:
        texts[options.subject] = texts.get(options.subject, words(optional=True))
    texts[_answer(options)] = pa.Column(nullable=True, checks=[given(), *answers])
    return pa.DataFrameSchema(texts, checks=schema.checks)


def question_schema(options: "ChoiceOptions") -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    texts, rows = schema({"question": Template.parse(options.question)})
    if isinstance(options.options, str):
        names = [LIST, *(f"option {check.name}" for check in words().checks), DIFFER]
        texts[options.options] = pa.Column(nullable=True, checks=[given(), *no_wrong(*names)])
    else:
        for i, name in enumerate(options.options):
            texts[name] = words(optional=i > 1, required=i < 2)
        rows += [
            of_rows(partial(_no_gap, options=options), GAP),
            of_rows(partial(_all_differ, options=options), DIFFER),
        ]
    return pa.DataFrameSchema(texts, checks=rows)


def tolerated(options: "ChoiceOptions") -> frozenset[str]:
    return frozenset()


def normalise(frame: pd.DataFrame, options: "ChoiceOptions") -> pd.DataFrame:
    """Numbers become text; lists of options lists of stripped text, or `Wrong`; answers letters, or `Wrong`.

    An answer stays as it is where the row's options are no good, which other checks say.
    """
    more = [] if isinstance(options.options, str) else options.options
    frame = with_paths(frame, [*columns(options)[0], *more])
    texts = list(Template.parse(options.question).columns)
    lists = {}
    if isinstance(options.options, str):
        lists = {options.options: _lists(frame[options.options])}
    else:
        texts += [name for name in options.options if name in frame]
    if options.subject is not None and options.subject not in lists:
        texts.append(options.subject)
    rows = replaced(frame, {**{name: worded(frame[name]) for name in texts if name in frame}, **lists})
    given_answers = frame[options.answer] if options.answer in frame else [None] * len(frame)
    answers = [
        value if is_missing(value) or len(own) < 2 or not _differ(own) else _letter(value, own, options.answer_is)
        for value, own in zip(given_answers, _options(rows, options), strict=True)
    ]
    return replaced(rows, {_answer(options): pd.Series(answers, index=frame.index, dtype=object)})


def _lists(values: pd.Series) -> pd.Series:
    """Lists of options as lists of stripped text; what is missing stays, what is no such list is `Wrong`."""
    found: list[Any] = []
    for value in values:
        items = as_list(value)
        if is_missing(value):
            found.append(None)
        elif 2 <= len(items) <= len(LETTERS):
            found.append([as_worded(item) for item in items])
        else:
            found.append(Wrong(LIST, value))
    # All options of all rows at once.
    every = [(i, item) for i, items in enumerate(found) if isinstance(items, list) for item in items]
    for (i, item), flaw in zip(every, flaws([item for _, item in every], words()), strict=True):
        if flaw is not None and isinstance(found[i], list):
            found[i] = Wrong(f"option {flaw}", item)
    for i, items in enumerate(found):
        if isinstance(items, list):
            found[i] = [item.strip() for item in items]
            if not _differ(found[i]):
                found[i] = Wrong(DIFFER, items)
    return pd.Series(found, index=values.index, dtype=object)


def _columns(frame: pd.DataFrame, options: "ChoiceOptions") -> list[pd.Series]:
    """The columns of options, in their order; one that is not there has nothing in it."""
    nothing = pd.Series(None, index=frame.index, dtype=object)
    return [frame.get(name, nothing) for name in options.options]


def _no_gap(frame: pd.DataFrame, options: "ChoiceOptions") -> np.ndarray:
    """Whether nothing is missing before something that is there; of the first two the columns' checks tell."""
    there = ~np.column_stack([missing(column) for column in _columns(frame, options)[1:]])
    return ~(there[:, 1:] & ~there[:, :-1]).any(axis=1)


def _all_differ(frame: pd.DataFrame, options: "ChoiceOptions") -> np.ndarray:
    """Whether no two texts of a row's options are equal, spaces around them aside."""
    return distinct([as_texts(column) for column in _columns(frame, options)])


def _options(frame: pd.DataFrame, options: "ChoiceOptions") -> list[list[str]]:
    """Each normalised row's options; none where they are no good."""
    if isinstance(options.options, str):
        return [value if isinstance(value, list) else [] for value in frame[options.options]]
    columns = _columns(frame, options)
    rows: Iterable[Sequence[Any]] = zip(*columns, strict=True)
    if any(pd.api.types.infer_dtype(column, skipna=False) != "string" for column in columns):
        rows = ([cell for cell in row if not is_missing(cell)] for row in rows)
        rows = (row if all(isinstance(cell, str) for cell in row) else [] for row in rows)
    return [[cell.strip() for cell in row] for row in rows]


def _differ(own: list[str]) -> bool:
    return len(set(own)) == len(own)


def _letter(value: Any, own: list[str], kind: str) -> str | Wrong:
    """An answer as the letter of one of a row's options."""
    if isinstance(value, NotUnicode):
        return Wrong(IS_UNICODE, value)
    written = as_worded(value)
    if not isinstance(written, str):
        return Wrong(FORM[kind], value)
    if kind == "text":
        place = own.index(written.strip()) if written.strip() in own else -1
    elif kind == "letter":
        match = LETTER.fullmatch(written)
        if not match:
            return Wrong(FORM[kind], value)
        place = LETTERS.index(match.group(1).upper())
    else:
        if not WHOLE.fullmatch(written):
            return Wrong(FORM[kind], value)
        place = int(float(written)) - (kind == "index1")
    return LETTERS[place] if 0 <= place < len(own) else Wrong(INSIDE, value)


def prepared_schema() -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return prepared(
        answer=pa.Column(str, pa.Check.isin(list(LETTERS))),
        subject=text(optional=True),
        options=pa.Column("int64", pa.Check.in_range(2, len(LETTERS))),
    )


def hint(failures: pd.DataFrame, options: "ChoiceOptions") -> str | None:
    """Which `answer_is` the rejected answers speak for, or a column of options that no row has."""
    kind, values = options.answer_is, set(failures.loc[failures["column"] == _answer(options), "value"])
    if not values:
        return None
    other = None
    if all(map(WHOLE.fullmatch, values)):
        numbers = {int(float(value)) for value in values}
        # Counted from the other end, the wrong ones are just those that lie outside.
        if kind == "index1":
            other = "index0" if numbers == {0} else None
        elif kind == "index0":
            most = len(LETTERS) if isinstance(options.options, str) else len(options.options)
            other = "index1" if numbers <= set(range(2, most + 1)) else None
        else:
            other = "index0" if 0 in numbers else "index1"
    elif all(map(LETTER.fullmatch, values)):
        other = None if kind == "letter" else "letter"
    elif kind != "text" and not any(LETTER.fullmatch(value) or WHOLE.fullmatch(value) for value in values):
        other = "text"
    if other is not None:
        off = ", else every answer is off by one" if {kind, other} == {"index0", "index1"} else ""
        return f"`{options.answer}` seems to {SAYS[other]}: set options.answer_is to {other}{off}"
    absent = [] if isinstance(options.options, str) else _absent(failures, options.options)
    if not absent:
        return None
    return f"no rejected row has {', '.join(absent)}, which options.options names: is it spelled so?"


def _absent(failures: pd.DataFrame, names: list[str]) -> list[str]:
    """Those of the columns that no rejected row has."""
    there: set[str] = set()
    for record in failures["record"]:
        try:
            there.update(json.loads(record))
        except ValueError:  # a long one, of which the beginning is kept
            return []
    return [name for name in names if name not in there]


def questions(frame: pd.DataFrame, options: "ChoiceOptions") -> pd.DataFrame:
    own = _options(frame, options)
    texts = Template.parse(options.question).fill(frame)
    return pd.DataFrame(
        {
            "prompt": [letters.prompt(text, row) for text, row in zip(texts, own, strict=True)],
            "choices": pd.Series(own, index=frame.index, dtype=object),
        },
        index=frame.index,
    )


def to_examples(frame: pd.DataFrame, options: "ChoiceOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt, completion, answer (letter), subject (or None), options (their number)."""
    asked = questions(frame, options)
    answers = frame[_answer(options)].tolist()
    subjects = [None] * len(frame) if options.subject is None else frame[options.subject]
    return pd.DataFrame(
        {
            "prompt": asked["prompt"],
            "completion": [letters.completion(answer) for answer in answers],
            "answer": answers,
            "subject": pd.Series(
                [subject.strip() if isinstance(subject, str) else None for subject in subjects],
                index=frame.index,
                dtype=str,
            ),
            "options": np.array([len(row) for row in asked["choices"]], dtype=np.int64),
        },
        index=frame.index,
    )


def identity(frame: pd.DataFrame, options: "ChoiceOptions") -> pd.Series:
    """The question's own texts and its options."""
    questions = joined(frame, list(Template.parse(options.question).columns))
    rows = zip(questions, _options(frame, options), strict=True)
    return pd.Series(["\n".join([asked, *own]) for asked, own in rows], index=frame.index, dtype=object)


def combine(means: dict[str, float]) -> float:
    return means["accuracy"]


def predict(lm: "LanguageModel", examples: pd.DataFrame, evaluation: "Evaluation") -> pd.DataFrame:
    """The letters that `letters.predict` finds, each example's among its own."""
    return letters.predict(lm, examples, examples["options"].tolist(), evaluation.max_new_tokens.choice)


def right(answer: str, gold: str) -> bool:
    return answer == gold


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    return letters.metrics(predictions)
