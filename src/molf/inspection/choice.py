"""Whether rows are questions with options, and in which columns these and the right one lie."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from molf.inspection.forms import (
    OPTION_LISTS,
    OPTION_PREFIXES,
    RIGHT,
    SUBJECTS,
    WHOLE_TEXT,
    Guess,
    asked_columns,
    at,
    listed,
    number,
    ordered,
    plain,
)
from molf.inspection.profile import LIST, NUMBER, OBJECT, TEXT, WHOLE, Column, Profile
from molf.tasks.choice import LETTER


def choice(found: Profile) -> Guess | None:
    for options, named, why in option_columns(found):
        own = options if isinstance(options, list) else [options]
        taken = {*own, *(re.sub(r"(\.\*)?\.[^.]*$", "", name) for name in own)}
        names = [name for name in ordered(found.columns, RIGHT) if name not in taken]
        names += [name for name in found.top if name not in names and name not in taken]
        for name in names:
            answer = name + ".0" * (set(found.columns[name].lengths) == {1})  # the one item of a list
            form, reason, notes = _answer_form(found, options, answer)
            if form is None or not (named or form == "text"):
                continue
            question, reasons = _question(found, taken | {answer})
            if question is None:
                continue
            chosen: dict[str, Any] = {"question": question, "options": options, "answer": answer, "answer_is": form}
            subject = _subject(found, taken | {answer})
            if subject:
                chosen["subject"] = subject
                reasons.append(f"`{subject}` has {len(found.columns[subject].few or ())} values: accuracy by subject")
            return Guess("choice", chosen, [why, reason, *reasons], answer, notes)
    return None


def option_columns(found: Profile) -> Iterable[tuple[str | list[str], bool, str]]:
    """Where options may be: a column (or path) of lists, or a column each; whether the names say so; and why."""
    lists = [
        name
        for name, column in found.columns.items()
        if column.mostly(LIST) and column.items[TEXT] + column.items[WHOLE] + column.items[NUMBER] > 0
    ]
    named = [name for name in lists if plain(name) in OPTION_LISTS or plain(name.split(".")[0]) in OPTION_LISTS]
    for name in named:
        if name.split(".")[-1] in ("label", "labels", "id", "key"):
            continue  # of ARC's `choices`, `text` are the options, `label` their letters
        yield name, True, f"`{name}` holds lists of {_lengths(found.columns[name])} options"
    for name, column in found.columns.items():
        fields = [key for key in ("text", "content", "value", "option") if column.keys[key] == column.items[OBJECT]]
        if column.mostly(LIST) and fields and plain(name.split(".")[-1]) in OPTION_LISTS:
            yield f"{name}.*.{fields[0]}", True, f"`{name}` holds lists of options, each with its `{fields[0]}`"
    sets: dict[tuple[str, bool], dict[int, str]] = {}
    for name, column in found.columns.items():
        match = re.fullmatch(r"(?:.*\.)?(.*?)[ _-]?([A-Za-z]|\d)", name)
        if match and column.is_words and plain(match[1]) in OPTION_PREFIXES:
            digit = match[2].isdigit()
            place = int(match[2]) if digit else ord(match[2].lower()) - ord("a")
            sets.setdefault((name[: match.start(2)], digit), {})[place] = name
    for (_, digit), places in sets.items():
        first = min(places) if digit else 0
        run = [places[place] for place in range(first, first + len(places)) if place in places]
        if len(run) == len(places) >= 2 and first <= 1:
            yield run, True, f"{listed(run)} are the options, a column each"
    for name in lists:
        column = found.columns[name]
        if name not in named and column.lengths.most_common(1)[0][0] > 1:
            yield name, False, f"`{name}` holds lists of {_lengths(column)} texts, and an answer fits them"


def _lengths(column: Column) -> str:
    sizes = sorted(column.lengths)
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _answer_form(found: Profile, options: str | list[str], answer: str) -> tuple[str | None, str, list[str]]:
    """How a column tells the right option, why, and what to know; None where it does not."""
    column = found.columns[answer.removesuffix(".0")]
    if not column.mostly(TEXT, WHOLE) and not answer.endswith(".0"):
        return None, "", []
    votes: Counter[str] = Counter()
    rows = 0
    for record in found.sample:
        cells = [at(record, name) for name in options] if isinstance(options, list) else at(record, options)
        own = [str(cell).strip() for cell in cells if cell is not None] if isinstance(cells, list) else []
        value = at(record, answer)
        if value is None or len(own) < 2:
            continue
        rows += 1
        written = str(value)
        votes["text"] += written.strip() in own
        letter = LETTER.fullmatch(written)
        if letter:
            votes["letter"] += ord(letter[1].lower()) - ord("a") < len(own)
        if WHOLE_TEXT.fullmatch(written):
            said = int(float(written))
            votes["number"] += 1
            votes["index0"] += 0 <= said < len(own)
            votes["index1"] += 1 <= said <= len(own)
            votes["hidden"] += said == -1
    rows -= votes["hidden"]
    if rows < 1:
        return None, "", []
    notes: list[str] = []
    by_name = plain(answer.removesuffix(".0").split(".")[-1]) in RIGHT
    enough = 0.9 if by_name else 0.99
    if votes["text"] >= enough * rows:
        return "text", f"`{answer}` is one of the row's options: answer_is: text", notes
    if votes["letter"] >= 0.8 * rows and (by_name or votes["letter"] == rows):
        if votes["letter"] < rows:
            notes.append(
                f"{1 - votes['letter'] / rows:.1%} of `{answer}` are no letters (ARC has some numbers there): those "
                "rows are rejected"
            )
        return "letter", f"`{answer}` holds letters: answer_is: letter", notes
    if votes["number"] < enough * rows or max(votes["index0"], votes["index1"]) < enough * rows or not by_name:
        return None, "", []
    least = 0 if votes["hidden"] and column.least == -1 and votes["index0"] > votes["index1"] else column.least
    ends = f"`{answer}` holds whole numbers from {number(least)} to {number(column.most)}"
    if least == 0 or votes["index0"] > votes["index1"]:
        return "index0", f"{ends}: answer_is: index0", notes
    if votes["index1"] > votes["index0"]:
        return "index1", f"{ends}, the number of options: answer_is: index1", notes
    notes.append(
        f"{ends}, which does not tell whether they count from 0 or 1: look at a row whose answer you know, and set "
        "options.answer_is to index0 or index1"
    )
    return "index0", ends, notes


def _question(found: Profile, taken: set[str]) -> tuple[str | None, list[str]]:
    """The template of a question, of its context first."""
    names, reasons = asked_columns(found, taken, pairs=False)
    if not names:
        return None, []
    return names[0] if len(names) == 1 else "\n".join(f"{{{name}}}" for name in names), reasons


def _subject(found: Profile, taken: set[str]) -> str | None:
    for name in ordered(found.columns, SUBJECTS):
        column = found.columns[name]
        if name not in taken and column.mostly(TEXT) and column.few is not None and 2 <= len(column.few) <= 100:
            return name
    return None
