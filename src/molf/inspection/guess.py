"""What task a file may be for, and which columns: guessed by their names and by what they hold. Pure functions."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from molf.inspection.profile import LIST, NUMBER, OBJECT, TEXT, TRUTH, WHOLE, Column, Profile
from molf.tasks import generic

# Names as `_plain` leaves them: lower-case letters and digits. The order is that of preference.
ANSWERS = (
    "completion response output answer correctanswer bestanswer answers target targettext tgt reply chosen "
    "canonicalsolution solution summary highlights groundtruth expectedoutput expected gold reference sql query code "
    "translation finalanswer result assistant bot labeltext labelname goldlabel label labels sentiment emotion intent "
    "class category headline"
).split()
ASKED = (
    "prompt instruction instructions question questions sqlprompt problem query input inputtext inputs goal "
    "startphrase ctx questionstem stem utterance message sentence review tweet comment text document article dialogue "
    "dialog content source sourcetext src passage premise title body request user human headline docstring nlquestion"
).split()
CONTEXTS = (
    "system systemprompt context contexts passage sqlcontext background story paragraph article evidence schema input "
    "premise fact1 supportingtext support knowledge tools functions"
).split()
PAIRS = [
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("sentencea", "sentenceb"),
    ("claim", "evidence"),
    ("question", "sentence"),
    ("query", "passage"),
]
# What is not to be learnt and must not be seen either.
WRONG = re.compile("rejected|distractor|incorrect|wrong")
OPTION_LISTS = "choices options endings candidates answerchoices answeroptions alternatives".split()
OPTION_PREFIXES = {
    *("", "option", "options", "opt", "op", "choice", "choices", "ending", "answer", "ans"),
    *("sol", "solution", "alternative", "candidate", "hypothesis", "mc"),
}
RIGHT = (
    "answer answerkey answeridx answerindex answerletter correctanswer correctoption correctchoice correct "
    "correctansweridx correctanswerindex correctidx correctindex correctanswerletter label gold goldindex goldlabel "
    "cop target solution key rightanswer answerright"
).split()
SUBJECTS = "subject subjectname category topic topicname domain field skill area".split()
TALKS = "messages conversations conversation dialog dialogue chat turns chosen".split()
GROUPS = (
    "group groupid author authorid user userid customer customerid speaker patient patientid subjectid document "
    "documentid docid doc articleid passageid contextid storyid source sourceid sourcefile file filename url uri title "
    "dbid database session sessionid conversationid threadid template templateid promptid questionid originalid "
    "parentid clusterid family repo repository project context passage article paragraph story"
).split()

GRETEL = {"sql_prompt", "sql_context", "sql"}
SPIDER = {"db_id", "question", "query"}
MED = {"question", "opa", "opb", "opc", "opd", "cop"}
ROLES = {"system", "user", "assistant", "human", "gpt"}
LETTER = re.compile(r"\s*[(\[]?([A-Za-z])[)\]]?[.:]?\s*")
WHOLE_TEXT = re.compile(r"\s*[+-]?\d{1,15}(\.0*)?\s*")
FORMS = {
    "letter": "is a letter",
    "index0": "counts from 0",
    "index1": "counts from 1",
    "text": "is one of the options itself",
}


@dataclass
class Guess:
    """A task that may fit.

    Attributes:
        kind, options: As in a block of `tasks`.
        reasons: Why, a sentence each.
        notes: What to know before it is used.
        answer: Column that holds the answer.
    """

    kind: str
    options: dict[str, Any]
    reasons: list[str]
    answer: str
    notes: list[str] = field(default_factory=list)

    def columns(self) -> set[str]:
        """Columns of the file that the options name."""
        found = set()
        for name, value in self.options.items():
            if name in ("answer_is", "must_run", "databases", "first_option"):
                continue
            for text in value if isinstance(value, list) else [value]:
                names = re.findall(r"\{([^{}]+)\}", text) if text else []
                found.update(names or ([text] if text else []))
        known = {"sql": GRETEL | SPIDER | {"context"}, "med": MED | {"subject_name"}}
        known["fact"] = {"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}
        return found | known.get(self.kind, set())


def guesses(found: Profile) -> list[Guess]:
    """Tasks that fit a file, the likeliest first; empty where none does (`refusal` says why)."""
    if not found.columns:
        return []
    by_names = [guess for guess in (_fact(found), _med(found), _sql(found)) if guess]
    others = [guess for guess in (_messages(found), _choice(found), _completion(found)) if guess]
    return by_names + others


def at(record: dict[str, Any], path: str) -> Any:
    """What a row has in a column, or at a path into one."""
    return record[path] if path in record else generic.at(record, path)


# --- the benchmarks' own tasks -------------------------------------------------------------------------------------


def _fact(found: Profile) -> Guess | None:
    wanted = [f"requested_rewrite.{name}" for name in ("prompt", "subject", "target_new.str", "target_true.str")]
    if {*wanted, "paraphrase_prompts", "neighborhood_prompts"} <= set(found.columns):
        return Guess("fact", {}, ["`requested_rewrite` and its two lists of prompts are CounterFact's"], wanted[2])
    return None


def _med(found: Profile) -> Guess | None:
    if not set(found.top) >= MED:
        return None
    cop = found.columns["cop"]
    least, most = cop.least, cop.most
    guess = Guess("med", {"first_option": 1}, ["the columns are MedMCQA's"], "cop")
    if least == 0 and most is not None and most <= 3:
        guess.options["first_option"] = 0
        guess.reasons.append("`cop` goes from 0 to 3: first_option: 0")
    elif least is not None and most is not None and least >= 1 and most == 4:
        guess.reasons.append("`cop` goes from 1 to 4: first_option: 1")
    else:
        guess.notes.append(
            f"`cop` goes from {_number(least)} to {_number(most)}, which does not tell whether it counts from 0 or 1: "
            "look at a row whose answer you know, and set options.first_option"
        )
    return guess


def _sql(found: Profile) -> Guess | None:
    names = set(found.top)
    options = {"databases": None, "must_run": True}
    if names >= GRETEL:
        return Guess("sql", options, ["sql_prompt, sql_context and sql are Gretel's columns"], "sql")
    if names >= SPIDER | {"context"}:
        guess = Guess("sql", options, ["db_id, question, query and context are Spider's columns"], "query")
        guess.notes.append("queries run on databases: options.databases names the folder or .tar.gz with DB/DB.sqlite")
        return guess
    return None


# --- conversations -------------------------------------------------------------------------------------------------


def _messages(found: Profile) -> Guess | None:
    for name in _ordered(found.top, TALKS):
        column = found.columns[name]
        keys = {key for key, count in column.keys.items() if count >= 0.9 * column.items[OBJECT]}
        pair = next((pair for pair in (("role", "content"), ("from", "value")) if set(pair) <= keys), None)
        if not column.mostly(LIST) or pair is None:
            continue
        talks = [record[name] for record in found.sample if isinstance(record.get(name), list)]
        roles = Counter(turn.get(pair[0]) for talk in talks for turn in talk if isinstance(turn, dict))
        whose = "OpenAI's" if pair[0] == "role" else "ShareGPT's"
        guess = Guess(
            "completion", {"messages": name}, [f"`{name}` holds lists of {{{', '.join(pair)}}}, {whose} form"], name
        )
        last = [talk[-1].get(pair[0]) if talk and isinstance(talk[-1], dict) else None for talk in talks]
        answered = sum(role in ("assistant", "gpt") for role in last)
        if not answered:
            continue
        if answered < len(last):
            guess.notes.append(
                f"{1 - answered / len(last):.0%} of the conversations do not end with the assistant and are rejected"
            )
        strange = [f"{role!r}" for role in roles if role not in ROLES]
        if strange:
            guess.notes.append(
                f"roles {', '.join(strange[:5])}: only system, user and assistant (human, gpt) are taken; the other "
                "conversations are rejected"
            )
        if pair[0] == "role" and "tool_calls" in column.keys:
            guess.notes.append("some turns have tool_calls, which are not read")
        guess.notes.append("the loss is on the assistant's turns; scores are of the last turn, given all before it")
        if _plain(name) == "chosen":
            guess.reasons.append("of the two conversations `chosen` is the one to learn; no preference is trained")
        return guess
    return None


# --- choice --------------------------------------------------------------------------------------------------------


def _choice(found: Profile) -> Guess | None:
    for options, named, why in _option_columns(found):
        own = options if isinstance(options, list) else [options]
        taken = {*own, *(re.sub(r"(\.\*)?\.[^.]*$", "", name) for name in own)}
        names = [name for name in _ordered(found.columns, RIGHT) if name not in taken]
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


def _option_columns(found: Profile) -> Iterable[tuple[str | list[str], bool, str]]:
    """Where options may be: a column (or path) of lists, or a column each; whether the names say so; and why."""
    lists = [
        name
        for name, column in found.columns.items()
        if column.mostly(LIST) and column.items[TEXT] + column.items[WHOLE] + column.items[NUMBER] > 0
    ]
    named = [name for name in lists if _plain(name) in OPTION_LISTS or _plain(name.split(".")[0]) in OPTION_LISTS]
    for name in named:
        if name.split(".")[-1] in ("label", "labels", "id", "key"):
            continue  # of ARC's `choices`, `text` are the options, `label` their letters
        yield name, True, f"`{name}` holds lists of {_lengths(found.columns[name])} options"
    for name, column in found.columns.items():
        fields = [key for key in ("text", "content", "value", "option") if column.keys[key] == column.items[OBJECT]]
        if column.mostly(LIST) and fields and _plain(name.split(".")[-1]) in OPTION_LISTS:
            yield f"{name}.*.{fields[0]}", True, f"`{name}` holds lists of options, each with its `{fields[0]}`"
    sets: dict[tuple[str, bool], dict[int, str]] = {}
    for name, column in found.columns.items():
        match = re.fullmatch(r"(?:.*\.)?(.*?)[ _-]?([A-Za-z]|\d)", name)
        if match and column.is_words and _plain(match[1]) in OPTION_PREFIXES:
            digit = match[2].isdigit()
            place = int(match[2]) if digit else ord(match[2].lower()) - ord("a")
            sets.setdefault((name[: match.start(2)], digit), {})[place] = name
    for (_, digit), places in sets.items():
        first = min(places) if digit else 0
        run = [places[place] for place in range(first, first + len(places)) if place in places]
        if len(run) == len(places) >= 2 and first <= 1:
            yield run, True, f"{_and(run)} are the options, a column each"
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
            number = int(float(written))
            votes["number"] += 1
            votes["index0"] += 0 <= number < len(own)
            votes["index1"] += 1 <= number <= len(own)
            votes["hidden"] += number == -1
    rows -= votes["hidden"]
    if rows < 1:
        return None, "", []
    notes: list[str] = []
    by_name = _plain(answer.removesuffix(".0").split(".")[-1]) in RIGHT
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
    ends = f"`{answer}` holds whole numbers from {_number(least)} to {_number(column.most)}"
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
    names, reasons = _asked(found, taken, pairs=False)
    if not names:
        return None, []
    return names[0] if len(names) == 1 else "\n".join(f"{{{name}}}" for name in names), reasons


def _subject(found: Profile, taken: set[str]) -> str | None:
    for name in _ordered(found.columns, SUBJECTS):
        column = found.columns[name]
        if name not in taken and column.mostly(TEXT) and column.few is not None and 2 <= len(column.few) <= 100:
            return name
    return None


# --- completion ----------------------------------------------------------------------------------------------------


def _completion(found: Profile) -> Guess | None:
    for name in _ordered(found.top, ["translation"]):
        sides = [path for path in found.columns if path.startswith(f"{name}.")]
        if found.columns[name].mostly(OBJECT) and len(sides) == 2:
            return _written(found, sides[:1], sides[1], [f"{_and(sides)} are a text in two languages"])
    for answer, why in _answer_columns(found):
        taken = {answer, answer.split(".")[0]}
        names, reasons = _asked(found, taken, pairs=True)
        options = [name for name in _ordered(found.top, OPTION_LISTS) if found.columns[name].mostly(TEXT)]
        if names and options and _usable(options[0]):
            names.append(options[0])
            reasons.append(f"`{options[0]}` is one text with the options; kind: choice would need a list or columns")
        if names:
            return _written(found, names, answer, [why, *reasons])
    # No name is known: a column of few labels beside a text, or two texts in their order.
    free = [name for name, column in found.top.items() if column.is_free_text and _usable(name)]
    free = [name for name in free if not WRONG.match(_plain(name)) and _plain(name) not in OPTION_LISTS]
    labels = [
        name
        for name, column in found.top.items()
        if _usable(name) and column.few is not None and 2 <= len(column.few) <= 50 and column.given >= 20
        if re.sub(r"\d+$", "", _plain(name)) not in SUBJECTS
        if len(column.few) <= column.given / 5 and column.mostly(TEXT, WHOLE, TRUTH)
    ]
    if len(free) >= 1 and len(labels) == 1:
        why = f"`{labels[0]}` has {len(found.columns[labels[0]].few or ())} values beside the text of `{free[0]}`"
        return _written(found, free[:1], labels[0], [f"{why}: a label (no name is known, look twice)"])
    if len(free) == 2 and _plain(free[1]) not in {*ASKED, *CONTEXTS}:
        why = f"`{free[0]}` and `{free[1]}` are the only texts, taken in their order (no name is known, look twice)"
        return _written(found, free[:1], free[1], [why])
    return None


def _answer_columns(found: Profile) -> Iterable[tuple[str, str]]:
    """Columns, or paths, that may hold the answer, by their names; and why."""
    for name in _ordered(found.columns, ANSWERS):
        column = found.columns[name]
        if column.given < column.rows / 2:
            continue
        if not _usable(name) or (_plain(name) == "query" and "question" not in map(_plain, found.top)):
            continue
        if column.mostly(TEXT, WHOLE, NUMBER, TRUTH) and (column.few is None or len(column.few) > 1):
            yield name, f"`{name}` is named as an answer is"
        elif _is_letters(found, name) and next(iter(_option_columns(found)), None):
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
    for name in _ordered(found.top, ["answer0", "answer1", "answers0", "response0", "response1", "output0", "output1"]):
        if found.columns[name].mostly(TEXT, WHOLE, NUMBER, TRUTH) and _usable(name):
            yield name, f"`{name}` is the first of several answers"
    for name in ("answers_spans.spans",):  # DROP's
        if name in found.columns:
            yield f"{name}.0", f"`{name}` holds lists of answers, of which the first is taken"


def _is_letters(found: Profile, name: str) -> bool:
    """Whether lists hold letters, as of several right options."""
    items = [item for record in found.sample if isinstance(at(record, name), list) for item in at(record, name)]
    return bool(items) and all(isinstance(item, str) and LETTER.fullmatch(item) for item in items)


def _asked(found: Profile, taken: set[str], pairs: bool) -> tuple[list[str], list[str]]:
    """The columns of a prompt: what is asked, its context first; and why."""
    there: dict[str, str] = {}
    for name, column in found.columns.items():
        apart = not any(name == other or name.startswith(f"{other}.") for other in taken)
        apart = apart and not WRONG.match(_plain(name))
        if apart and column.is_words and _usable(name):
            there.setdefault(_plain(name.split(".")[-1]) if "." in name else _plain(name), name)
    if pairs:
        for one, other in PAIRS:
            if one in there and other in there:
                return [there[one], there[other]], [f"`{there[one]}` and `{there[other]}` are asked together"]
    if "instruction" in there and "input" in there:  # Alpaca's; the input is often empty
        names = [there[name] for name in ("system", "systemprompt", "instruction", "input") if name in there]
        return names, ["`instruction` and `input` are Alpaca's columns"]
    if "instruction" in there and "context" in there:
        return [there["instruction"], there["context"]], ["`instruction` and `context` are Dolly's columns"]
    asked = next((there[name] for name in ASKED if name in there and found.columns[there[name]].mostly(TEXT)), None)
    if asked is None:
        free = [name for name in there.values() if found.columns[name].is_free_text]
        if not free:
            return [], []
        asked = free[0]
    before = [there[name] for name in CONTEXTS if name in there and there[name] != asked]
    before = [name for name in before if found.columns[name].mostly(TEXT)]
    if _plain(asked) in ("ctx", "text", "sentence", "document", "article", "review", "input", "utterance"):
        before = []
    reasons = [f"{_and([*before, asked])} {'is' if not before else 'are'} named as what is asked"]
    return [*before, asked], reasons


def _written(found: Profile, names: list[str], answer: str, reasons: list[str]) -> Guess:
    """A completion's options from the columns of prompt and answer."""
    base = re.sub(r"\.0(\.text)?$", "", answer)
    column = found.columns[base]
    label = column.few is not None and len(column.few) <= 50 and column.mean < 40 and not answer.endswith(".0")
    leading = sum(isinstance(text, str) and text[:1].isspace() for text in (at(r, answer) for r in found.sample))
    prompt, cue = names[0], _title("answer" if base.startswith("answers") else base.split(".")[0])
    if len(names) > 1:
        # Options have letters of their own.
        lines = [f"{_title(name)}: {{{name}}}" if _plain(name) not in OPTION_LISTS else f"{{{name}}}" for name in names]
        prompt = "\n".join([*lines, f"{cue}:"])
    elif label and found.columns[names[0]].is_free_text and _plain(names[0]) not in ("prompt", "instruction"):
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
    elif _plain(answer) == "chosen":
        guess.notes.append("`chosen` is learnt and `rejected` left out: no preference is trained")
    elif any(re.match("distractor|incorrect", _plain(name)) for name in found.columns):
        guess.notes.append(
            "the wrong answers beside it are not used: kind: choice needs options in a fixed order, and here the right "
            "one would always stand in the same place; shuffle them into one column of lists first"
        )
    return guess


# --- where nothing fits --------------------------------------------------------------------------------------------


def refusal(found: Profile) -> list[str]:
    """What was seen, and what to do, where no task fits."""
    top = found.top
    plain = {_plain(name): column for name, column in top.items()}
    said = []
    if {"chosen", "rejected"} <= set(plain):
        said.append(
            "`chosen` and `rejected` are preference pairs, each a whole conversation as one text: no method here "
            "trains preferences; split `chosen` at its last 'Assistant:' into a prompt and a completion"
        )
    talks = [name for name in top if _plain(name) in TALKS and top[name].mostly(LIST)]
    for name in talks:
        if top[name].items[TEXT]:
            said.append(f"`{name}` holds lists of texts: write each turn as {{role, content}}, the assistant's last")
        elif top[name].items[LIST]:
            said.append(f"`{name}` holds lists of lists: write one conversation a row")
        elif top[name].items[OBJECT]:
            said.append(f"`{name}` has no conversation that ends with a turn of the assistant, which is what is learnt")
    several = [name for name, column in top.items() if column.mostly(LIST) and _is_letters(found, name)]
    if several and (options := next(iter(_option_columns(found)), None)):
        said.append(
            f"{options[2]}, and `{several[0]}` holds lists of letters: questions with several right options are no "
            "task here; keep those with one, or write the letters as one text for kind: completion"
        )
    separator = next((mark for mark in ";\t|" if len(top) == 1 and mark in next(iter(top))), None)
    if separator is not None:
        said.append(
            f"there is one column, whose name holds {separator!r}: the file seems to separate its columns by that; "
            "save it with commas (.csv) or tabs (.tsv)"
        )
    texts = [name for name, column in top.items() if column.is_free_text]
    if not said and len(texts) > 1 and all(_plain(name) in {*ASKED, *CONTEXTS, *OPTION_LISTS} for name in texts):
        said.append(f"{_and(texts)} are what is asked; no column has the answer, as in test files without answers")
    if not said and len(texts) == 1:
        others = "the other columns hold no answer to it" if len(top) > 1 else "there is no answer beside it"
        said.append(
            f"`{texts[0]}` is plain text and {others}: that is data for pretraining, not a supervised task; a second "
            "column with what the model is to write is needed"
        )
    tagged = [name for name, column in top.items() if _plain(name) in ("tokens", "nertags", "postags", "words")]
    if tagged:
        said.append(f"{_and(tagged)}: labels of single words are no task here; write them as one text")
    if not said:
        said.append("no two columns look like what is asked and what is to be answered")
    said.append(
        "looked for: conversations (messages, conversations); a question with options (choices, options, A to D) and "
        "its answer; prompt and answer (instruction, question, prompt, input, text; output, response, answer, "
        "completion, label); the columns of Gretel, Spider, MedMCQA and CounterFact"
    )
    said.append("name the columns yourself in a block of kind completion or choice: docs/data.md shows both")
    return said


def group(found: Profile, guess: Guess) -> tuple[str | None, list[str]]:
    """The column whose equal values should stay in one split, if one is plain enough; and others that may be meant."""
    asked = guess.options.get("prompt") or guess.options.get("question") or ""
    alone = re.findall(r"\{([^{}]+)\}", asked) or [asked]
    alone = alone if len(alone) == 1 else []  # equal prompts stay together anyway
    names = {name for name in found.top if name not in {guess.answer, *alone} and _plain(name) not in SUBJECTS}
    may = []
    for name in sorted(names, key=lambda name: GROUPS.index(_plain(name)) if _plain(name) in GROUPS else len(GROUPS)):
        column = found.columns[name]
        count = len(column.distinct)
        if not column.mostly(TEXT, WHOLE) or column.given < 20 or column.distinct.over:
            continue
        # Few values are a category, over which a split must go; values that hardly repeat tie nothing together.
        if count >= 10 and column.distinct.repeated >= 0.3 and count >= 0.005 * column.given:
            may.append(name)
    known = next((name for name in may if _plain(name) in GROUPS), None)
    return known, [name for name in may if name != known]


# --- names ---------------------------------------------------------------------------------------------------------


def _plain(name: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (name or "").lower())


def _ordered(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of the columns that have one of the names, in the order of the names."""
    there: dict[str, list[str]] = {}
    for column in columns:
        there.setdefault(_plain(column), []).append(column)
    return [column for name in names for column in there.get(name, [])]


def _usable(name: str) -> bool:
    """Whether a template can name the column."""
    return not re.search(r"[{}\x00-\x1f]", name) and name.strip() == name != ""


def _title(name: str) -> str:
    """A column's name as a person writes it."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.split(".")[-1]).replace("_", " ").replace("-", " ").strip().lower()
    return words[:1].upper() + words[1:]


def _and(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:g}"
