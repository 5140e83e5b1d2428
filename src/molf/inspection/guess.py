"""What task a file may be for, and which columns: guessed by their names and by what they hold. Pure functions."""

import re
from collections import Counter

from molf.inspection.choice import choice, option_columns
from molf.inspection.completion import completion
from molf.inspection.forms import (
    ASKED,
    CONTEXTS,
    GRETEL,
    GROUPS,
    MED,
    OPTION_LISTS,
    SPIDER,
    SUBJECTS,
    TALKS,
    Guess,
    holds_letters,
    listed,
    number,
    ordered,
    plain,
)
from molf.inspection.profile import LIST, OBJECT, TEXT, WHOLE, Profile
from molf.tasks.completion import ROLES


def guesses(found: Profile) -> list[Guess]:
    """Tasks that fit a file, the likeliest first; empty where none does (`refusal` says why)."""
    if not found.columns:
        return []
    by_names = [guess for guess in (_fact(found), _med(found), _sql(found)) if guess]
    others = [guess for guess in (_messages(found), choice(found), completion(found)) if guess]
    return by_names + others


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
            f"`cop` goes from {number(least)} to {number(most)}, which does not tell whether it counts from 0 or 1: "
            "look at a row whose answer you know, and set options.first_option"
        )
    return guess


def _sql(found: Profile) -> Guess | None:
    names = set(found.top)
    options = {"databases": None, "must_run": True}
    if names >= GRETEL:
        return Guess("sql", options, ["sql_prompt, sql_context and sql are Gretel's columns"], "sql")
    if names >= SPIDER:
        guess = Guess("sql", options, ["db_id, question, query and context are Spider's columns"], "query")
        guess.notes.append("queries run on databases: options.databases names the folder or .tar.gz with DB/DB.sqlite")
        return guess
    return None


# --- conversations -------------------------------------------------------------------------------------------------


def _messages(found: Profile) -> Guess | None:
    for name in ordered(found.top, TALKS):
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
                f"{len(last) - answered:,} of {len(last):,} conversations looked at end without the assistant: rejected"
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
        if plain(name) == "chosen":
            guess.reasons.append("of the two conversations `chosen` is the one to learn; no preference is trained")
        return guess
    return None


# --- where nothing fits --------------------------------------------------------------------------------------------


def refusal(found: Profile) -> list[str]:
    """What was seen, and what to do, where no task fits."""
    top = found.top
    names = set(map(plain, top))
    said = []
    if {"chosen", "rejected"} <= names:
        said.append(
            "`chosen` and `rejected` are preference pairs, each a whole conversation as one text: no method here "
            "trains preferences; split `chosen` at its last 'Assistant:' into a prompt and a completion"
        )
    talks = [name for name in top if plain(name) in TALKS and top[name].mostly(LIST)]
    for name in talks:
        if top[name].items[TEXT]:
            said.append(f"`{name}` holds lists of texts: write each turn as {{role, content}}, the assistant's last")
        elif top[name].items[LIST]:
            said.append(f"`{name}` holds lists of lists: write one conversation a row")
        elif top[name].items[OBJECT]:
            said.append(f"`{name}` has no conversation that ends with a turn of the assistant, which is what is learnt")
    several = [name for name, column in top.items() if column.mostly(LIST) and holds_letters(found, name)]
    if several and (options := next(iter(option_columns(found)), None)):
        said.append(
            f"{options[2]}, and `{several[0]}` holds lists of letters: questions with several right options are no "
            "task here; keep those with one, or write the letters as one text for kind: completion"
        )
    separator = next((mark for mark in "\t|" if len(top) == 1 and mark in next(iter(top))), None)
    if separator is not None:
        said.append(
            f"there is one column, whose name holds {separator!r}: the file seems to separate its columns by that; "
            "save it with commas (.csv) or tabs (.tsv)"
        )
    texts = [name for name, column in top.items() if column.is_free_text]
    if not said and len(texts) > 1 and all(plain(name) in {*ASKED, *CONTEXTS, *OPTION_LISTS} for name in texts):
        said.append(f"{listed(texts)} are what is asked; no column has the answer, as in test files without answers")
    if not said and len(texts) == 1:
        others = "the other columns hold no answer to it" if len(top) > 1 else "there is no answer beside it"
        said.append(
            f"`{texts[0]}` is plain text and {others}: that is data for pretraining, not a supervised task; a second "
            "column with what the model is to write is needed"
        )
    tagged = [name for name, column in top.items() if plain(name) in ("tokens", "nertags", "postags", "words")]
    if tagged:
        said.append(f"{listed(tagged)}: labels of single words are no task here; write them as one text")
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
    own = guess.options.get("options") or []
    apart = {guess.answer, *alone, *([own] if isinstance(own, str) else own)}
    names = {name for name in found.top if name not in apart and plain(name) not in SUBJECTS}
    may = []
    for name in sorted(names, key=lambda name: GROUPS.index(plain(name)) if plain(name) in GROUPS else len(GROUPS)):
        column = found.columns[name]
        count = len(column.distinct)
        if not column.mostly(TEXT, WHOLE) or column.given < 20 or column.distinct.over:
            continue
        # Few values are a category, over which a split must go; values that hardly repeat tie nothing together.
        if count >= 10 and column.distinct.repeated >= 0.3 and count >= 0.005 * column.given:
            may.append(name)
    known = next((name for name in may if plain(name) in GROUPS), None)
    return known, [name for name in may if name != known]
