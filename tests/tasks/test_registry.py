import subprocess
import sys
from typing import Any

import pandas as pd
import pytest

from molf.blocks import ChoiceOptions, CompletionOptions, MedOptions, NoOptions, SqlOptions
from molf.tasks import TASKS
from tests.tasks.helpers import rejected

OPTIONS: dict[str, Any] = {
    "sql": SqlOptions(must_run=True),
    "med": MedOptions(first_option=1),
    "fact": NoOptions(),
    "completion": CompletionOptions(prompt="question", completion="answer"),
    "choice": ChoiceOptions(question="question", options=["a", "b"], answer="answer", answer_is="letter"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_the_primary_comes_from_its_components(kind: str) -> None:
    task = TASKS[kind]
    assert kind == task.NAME
    assert task.combine(dict.fromkeys(task.COMPONENTS, 0.5)) == pytest.approx(0.5)
    assert task.BINARY in task.COMPONENTS
    columns = task.columns(OPTIONS[kind])
    assert columns and all(isinstance(name, str) for names in columns for name in names)
    assert task.tolerated(OPTIONS[kind]) == frozenset()


def test_prompts_need_no_heavy_library() -> None:
    code = "import sys, molf.tasks; print({'pandera', 'sqlglot', 'transformers', 'mlflow'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


GOLD: dict[str, tuple[dict[str, Any], list[str]]] = {  # a row, and the columns of its answer
    "sql": ({"sql_prompt": "How many?", "sql_context": "CREATE TABLE t (a INT)", "sql": "SELECT 1"}, ["sql"]),
    "med": ({"question": "Which?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 2}, ["cop"]),
    "fact": (
        {
            "requested_rewrite": {
                "prompt": "{} is in",
                "subject": "Rome",
                "target_new": {"str": "Asia"},
                "target_true": {"str": "Europe"},
            },
            "paraphrase_prompts": ["Where is Rome? In"],
            "neighborhood_prompts": ["Oslo is in"],
        },
        ["paraphrase_prompts", "neighborhood_prompts"],
    ),
    "completion": ({"question": "Which?", "answer": "this"}, ["answer"]),
    "choice": ({"question": "Which?", "a": "this", "b": "that", "answer": "B"}, ["answer"]),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_question_without_its_answer_is_asked_as_in_the_examples(kind: str) -> None:
    task, options = TASKS[kind], OPTIONS[kind]
    row, answers = GOLD[kind]
    whole = pd.DataFrame([row, row], index=[3, 7])
    example = task.to_examples(task.normalise(whole, options), options)
    bare = whole.drop(columns=answers)
    assert any(set(names) <= set(bare.columns) for names in task.asked(options))
    flat = task.normalise(bare, options)
    task.question_schema(options).validate(flat, lazy=True)
    asked = task.questions(flat, options)
    assert asked["prompt"].equals(example["prompt"])
    assert task.right(example["completion"].iloc[0].strip(), example["completion"].iloc[0].strip())
    assert not task.right("", example["completion"].iloc[0].strip())
    if kind in ("med", "choice"):
        assert asked["choices"].tolist() == [[row[name] for name in row if name not in ("question", *answers)]] * 2


def test_a_conversation_is_asked_up_to_its_answer_or_its_end() -> None:
    task, options = TASKS["completion"], CompletionOptions(messages="talk")
    question, answer = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "this"}
    flat = task.normalise(
        pd.DataFrame({"talk": [[question, answer], [question], [question, answer, question]]}), options
    )
    task.question_schema(options).validate(flat, lazy=True)
    asked = task.questions(flat, options)["messages"].tolist()
    assert asked == [[question], [question], [question, answer, question]]
    bad = task.normalise(pd.DataFrame({"talk": [[answer, question], [{"role": "user", "content": " "}], []]}), options)
    assert {check for check, _ in rejected(task.question_schema(options), bad)} == {
        "the assistant has not the first turn",
        "content is not empty",
        "is a list of turns, each with role and content",
    }
