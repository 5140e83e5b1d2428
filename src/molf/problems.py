"""What is said of mistakes in params.yaml: a sentence each, with the key as it stands in the file."""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from pydantic import BaseModel, ValidationError

from molf.secrets import concealed, holds_credential

CREDENTIAL = (
    "it holds a credential, and what stands here is committed, recorded and shown; take it out and set an environment "
    'variable instead, such as AWS_SECRET_ACCESS_KEY, HF_TOKEN or FSSPEC_HTTPS (docs/orchestration.md, "Secrets")'
)


def cross_checks(
    raw: dict[str, Any], axes: Iterable[str], training_block: type[BaseModel], gate_block: type[BaseModel]
) -> Iterator[str]:
    """Problems that no single field shows. Works on raw data, so that they are reported beside the fields' own.

    Args:
        raw: params.yaml as plain data.
        axes: Of the grid.
        training_block: Checks `training`, and that with a task's overrides.
        gate_block: Checks a task's overrides of `promotion`.
    """
    grid = raw.get("grid")
    for axis in ("models", "tasks", "methods"):
        wanted = grid.get(axis) if isinstance(grid, dict) else None
        blocks = raw.get(axis)
        if isinstance(wanted, list) and isinstance(blocks, dict):
            for name in wanted:
                if isinstance(name, str) and name not in blocks:
                    yield f"grid.{axis}: there is no {axis}.{name}; there is {', '.join(map(str, blocks))}"
    if isinstance(grid, dict) and all(isinstance(grid.get(axis), list) for axis in axes):
        keys: dict[str, tuple[Any, ...]] = {}
        names_of = [[name for name in grid[axis] if isinstance(name, str)] for axis in ("models", "tasks", "methods")]
        for names in product(*names_of):
            key = "-".join(names)
            other = keys.setdefault(key, names)
            if other != names:
                yield f"grid: {other} and {names} both make the stage name {key}; rename one"
    training, tasks = raw.get("training"), raw.get("tasks")
    shared = [] if training is None else _of_block(training_block, training)  # said of `training` itself already
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        overrides = task.get("training") if isinstance(task, dict) else None
        if not isinstance(overrides, dict) or not isinstance(training, dict):
            continue
        for problem in _of_block(training_block, {**training, **overrides}):
            own = problem["loc"][0] in overrides if problem["loc"] else problem["msg"] not in [p["msg"] for p in shared]
            if own:
                yield sentence(problem, f"tasks.{name}.training")
    yield from _of_promotion(raw.get("promotion"), tasks, gate_block)


def _of_promotion(promotion: Any, tasks: Any, gate_block: type[BaseModel]) -> Iterator[str]:
    """Problems of a task's overrides of `promotion`, each key of which stands for itself."""
    overrides = promotion.get("tasks") if isinstance(promotion, dict) else None
    for name, block in overrides.items() if isinstance(overrides, dict) else ():
        if isinstance(tasks, dict) and name not in tasks:
            yield f"promotion.tasks: there is no tasks.{name}; there is {', '.join(map(str, tasks))}"
        if isinstance(block, dict):
            yield from (sentence(problem, f"promotion.tasks.{name}") for problem in _of_block(gate_block, block))


def credentials(value: Any, key: str = "") -> Iterator[str]:
    """Problems with values that hold a password or a token; none of them shows it.

    Args:
        value: params.yaml, or a part of it, as plain data.
        key: Of that part.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if holds_credential(str(name)):
                yield f"{key or '(top level)'}: {CREDENTIAL}"
            yield from credentials(item, f"{key}.{concealed(name)}" if key else concealed(name))
    elif isinstance(value, list):
        for item in value:
            yield from credentials(item, key)
    elif isinstance(value, str) and holds_credential(value):
        yield f"{key}: {concealed(value)}: {CREDENTIAL}"


def _of_block(block: type[BaseModel], raw: Any) -> list[Any]:
    try:
        block.model_validate(raw)
    except ValidationError as error:
        return list(error.errors())
    return []


def sentence(problem: Any, prefix: str = "") -> str:
    """One of pydantic's errors as `key: what was given, what is allowed`."""
    parts = ([prefix] if prefix else []) + _keys([str(part) for part in problem["loc"]])
    key = concealed(".".join(parts)) or "(top level)"
    context, message = problem.get("ctx", {}), problem["msg"]
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; remove it or correct its spelling"
        case "missing" if key == "grid.tune":  # which files of an earlier molf do not have
            return f"{key}: missing; write tune: [] for no sweep of learning rates"
        case "missing":
            return f"{key}: missing; `molf preset tiny --dry-run` shows every key"
        case "union_tag_invalid":
            return f"{key}.kind: {context['tag']!r} is not known; allowed: {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{key}.kind: missing; it says which keys belong here"
        case "value_error":
            return f"{key}: {context['error']}"
        case _:
            shown = concealed(repr(problem.get("input")))
            return f"{key}: {shown if len(shown) <= 60 else shown[:57] + '...'}: {message[0].lower()}{message[1:]}"


def _keys(path: list[str]) -> list[str]:
    """The path as it stands in the file: without the tags of discriminated unions, which pydantic puts in between."""
    if path[:1] == ["general"]:
        return path[:1] + path[2:]  # section, tag, ...
    if not path or path[0] not in ("models", "tasks", "methods"):
        return path
    keys = path[:2] + path[3:]  # section, name, tag, ...
    return keys[:3] + keys[4:] if keys[2:3] == ["source"] else keys
