import subprocess
import sys

import pytest

from molf.tasks import TASKS


@pytest.mark.parametrize("kind", TASKS)
def test_the_primary_comes_from_its_components(kind: str) -> None:
    task = TASKS[kind]
    assert kind == task.NAME
    assert task.combine(dict.fromkeys(task.COMPONENTS, 0.5)) == pytest.approx(0.5)
    assert task.BINARY in task.COMPONENTS
    assert task.columns() and all(isinstance(name, str) for names in task.columns() for name in names)


def test_prompts_need_no_heavy_library() -> None:
    code = "import sys, molf.tasks; print({'pandera', 'sqlglot', 'transformers', 'mlflow'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
