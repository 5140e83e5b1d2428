"""A user's own prompts and answers, or conversations: scored by exact match and by the answer's words."""

import json
import re
import string
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf.tasks.columns import as_list, given, is_missing, joined, prepared, text
from molf.tasks.generic import Template, Wrong, flaws, no_wrong, replaced, schema, ways, with_paths, worded

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.blocks import CompletionOptions
    from molf.config import Evaluation
    from molf.evaluation import LanguageModel

NAME = "completion"
PRIMARY = "exact_match"
COMPONENTS = ["exact_match"]
BINARY = "exact_match"
# ShareGPT's names beside the chat templates'.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TURNS = "is a list of turns, each with role and content"
ROLE = "roles are system, user or assistant"
ANSWERED = "has a turn of the assistant"
LAST = "the assistant has the last turn"
FIRST = "the assistant has not the first turn"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def _templates(options: "CompletionOptions") -> dict[str, Template]:
    """Those of prompt and completion; of conversations none."""
    written = {"prompt": options.prompt, "completion": options.completion}
    return {made: Template.parse(template) for made, template in written.items() if template is not None}


def _columns(options: "CompletionOptions") -> list[str]:
    return list(dict.fromkeys(name for template in _templates(options).values() for name in template.columns))


def columns(options: "CompletionOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists."""
    return ways([options.messages] if options.messages is not None else _columns(options))


def asked(options: "CompletionOptions") -> list[list[str]]:
    """The columns of the prompt; of conversations their own, the last turn of which may lack."""
    return columns(options) if options.messages is not None else ways(_templates(options)["prompt"].columns)


def raw_schema(options: "CompletionOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows: texts of templates, or conversations."""
    return _schema(_templates(options), options, [ANSWERED, FIRST, LAST])


def question_schema(options: "CompletionOptions") -> "pa.DataFrameSchema":
    own = {made: template for made, template in _templates(options).items() if made == "prompt"}
    return _schema(own, options, [FIRST])


def _schema(templates: dict[str, Template], options: "CompletionOptions", turns: list[str]) -> "pa.DataFrameSchema":
    """Of templates, or of conversations with these checks of the order of their turns."""
    import pandera.pandas as pa

    if options.messages is None:
        texts, rows = schema(templates)
        return pa.DataFrameSchema(texts, checks=rows)
    names = [TURNS, ROLE, *(f"content {check.name}" for check in text().checks), *turns]
    return pa.DataFrameSchema({options.messages: pa.Column(nullable=True, checks=[given(), *no_wrong(*names)])})


def tolerated(options: "CompletionOptions") -> frozenset[str]:
    return frozenset()


def normalise(frame: pd.DataFrame, options: "CompletionOptions") -> pd.DataFrame:
    """Numbers, true and false become text, as JSON writes them; conversations lists of {role, content}, or `Wrong`."""
    frame = with_paths(frame, columns(options)[0])
    if options.messages is None:
        return replaced(frame, {name: worded(_truths(frame[name])) for name in _columns(options) if name in frame})
    talks = [value if is_missing(value) else _turns(value) for value in frame[options.messages]]
    # All texts of all conversations at once.
    contents = [(i, turn["content"]) for i, talk in enumerate(talks) for turn in _whole(talk)]
    found = flaws([content for _, content in contents], text())
    for (i, content), flaw in zip(contents, found, strict=True):
        if flaw is not None and _whole(talks[i]):
            talks[i] = Wrong(f"content {flaw}", content)
    return replaced(frame, {options.messages: pd.Series(talks, index=frame.index, dtype=object)})


def _whole(talk: Any) -> list[dict[str, Any]]:
    """The turns of a conversation, that of one that lacks no more than the answer included; else none."""
    return list(talk.kept) if isinstance(talk, Wrong) else talk if isinstance(talk, list) else []


def _truths(values: pd.Series) -> pd.Series:
    """A column with true and false as text, which are the answers of many sets; all else as it is."""
    if not any(isinstance(value, bool | np.bool_) for value in values):
        return values
    cells = [json.dumps(bool(value)) if isinstance(value, bool | np.bool_) else value for value in values]
    return pd.Series(cells, index=values.index, dtype=object)


def _turns(value: Any) -> list[dict[str, Any]] | Wrong:
    """A conversation as {role, content} each, its contents not yet looked at."""
    turns = []
    for turn in [] if isinstance(value, dict) else as_list(value):
        if not isinstance(turn, dict):
            return Wrong(TURNS, value)
        if "role" in turn and "content" in turn:
            said, content = turn["role"], turn["content"]
        elif "from" in turn and "value" in turn:
            said, content = turn["from"], turn["value"]
        else:
            return Wrong(TURNS, turn)
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            return Wrong(ROLE, said)
        turns.append({"role": role, "content": content})
    roles = [turn["role"] for turn in turns]
    if not turns:
        return Wrong(TURNS, value)
    if "assistant" not in roles:
        return Wrong(ANSWERED, ", ".join(roles), turns)
    if roles[0] == "assistant":
        return Wrong(FIRST, ", ".join(roles))
    if roles[-1] != "assistant":
        return Wrong(LAST, ", ".join(roles), turns)
    return turns


def prepared_schema() -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return prepared(messages=pa.Column(required=False))


def hint(failures: pd.DataFrame, options: "CompletionOptions") -> str | None:
    return None


def questions(frame: pd.DataFrame, options: "CompletionOptions") -> pd.DataFrame:
    """Of a conversation all before the answer that ends it, or all of it; the prompt is then to be read by people."""
    if options.messages is None:
        return pd.DataFrame({"prompt": _templates(options)["prompt"].fill(frame)}, index=frame.index)
    talks = [talk.kept if isinstance(talk, Wrong) else talk[:-1] for talk in frame[options.messages]]
    prompts = ["\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in talk) for talk in talks]
    messages = pd.Series(talks, index=frame.index, dtype=object)
    return pd.DataFrame({"prompt": prompts, "messages": messages}, index=frame.index)


def to_examples(frame: pd.DataFrame, options: "CompletionOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt and completion; of conversations also messages; the index stays.

    A column alone is stripped, and the completion starts with one space, so that the prompt ends without one. What a
    template makes is taken as it is. Of a conversation the prompt is all before the last turn, to be read by people.
    """
    prompts = questions(frame, options)["prompt"]
    if options.messages is None:
        template = _templates(options)["completion"]
        answers = template.fill(frame)
        if template.whole:
            answers = [f" {answer}" for answer in answers]
        return pd.DataFrame({"prompt": prompts, "completion": answers}, index=frame.index)
    talks = frame[options.messages].tolist()
    return pd.DataFrame(
        {"prompt": prompts, "completion": [talk[-1]["content"] for talk in talks], "messages": talks},
        index=frame.index,
    )


def identity(frame: pd.DataFrame, options: "CompletionOptions") -> pd.Series:
    """The texts of the columns; of a conversation what the user and the assistant say."""
    if options.messages is None:
        return joined(frame, _columns(options))
    talks = frame[options.messages]
    said = ["\n".join(turn["content"] for turn in talk if turn["role"] != "system") for talk in talks]
    return pd.Series(said, index=frame.index, dtype=object)


def combine(means: dict[str, float]) -> float:
    return means["exact_match"]


def predict(lm: "LanguageModel", examples: pd.DataFrame, evaluation: "Evaluation") -> pd.DataFrame:
    """Greedy answers, and how they match; of a conversation the last turn, given all before it.

    Returns:
        example_id, prediction, completion (the right one), both stripped; exact_match (0 or 1), token_f1 (0 to 1).
    """
    longest = evaluation.max_new_tokens.completion
    if "messages" in examples:
        said = lm.chat([as_list(talk)[:-1] for talk in examples["messages"]], longest)
    else:
        said = lm.generate(examples["prompt"].tolist(), longest)
    pairs = [(answer.strip(), gold.strip()) for answer, gold in zip(said, examples["completion"], strict=True)]
    return pd.DataFrame(
        {
            "example_id": examples["example_id"].to_numpy(),
            "prediction": [answer for answer, _ in pairs],
            "completion": [gold for _, gold in pairs],
            "exact_match": [float(right(*pair)) for pair in pairs],
            "token_f1": [token_f1(*pair) for pair in pairs],
        }
    )


def right(answer: str, gold: str) -> bool:
    """Whether the texts are equal; white space at the ends does not count, and any other counts as one space."""
    return answer.split() == gold.split()


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of the shares of the answer's words that are right and of the right words that it has.

    As in SQuAD (Rajpurkar et al. 2016): in lower case, without ASCII punctuation and then without a, an, the; words are
    what white space separates, each counted as often as it stands. Where one of the two has no word left, 1 if neither
    has, else 0 (Rajpurkar et al. 2018).
    """
    said, right = _words(answer), _words(gold)
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """Means over all examples."""
    means = {name: float(predictions[name].mean()) for name in ("exact_match", "token_f1")}
    return {
        "primary": combine(means),
        "primary_name": PRIMARY,
        "n": len(predictions),
        "left_out": {},
        **means,
    }
