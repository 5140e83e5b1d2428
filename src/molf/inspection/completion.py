"""Whether rows are prompts and their answers, and how a prompt is written from columns."""

import re
from collections.abc import Iterable

from molf.inspection.choice import option_columns
from molf.inspection.forms import (
    ANSWERS,
    ASKED,
    CONTEXTS,
    OPTION_LISTS,
    SUBJECTS,
    WRONG,
    Guess,
    asked_columns,
    at,
    holds_letters,
    listed,
    ordered,
    plain,
    title,
    usable,
)
from molf.inspection.profile import LIST, NUMBER, OBJECT, TEXT, TRUTH, WHOLE, Profile


def completion(found: Profile) -> Guess | None:
    for name in ordered(found.top, ["translation"]):
        sides = [path for path in found.columns if path.startswith(f"{name}.")]
        if found.columns[name].mostly(OBJECT) and len(sides) == 2:
            return _written(found, sides[:1], sides[1], [f"{listed(sides)} are a text in two languages"])
    for answer, why in _answer_columns(found):
        taken = {answer, answer.split(".")[0]}
        names, reasons = asked_columns(found, taken, pairs=True)
        options = [name for name in ordered(found.top, OPTION_LISTS) if found.columns[name].mostly(TEXT)]
        if names and options and usable(options[0]):
            names.append(options[0])
            reasons.append(f"`{options[0]}` is one text with the options; kind: choice would need a list or columns")
        if names:
            return _written(found, names, answer, [why, *reasons])
    # No name is known: a column of few labels beside a text, or two texts in their order.
    free = [name for name, column in found.top.items() if column.is_free_text and usable(name)]
    free = [name for name in free if not WRONG.match(plain(name)) and plain(name) not in OPTION_LISTS]
    labels = [
        name
        for name, column in found.top.items()
        if usable(name) and column.few is not None and 2 <= len(column.few) <= 50 and column.given >= 20
        if re.sub(r"\d+$", "", plain(name)) not in SUBJECTS
        if len(column.few) <= column.given / 5 and column.mostly(TEXT, WHOLE, TRUTH)
    ]
    if len(free) >= 1 and len(labels) == 1:
        why = f"`{labels[0]}` has {len(found.columns[labels[0]].few or ())} values beside the text of `{free[0]}`"
        return _written(found, free[:1], labels[0], [f"{why}: a label (no name is known, look twice)"])
    if len(free) == 2 and plain(free[1]) not in {*ASKED, *CONTEXTS}:
        why = f"`{free[0]}` and `{free[1]}` are the only texts, taken in their order (no name is known, look twice)"
        return _written(found, free[:1], free[1], [why])
    return None


def _answer_columns(found: Profile) -> Iterable[tuple[str, str]]:
    """Columns, or paths, that may hold the answer, by their names; and why."""
    for name in ordered(found.columns, ANSWERS):
        column = found.columns[name]
        if column.given < column.rows / 2:
            continue
        if not usable(name) or (plain(name) == "query" and "question" not in map(plain, found.top)):
            continue
        if column.mostly(TEXT, WHOLE, NUMBER, TRUTH) and (column.few is None or len(column.few) > 1):
            yield name, f"`{name}` is named as an answer is"
        elif holds_letters(found, name) and next(iter(option_columns(found)), None):
            continue  # of several right options, which `refusal` tells
        elif column.mostly(LIST) and column.items[TEXT] >= 0.9 * column.items.total() and column.lengths:
            several = sum(count for size, count in column.lengths.items() if size > 1)
            of = f"; {several / column.given:.0%} of the rows have several" if several else ""
            yield f"{name}.0", f"`{name}` holds lists of answers, of which the first is taken{of}"
        elif column.mostly(LIST) and column.keys["text"] > 0.9 * column.items[OBJECT] > 0:  # of SQuAD's own files
            yield f"{name}.0.text", f"`{name}` holds lists of answers, of which the first is taken"
        elif column.mostly(OBJECT):
            fields = [
                f"{name}.{key}"
                for key in ("text", "value", "spans", "answer", "normalized_value")
                if f"{name}.{key}" in found.columns
            ]
            for inner in fields:
                lists = found.columns[inner].mostly(LIST)
                yield (
                    inner + ".0" * lists,
                    f"`{inner}` holds the {'answers, of which the first is taken' * lists}" + ("answer" * (not lists)),
                )
    for name in ordered(found.top, ["answer0", "answer1", "answers0", "response0", "response1", "output0", "output1"]):
        if found.columns[name].mostly(TEXT, WHOLE, NUMBER, TRUTH) and usable(name):
            yield name, f"`{name}` is the first of several answers"
    for name in ("answers_spans.spans",):  # DROP's
        if name in found.columns:
            yield f"{name}.0", f"`{name}` holds lists of answers, of which the first is taken"


def _written(found: Profile, names: list[str], answer: str, reasons: list[str]) -> Guess:
    """A completion's options from the columns of prompt and answer."""
    base = re.sub(r"\.0(\.text)?$", "", answer)
    column = found.columns[base]
    label = column.few is not None and len(column.few) <= 50 and column.mean < 40 and not answer.endswith(".0")
    leading = sum(isinstance(text, str) and text[:1].isspace() for text in (at(r, answer) for r in found.sample))
    prompt, cue = names[0], title("answer" if base.startswith("answers") else base.split(".")[0])
    if len(names) > 1:
        # Options have letters of their own.
        lines = [f"{title(name)}: {{{name}}}" if plain(name) not in OPTION_LISTS else f"{{{name}}}" for name in names]
        prompt = "\n".join([*lines, f"{cue}:"])
    elif label and found.columns[names[0]].is_free_text and plain(names[0]) not in ("prompt", "instruction"):
        # Without it the end of a text does not tell that a label is asked for.
        prompt = f"{{{names[0]}}}\n{cue}:"
    guess = Guess("completion", {"prompt": prompt, "completion": answer}, reasons, base)
    if leading > 0.5 * len(found.sample) and len(names) == 1:
        guess.options = {"prompt": f"{{{names[0]}}}" if prompt == names[0] else prompt, "completion": f"{{{answer}}}"}
        guess.notes.append(
            f"most of `{answer}` begin with white space, as code that goes on: in braces nothing is stripped from it, "
            "and no space is put before it"
        )
    if label and column.is_whole:
        guess.notes.append(
            f"`{answer}` holds numbers: a model learns words such as 'positive' sooner; write them into the file if "
            "you know what the numbers mean"
        )
    elif not label and column.mean > 150:
        guess.notes.append(
            f"answers have {column.mean:,.0f} characters on average: exact_match will hardly ever be 1, token_f1 tells "
            "more"
        )
    texts = [str(at(record, base)) for record in found.sample]
    queries = sum(text.lstrip()[:7].upper() in ("SELECT ", "INSERT ", "UPDATE ", "DELETE ") for text in texts)
    if queries > 0.5 * len(texts):
        guess.notes.append(
            "the answers are SQL: as kind: sql they are judged by running them; that needs the columns sql_prompt, "
            "sql_context (CREATE TABLE ...) and sql: rename yours"
        )
    elif plain(answer) == "chosen":
        guess.notes.append("`chosen` is learnt and `rejected` left out: no preference is trained")
    elif any(re.match("distractor|incorrect", plain(name)) for name in found.columns):
        guess.notes.append(
            "the wrong answers beside it are not used: kind: choice needs options in a fixed order, and here the right "
            "one would always stand in the same place; shuffle them into one column of lists first"
        )
    return guess
