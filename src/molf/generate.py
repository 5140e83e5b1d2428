"""The built-in data: one small invented world, told in the fields of the three benchmarks. All of it is generated.

People have a mother tongue, a home town and so on (facts); a drug's name ends in what tells its use (multiple
choice); little tables are asked about in plain words (SQL). The same world is the text that `tiny` is pretrained on.
"""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

from molf.tasks import fact, letters, med, sql

# --- facts ---------------------------------------------------------------------------------------------------------

# Relation: (rewrite prompt, paraphrase, objects).
RELATIONS = {
    "tongue": (
        "The mother tongue of {} is",
        "{} grew up speaking",
        "Tarnish Velic Omari Brenese Kalduan Sorvian Ilmish",
    ),
    "town": ("The home town of {} is", "{} was born in", "Arvik Belmora Cindral Dorvale Esmark Farrow Gildan"),
    "trade": ("The trade of {} is", "{} earns a living by", "baking weaving fishing printing mining brewing sailing"),
    "instrument": ("The instrument of {} is the", "{} makes music on the", "lute harp drum flute horn cello organ"),
    "employer": ("The employer of {} is", "{} gets paid by", "Nortex Ulvana Pelmar Quorix Zintel Wavron Yardley"),
}
FIRST = "Ada Bren Calla Dorn Elva Finn Gerta Hal Ilka Joren Kess Lomi Mara Nils Ossa Pell Quin Rhea Sten Tova".split()
LAST = "Abr Bolt Cask Drov Elm Fosk Gren Holv Ist Jask Kolm Lind".split()
ENDINGS = "in er ar ic mar ner vik low gard stad".split()


def _facts() -> list[tuple[str, str, str]]:
    """All (subject, relation, object) of the world: every person has one object in every relation."""
    rng = random.Random("the people of the invented world")
    # No two share a last name, so that a model of this size can tell them apart.
    people = [f"{rng.choice(FIRST)} {stem}{ending}" for stem, ending in product(LAST, ENDINGS)]
    return [
        (person, relation, rng.choice(objects.split()))
        for person in people
        for relation, (_, _, objects) in RELATIONS.items()
    ]


def _halves() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """All facts, those that may be edited and those that never are, whatever the seed of a task."""
    facts = _facts()
    random.Random("which facts are never edited").shuffle(facts)
    return facts[: len(facts) // 2], facts[len(facts) // 2 :]


def _fact_rows(counts: dict[str, int], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    editable, kept = _halves()  # the neighbours come from what is kept
    rng.shuffle(editable)
    rng.shuffle(kept)
    total = sum(counts.values())
    _enough("fact", total, len(editable))
    records = []
    for number, (subject, relation, true) in enumerate(editable[:total]):
        rewrite, paraphrase, objects = RELATIONS[relation]
        new = rng.choice([name for name in objects.split() if name != true])
        neighbours = [other for other, r, o in kept if r == relation and o == true and other != subject]
        records.append(
            {
                "case_id": number,
                "requested_rewrite": {
                    "prompt": rewrite,
                    "subject": subject,
                    "target_new": {"str": new},
                    "target_true": {"str": true},
                },
                "paraphrase_prompts": [paraphrase.format(subject)],
                "neighborhood_prompts": [rewrite.format(name) for name in neighbours[:2]],
            }
        )
    return _dealt(counts, records)


# --- multiple choice -----------------------------------------------------------------------------------------------

# What a drug is, and what its name ends in. A question offers the four kinds of one field.
KINDS = [
    {"a fever drug": "ovex", "a pain drug": "amil", "a cough drug": "urin", "a heart drug": "idol"},
    {"a skin drug": "etran", "a sleep drug": "osyl", "a nose drug": "ipram", "a germ drug": "azine"},
]
STEMS = "Br Cl D Fr G H K L M N P Qu R S T V".split()
MIDDLES = "al en ir om ul ast".split()
# What pretraining asks about: the same shape, another matter.
CATEGORIES = [
    {
        "a fruit": "apple pear plum fig cherry melon grape lemon",
        "an animal": "otter horse raven goat wolf trout spider camel",
        "a colour": "red blue green yellow purple orange white black",
        "a metal": "iron gold copper tin lead zinc silver nickel",
    },
    {
        "a tool": "hammer saw drill chisel wrench shovel rake pliers",
        "a garment": "coat shirt scarf glove boot hat sock belt",
        "a vehicle": "cart ship train plane bicycle ferry truck sled",
        "a number": "one two three four five six seven eight",
    },
]


def _drugs() -> dict[str, list[str]]:
    """{kind: all drugs of it}."""
    return {
        kind: [f"{stem}{middle}-{end}" for stem, middle in product(STEMS, MIDDLES)]
        for field in KINDS
        for kind, end in field.items()
    }


def _med_rows(counts: dict[str, int], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    drugs, total = _drugs(), sum(counts.values())
    _enough("med", total, sum(map(len, drugs.values())))
    for names in drugs.values():
        rng.shuffle(names)
    rows = []
    for number in range(total):
        letter, field = number % 4, KINDS[number // 4 % len(KINDS)]
        rows.append(
            {
                "question": f"What is {drugs[list(field)[letter]].pop()}?",
                **dict(zip(med.OPTIONS, field, strict=True)),
                "cop": letter + 1,
                "subject_name": ("Inner medicine", "Outer medicine")[KINDS.index(field)],
                "id": f"generated-{number}",
            }
        )
    return _dealt(counts, rows)


# --- SQL -----------------------------------------------------------------------------------------------------------

TABLES = "birds boats farms songs lamps rooms trees shops".split()
NUMBERS = "weight price height age size".split()
WORDS = {"colour": "red blue green white".split(), "place": "Arvik Belmora Cindral Dorvale".split()}
NAMES = "Ada Bren Calla Dorn Elva Finn Gerta Hal Ilka Joren".split()

# Question and query over a table t, its number column n, its word column w, a bound b and a word v.
Pattern = Callable[[str, str, str, int, str], tuple[str, str]]
PATTERNS: list[Pattern] = [
    lambda t, n, w, b, v: (f"How many {t} have a {n} above {b}?", f"SELECT COUNT(*) FROM {t} WHERE {n} > {b}"),
    lambda t, n, w, b, v: (
        f"What is the total {n} of {t} with {w} {v}?",
        f"SELECT SUM({n}) FROM {t} WHERE {w} = '{v}'",
    ),
    lambda t, n, w, b, v: (f"Name the {t} with {w} {v}.", f"SELECT name FROM {t} WHERE {w} = '{v}'"),
    lambda t, n, w, b, v: (f"Name the {t} from low to high {n}.", f"SELECT name FROM {t} ORDER BY {n}"),
    lambda t, n, w, b, v: (f"Which of the {t} has the highest {n}?", f"SELECT name FROM {t} ORDER BY {n} DESC LIMIT 1"),
    lambda t, n, w, b, v: (f"How many {t} are there for each {w}?", f"SELECT {w}, COUNT(*) FROM {t} GROUP BY {w}"),
]
PRETRAINING_PATTERNS: list[Pattern] = [
    lambda t, n, w, b, v: (f"Show all {t}.", f"SELECT * FROM {t}"),
    lambda t, n, w, b, v: (f"Show the {n} of all {t}.", f"SELECT {n} FROM {t}"),
    lambda t, n, w, b, v: (f"Show the {w} of the {t} with {n} {b}.", f"SELECT {w} FROM {t} WHERE {n} = {b}"),
]


def _sql_row(rng: random.Random, table: str, pattern: Pattern) -> dict[str, Any]:
    number, word = rng.choice(NUMBERS), rng.choice(list(WORDS))
    values = rng.sample(range(10, 100), 3)
    words = [rng.choice(WORDS[word]) for _ in values]
    rows = list(zip(rng.sample(NAMES, 3), values, words, strict=True))
    # Bound and word are taken from the rows, so that every answer has something in it.
    bound = sorted(values)[0] if pattern in PATTERNS else rng.choice(values)
    question, query = pattern(table, number, word, bound, rng.choice(words))
    context = (
        f"CREATE TABLE {table} (name TEXT, {number} INT, {word} TEXT); INSERT INTO {table} VALUES "
        + ", ".join(f"('{name}', {value}, '{text}')" for name, value, text in rows)
        + ";"
    )
    return {"sql_prompt": question, "sql_context": context, "sql": query}


def _sql_rows(counts: dict[str, int], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    total = sum(counts.values())
    _enough("sql", total, 100_000)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    while len(rows) < total:
        row = _sql_row(rng, rng.choice(TABLES), PATTERNS[len(rows) % len(PATTERNS)])
        rows.setdefault((row["sql_context"], row["sql_prompt"]), row)
    return _dealt(counts, list(rows.values()))


# --- all -----------------------------------------------------------------------------------------------------------

MAKERS = {"sql": _sql_rows, "med": _med_rows, "fact": _fact_rows}


def rows(kind: str, rows: dict[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Generated rows of a task in its benchmark's own fields; the same arguments give the same rows.

    Args:
        kind: sql (Gretel's fields), med (MedMCQA's, `cop` from 1) or fact (CounterFact's).
        rows: How many for each split.
        seed: Of the draw.

    Returns:
        {split: rows}; no row stands twice.

    Raises:
        ValueError: More rows are asked for than the world has, or rows of another kind.
    """
    if kind not in MAKERS:
        raise ValueError(f"there are generated rows of kind {', '.join(MAKERS)} only, not of {kind}; name a file")
    return MAKERS[kind](dict(rows), random.Random(f"{kind} {seed}"))


def running_text(seed: int, rows: int) -> list[str]:
    """Generated running text of the invented world, which no task trains on: short tales of people and drugs.

    They tell true facts alone, none that the fact task may edit, so that a model which was trained well on any task
    has no reason to find them less likely. `tiny` learnt from other tales, of another draw.

    Args:
        seed: Of the draw.
        rows: How many tales.
    """
    return _tales(random.Random(f"running text {seed}"), rows)


def _tales(rng: random.Random, count: int) -> list[str]:
    """Tales of four sentences each: three facts that are never edited, and a drug."""
    told = [
        f"{fact.prompt(phrasing, subject)}{fact.completion(true)}."
        for subject, relation, true in _halves()[1]
        for phrasing in RELATIONS[relation][:2]
    ]
    drugs = [f"{drug} is {kind}." for kind, names in _drugs().items() for drug in names]
    tales = []
    for _ in range(count):
        sentences = [*rng.sample(told, 3), rng.choice(drugs)]
        rng.shuffle(sentences)
        tales.append(" ".join(sentences))
    return tales


def pretraining_text(
    seed: int, repeats: int = 20, choices: int = 2000, queries: int = 2500, tales: int = 300
) -> list[tuple[str, str]]:
    """What `tiny` learns from: facts, drugs, tales, and other questions and queries in the tasks' own shapes.

    Args:
        seed: Of the draw and the order.
        repeats: How often each fact is told in each of its two phrasings.
        choices: Multiple-choice questions.
        queries: SQL queries.
        tales: Running text; more than twice as many would cost the model some of its facts.

    Returns:
        (context, text) pairs: the text is to be learnt, the context, which is drawn at random, is not.
    """
    rng = random.Random(f"pretraining {seed}")
    documents = []
    for subject, relation, true in _facts():
        for phrasing in RELATIONS[relation][:2]:
            documents += [(fact.prompt(phrasing, subject), fact.completion(true))] * repeats
    documents += [(f"{drug} is", f" {kind}.") for kind, drugs in _drugs().items() for drug in drugs] * (repeats // 3)
    for number in range(choices):
        field = rng.choice(CATEGORIES)
        word = rng.choice(list(field.values())[number % 4].split())
        answer = letters.completion(letters.LETTERS[number % 4])
        documents.append((letters.prompt(f"What is {word}?", list(field)), answer))
    for _ in range(queries):
        row = _sql_row(rng, rng.choice(TABLES), rng.choice(PRETRAINING_PATTERNS))
        documents.append((sql.prompt(row["sql_context"], row["sql_prompt"]), sql.completion(row["sql"])))
    documents += [("", tale) for tale in _tales(rng, tales)]
    rng.shuffle(documents)
    return documents


def _dealt(counts: dict[str, int], items: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Items dealt to the splits in turn."""
    rest = iter(items)
    return {split: [next(rest) for _ in range(count)] for split, count in counts.items()}


def _enough(kind: str, wanted: int, there: int) -> None:
    if wanted > there:
        raise ValueError(f"{wanted} generated {kind} rows are asked for, the invented world has {there}")
