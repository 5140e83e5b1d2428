"""What a guess is, and the names by which columns are known."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from molf.inspection.profile import TEXT, Profile
from molf.tasks import generic, med, sql
from molf.tasks.choice import LETTER

# Names as `plain` leaves them: lower-case letters and digits. The order is that of preference.
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

GRETEL, SPIDER, MED = set(sql.GRETEL), set(sql.SPIDER), set(med.COLUMNS)
WHOLE_TEXT = re.compile(r"\s*[+-]?\d{1,15}(\.0*)?\s*")


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
        known = {"sql": GRETEL | SPIDER, "med": MED | {"subject_name"}}
        known["fact"] = {"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}
        return found | known.get(self.kind, set())


def at(record: dict[str, Any], path: str) -> Any:
    """What a row has in a column, or at a path into one."""
    return record[path] if path in record else generic.at(record, path)


def asked_columns(found: Profile, taken: set[str], pairs: bool) -> tuple[list[str], list[str]]:
    """The columns of a prompt: what is asked, its context first; and why."""
    there: dict[str, str] = {}
    for name, column in found.columns.items():
        apart = not any(name == other or name.startswith(f"{other}.") for other in taken)
        apart = apart and not WRONG.match(plain(name))
        if apart and column.is_words and usable(name):
            there.setdefault(plain(name.split(".")[-1]) if "." in name else plain(name), name)
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
    if plain(asked) in ("ctx", "text", "sentence", "document", "article", "review", "input", "utterance"):
        before = []
    reasons = [f"{listed([*before, asked])} {'is' if not before else 'are'} named as what is asked"]
    return [*before, asked], reasons


def holds_letters(found: Profile, name: str) -> bool:
    """Whether lists hold letters, as of several right options."""
    items = [item for record in found.sample if isinstance(at(record, name), list) for item in at(record, name)]
    return bool(items) and all(isinstance(item, str) and LETTER.fullmatch(item) for item in items)


def plain(name: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (name or "").lower())


def ordered(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of the columns that have one of the names, in the order of the names."""
    there: dict[str, list[str]] = {}
    for column in columns:
        there.setdefault(plain(column), []).append(column)
    return [column for name in names for column in there.get(name, [])]


def usable(name: str) -> bool:
    """Whether a template can name the column."""
    return not re.search(r"[{}\x00-\x1f]", name) and name.strip() == name != ""


def title(name: str) -> str:
    """A column's name as a person writes it."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.split(".")[-1]).replace("_", " ").replace("-", " ").strip().lower()
    return words[:1].upper() + words[1:]


def listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:g}"
