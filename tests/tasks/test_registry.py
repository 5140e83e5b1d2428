import subprocess
import sys
from typing import Any

import pytest

from molf.config import ChoiceOptions, CompletionOptions, MedOptions, NoOptions, SqlOptions
from molf.tasks import TASKS

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
