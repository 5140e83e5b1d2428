"""Rows in the published forms of data sets, made up: by name the rows and what `molf inspect` should guess of them."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

NOUNS = (
    "river harbour teacher window market engine forest letter garden bridge station doctor mountain painter village "
    "library kitchen captain island journal"
).split()
VERBS = "finds opens carries watches repairs sells paints follows measures describes".split()


class Form(NamedTuple):
    """A data set's form.

    Attributes:
        rows: Made with a random generator and the row's number.
        kind: That is to be guessed, None where none fits.
        options: Of the block; what is not named here may be anything.
        says: Part of a sentence that must be on the page.
        group: `split.group` of the block.
        stops: Whether `prepare` refuses the rows, for want of something beside them.
    """

    rows: Callable[[random.Random, int], dict[str, Any]]
    kind: str | None
    options: dict[str, Any] = {}
    says: str = ""
    group: str | None = None
    stops: bool = False


def text(draw: random.Random, words: int = 8) -> str:
    pairs = [f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.randint(1, 9999)}" for _ in range(words // 3 + 1)]
    return " and ".join(pairs).capitalize() + "."


def asked(draw: random.Random) -> str:
    return f"Who {draw.choice(VERBS)} the {draw.choice(NOUNS)} of {draw.choice(NOUNS)} number {draw.randint(1, 9999)}?"


def four(draw: random.Random, count: int = 4) -> list[str]:
    return [f"The {noun} of {draw.randint(1, 999)}" for noun in draw.sample(NOUNS, count)]


def talk(draw: random.Random, role: str = "role", content: str = "content", names: str = "user assistant") -> list[Any]:
    one, other = names.split()
    turns = draw.randint(1, 3)
    return [
        turn for _ in range(turns) for turn in ({role: one, content: asked(draw)}, {role: other, content: text(draw)})
    ]


def letters(names: list[str], texts: list[str]) -> dict[str, str]:
    return dict(zip(names, texts, strict=True))


def counterfact(draw: random.Random, i: int) -> dict[str, Any]:
    subject = f"{draw.choice(NOUNS).capitalize()} {i}"
    new, true = draw.sample(NOUNS, 2)
    return {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "{} is a kind of",
            "subject": subject,
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"},
        },
        "paraphrase_prompts": [f"People call {subject} a"],
        "neighborhood_prompts": [f"{draw.choice(NOUNS).capitalize()} {i} and others are a"],
    }


def gretel(draw: random.Random, i: int) -> dict[str, Any]:
    table, column = f"t{i}", draw.choice(NOUNS)
    return {
        "sql_prompt": f"How many {column} has table {table} over {draw.randint(1, 99)}?",
        "sql_context": f"CREATE TABLE {table} ({column} INT);",
        "sql": f"SELECT COUNT(*) FROM {table} WHERE {column} > {draw.randint(1, 99)}",
    }


def spider(draw: random.Random, i: int) -> dict[str, Any]:
    row = gretel(draw, i)
    return {"db_id": f"db{i // 4}", "question": row["sql_prompt"], "query": row["sql"], "context": row["sql_context"]}


def squad(draw: random.Random, i: int) -> dict[str, Any]:
    context = text(random.Random(i // 3), 30)  # of each text several questions
    return {
        "id": f"5733{i}",
        "title": f"Title_{i // 6}",
        "context": context,
        "question": asked(draw),
        "answers": {"text": [context[4:12].strip()] * draw.randint(1, 3), "answer_start": [4]},
    }


FORMS: dict[str, Form] = {
    "Alpaca": Form(
        lambda r, i: {"instruction": text(r), "input": text(r) if i % 3 == 0 else "", "output": text(r)},
        "completion",
        {"prompt": "Instruction: {instruction}\nInput: {input}\nOutput:", "completion": "output"},
    ),
    "Dolly": Form(
        lambda r, i: {
            "instruction": asked(r),
            "context": text(r) if i % 2 else "",
            "response": text(r),
            "category": r.choice(["open_qa", "closed_qa", "summarization"]),
        },
        "completion",
        {"prompt": "Instruction: {instruction}\nContext: {context}\nResponse:", "completion": "response"},
    ),
    "OpenAI's prompt and completion": Form(
        lambda r, i: {"prompt": asked(r), "completion": text(r)},
        "completion",
        {"prompt": "prompt", "completion": "completion"},
    ),
    "GSM8K": Form(
        lambda r, i: {"question": asked(r), "answer": f"{text(r, 30)}\n#### {r.randint(1, 99)}"},
        "completion",
        {"prompt": "question", "completion": "answer"},
    ),
    "OpenOrca": Form(
        lambda r, i: {
            "id": f"flan.{i}",
            "system_prompt": "" if i % 2 else "You are an assistant.",
            "question": asked(r),
            "response": text(r),
        },
        "completion",
        {"prompt": "System prompt: {system_prompt}\nQuestion: {question}\nResponse:", "completion": "response"},
    ),
    "OpenAI's messages": Form(
        lambda r, i: {"messages": [{"role": "system", "content": "Be short."}, *talk(r)]},
        "completion",
        {"messages": "messages"},
    ),
    "ShareGPT": Form(
        lambda r, i: {"id": f"x_{i}", "conversations": talk(r, "from", "value", "human gpt")},
        "completion",
        {"messages": "conversations"},
        "ShareGPT's form",
    ),
    "UltraChat": Form(
        lambda r, i: (lambda turns: {"prompt": turns[0]["content"], "prompt_id": f"{i:064x}", "messages": turns})(
            talk(r)
        ),
        "completion",
        {"messages": "messages"},
    ),
    "HH-RLHF": Form(
        lambda r, i: {name: f"\n\nHuman: {asked(r)}\n\nAssistant: {text(r)}" for name in ("chosen", "rejected")},
        None,
        says="preference pairs",
    ),
    "preferences with a prompt": Form(
        lambda r, i: {"prompt": asked(r), "chosen": text(r), "rejected": text(r)},
        "completion",
        {"prompt": "prompt", "completion": "chosen"},
        "no preference is trained",
    ),
    "ARC": Form(
        lambda r, i: {
            "id": f"Mercury_{i}",
            "question": asked(r),
            "choices": {"text": four(r), "label": list("ABCD")},
            "answerKey": r.choice("ABCD"),
        },
        "choice",
        {"question": "question", "options": "choices.text", "answer": "answerKey", "answer_is": "letter"},
    ),
    "CommonsenseQA's file": Form(
        lambda r, i: {
            "answerKey": r.choice("ABCDE"),
            "id": f"{i:032x}",
            "question": {
                "stem": asked(r),
                "choices": [{"label": label, "text": own} for label, own in zip("ABCDE", four(r, 5), strict=True)],
            },
        },
        "choice",
        {"question": "question.stem", "options": "question.choices.*.text", "answer": "answerKey"},
    ),
    "HellaSwag": Form(
        lambda r, i: {
            "ind": i,
            "activity_label": r.choice(["Removing ice", "Cooking", "Roof repair"]),
            "ctx_a": (a := text(r)),
            "ctx_b": (b := "then the man"),
            "ctx": f"{a} {b}",
            "endings": four(r),
            "source_id": f"activitynet~v_{i}",
            "split": "train",
            "label": str(r.randint(0, 3)),
        },
        "choice",
        {"question": "ctx", "options": "endings", "answer": "label", "answer_is": "index0"},
    ),
    "SWAG": Form(
        lambda r, i: {
            "sent1": text(r),
            "startphrase": f"The {r.choice(NOUNS)} number {i}",
            **letters(["ending0", "ending1", "ending2", "ending3"], four(r)),
            "label": r.randint(0, 3),
        },
        "choice",
        {"question": "startphrase", "options": ["ending0", "ending1", "ending2", "ending3"], "answer_is": "index0"},
    ),
    "MMLU": Form(
        lambda r, i: {
            "question": asked(r),
            "subject": r.choice(["anatomy", "astronomy", "virology"]),
            "choices": four(r),
            "answer": r.randint(0, 3),
        },
        "choice",
        {"options": "choices", "answer": "answer", "answer_is": "index0", "subject": "subject"},
    ),
    "MMLU-Pro": Form(
        lambda r, i: {
            "question_id": i,
            "question": asked(r),
            "options": four(r, 4 + i % 7),
            "answer": "ABCD"[i % 4],
            "answer_index": i % 4,
            "category": r.choice(["law", "math"]),
        },
        "choice",
        {"options": "options", "answer": "answer", "answer_is": "letter", "subject": "category"},
    ),
    "MedQA": Form(
        lambda r, i: {
            "question": asked(r),
            "options": (own := letters(list("ABCD"), four(r))),
            "answer_idx": (key := r.choice("ABCD")),
            "answer": own[key],
        },
        "choice",
        {"options": ["options.A", "options.B", "options.C", "options.D"], "answer": "answer", "answer_is": "text"},
    ),
    "RACE": Form(
        lambda r, i: {
            "example_id": f"high{i // 3}.txt",
            "article": text(random.Random(i // 3), 40),
            "answer": r.choice("ABCD"),
            "question": asked(r),
            "options": four(r),
        },
        "choice",
        {"question": "{article}\n{question}", "options": "options", "answer_is": "letter"},
        group="article",
    ),
    "SIQA": Form(
        lambda r, i: {
            "context": text(r),
            "question": asked(r),
            **letters(["answerA", "answerB", "answerC"], four(r, 3)),
            "label": str(r.randint(1, 3)),
        },
        "choice",
        {"question": "{context}\n{question}", "options": ["answerA", "answerB", "answerC"], "answer_is": "index1"},
    ),
    "PIQA": Form(
        lambda r, i: {"goal": asked(r), "sol1": text(r), "sol2": text(r), "label": r.randint(0, 1)},
        "choice",
        {"question": "goal", "options": ["sol1", "sol2"], "answer_is": "index0"},
    ),
    "WinoGrande": Form(
        lambda r, i: {
            "sentence": f"{text(r)} Then _ laughed.",
            **letters(["option1", "option2"], four(r, 2)),
            "answer": r.choice("12"),
        },
        "choice",
        {"question": "sentence", "options": ["option1", "option2"], "answer_is": "index1"},
    ),
    "columns A to D": Form(
        lambda r, i: {
            "Question": asked(r),
            **letters(list("ABCD"), four(r)),
            "Answer": r.choice(["a", "B", "(c)", "D."]),
        },
        "choice",
        {"question": "Question", "options": ["A", "B", "C", "D"], "answer": "Answer", "answer_is": "letter"},
    ),
    "options and the right one as text": Form(
        lambda r, i: {"question": asked(r), "options": (own := four(r)), "answer": r.choice(own)},
        "choice",
        {"options": "options", "answer": "answer", "answer_is": "text"},
    ),
    "SciQ": Form(
        lambda r, i: {
            "question": asked(r),
            **letters(["distractor3", "distractor1", "distractor2", "correct_answer"], four(r)),
            "support": text(r),
        },
        "completion",
        {"prompt": "Support: {support}\nQuestion: {question}\nCorrect answer:", "completion": "correct_answer"},
        "the wrong answers beside it are not used",
    ),
    "several right options": Form(
        lambda r, i: {"question": asked(r), "options": four(r), "correct": r.sample("ABCD", 2)},
        None,
        says="several right options",
    ),
    "BoolQ": Form(
        lambda r, i: {"question": asked(r), "passage": text(r, 40), "answer": bool(i % 3)},
        "completion",
        {"prompt": "Passage: {passage}\nQuestion: {question}\nAnswer:", "completion": "answer"},
    ),
    "SST-2": Form(
        lambda r, i: {"idx": i, "sentence": text(r), "label": r.randint(0, 1)},
        "completion",
        {"prompt": "{sentence}\nLabel:", "completion": "label"},
        "a model learns words",
    ),
    "IMDB with names": Form(
        lambda r, i: {"text": f"{text(r, 20)}<br /><br />{text(r)}", "label": r.choice(["neg", "pos", "pos "])},
        "completion",
        {"prompt": "{text}\nLabel:", "completion": "label"},
        "'pos ' (",
    ),
    "MNLI": Form(
        lambda r, i: {"premise": text(r), "hypothesis": text(r), "label": r.randint(0, 2), "idx": i},
        "completion",
        {"prompt": "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:", "completion": "label"},
    ),
    "SQuAD": Form(
        squad,
        "completion",
        {"prompt": "Context: {context}\nQuestion: {question}\nAnswer:", "completion": "answers.text.0"},
        group="title",
    ),
    "DROP": Form(
        lambda r, i: {
            "section_id": f"nfl_{i}",
            "query_id": f"q{i}",
            "passage": text(r, 30),
            "question": asked(r),
            "answers_spans": {"spans": [str(r.randint(1, 99))], "types": ["number"]},
        },
        "completion",
        {"prompt": "Passage: {passage}\nQuestion: {question}\nAnswer:", "completion": "answers_spans.spans.0"},
    ),
    "TriviaQA": Form(
        lambda r, i: {
            "question": asked(r),
            "answer": {"value": (own := f"{r.choice(NOUNS)} {i}"), "aliases": [own, own.upper()]},
        },
        "completion",
        {"prompt": "question", "completion": "answer.value"},
    ),
    "translation": Form(
        lambda r, i: {"translation": {"de": text(r), "en": text(r)}},
        "completion",
        {"prompt": "translation.de", "completion": "translation.en"},
    ),
    "XSum": Form(
        lambda r, i: {"document": text(r, 60), "summary": text(r), "id": str(i)},
        "completion",
        {"prompt": "document", "completion": "summary"},
    ),
    "HumanEval": Form(
        lambda r, i: {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def f{i}(x):\n    """{text(r)}"""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"assert f{i}(1)",
        },
        "completion",
        {"prompt": "{prompt}", "completion": "{canonical_solution}"},
        "begin with white space",
    ),
    "SQL with other names": Form(
        lambda r, i: (lambda row: {"question": row["sql_prompt"], "context": row["sql_context"], "answer": row["sql"]})(
            gretel(r, i)
        ),
        "completion",
        {"completion": "answer"},
        "rename yours",
    ),
    "Gretel": Form(gretel, "sql", {"databases": None, "must_run": True}),
    "Spider": Form(
        spider, "sql", {"databases": None, "must_run": True}, "options.databases", group="db_id", stops=True
    ),
    "MedMCQA": Form(
        lambda r, i: {"question": asked(r), **letters(["opa", "opb", "opc", "opd"], four(r)), "cop": r.randint(1, 4)},
        "med",
        {"first_option": 1},
    ),
    "MedMCQA on the hub": Form(
        lambda r, i: {"question": asked(r), **letters(["opa", "opb", "opc", "opd"], four(r)), "cop": r.randint(0, 3)},
        "med",
        {"first_option": 0},
    ),
    "CounterFact": Form(counterfact, "fact"),
    "plain text": Form(lambda r, i: {"text": text(r, 40), "url": f"https://example.org/{i}"}, None, says="pretraining"),
    "words and their tags": Form(
        lambda r, i: {"tokens": text(r).split(), "ner_tags": [0] * 8}, None, says="labels of single words"
    ),
    "unknown names": Form(
        lambda r, i: {"nr": i, "frage": asked(r), "antwort": text(r)},
        "completion",
        {"prompt": "frage", "completion": "antwort"},
        "no name is known",
    ),
    "a label of unknown name": Form(
        lambda r, i: {"nr": i, "satz": text(r), "gefuehl": r.choice(["gut", "schlecht", "neutral"])},
        "completion",
        {"prompt": "{satz}\nGefuehl:", "completion": "gefuehl"},
        "no name is known",
    ),
}


def made(name: str, count: int = 60) -> Iterator[dict[str, Any]]:
    """Rows of a form, the same at every call."""
    draw = random.Random(name)
    return (FORMS[name].rows(draw, i) for i in range(count))
