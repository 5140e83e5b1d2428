"""Presets: `tiny` is the whole default; every other holds only what differs from it."""

from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

from molf.config import check_params, editor, read_yaml
from molf.errors import UserError
from molf.paths import atomic

FOLDER = Path(__file__).parent
DEFAULT = "tiny"
# Sections of named blocks: a user's own blocks there survive a preset.
NAMED = ("models", "tasks", "methods")


def names() -> list[str]:
    """All presets, the default first."""
    found = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def descriptions() -> dict[str, str]:
    """The first comment line of each preset's file."""
    texts = {name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8") for name in names()}
    return {name: text.splitlines()[0].lstrip("# ") for name, text in texts.items()}


def differences(name: str) -> dict[str, Any]:
    """What a preset holds.

    Raises:
        UserError: There is no such preset.
    """
    if name not in names():
        raise UserError(f"preset {name!r} is not known; there is {', '.join(names())}")
    return read_yaml(FOLDER / f"{name}.yaml")


def merged(name: str, current: dict[str, Any]) -> dict[str, Any]:
    """`current` with the default's blocks set back and the preset's differences on top; own named blocks stay."""
    result = deepcopy(current)
    for section, value in differences(DEFAULT).items():
        if section in NAMED and isinstance(result.get(section), dict):
            result[section] |= value
        else:
            result[section] = value
    return _overlay(result, differences(name))


def apply(name: str, path: Path, dry_run: bool = False) -> list[str]:
    """Writes a preset into a params file, comments kept.

    Args:
        name: The preset.
        path: The params file.
        dry_run: Only tell.

    Returns:
        A line for each changed key: `key: before -> now`.

    Raises:
        UserError: There is no such preset, or the file does not parse.
    """
    current = read_yaml(path)
    wanted = merged(name, current if isinstance(current, dict) else {})
    check_params(wanted, f"preset {name}")
    changes = _changes(_flat(current), _flat(wanted))
    if changes and not dry_run:
        yaml = editor()
        document = yaml.load(path.read_text(encoding="utf-8"))
        _update(document, wanted)
        text = StringIO()
        yaml.dump(document, text)
        atomic(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
    return changes


def _overlay(base: Any, top: Any) -> Any:
    """Mappings merge, all else is replaced; so is a block whose kind changes."""
    if not (isinstance(base, dict) and isinstance(top, dict)) or base.get("kind") != top.get("kind", base.get("kind")):
        return deepcopy(top)
    return base | {key: _overlay(base.get(key), value) for key, value in top.items()}


def _update(document: Any, wanted: dict[str, Any]) -> None:
    """Changes a round-trip document in place to hold `wanted`."""
    for key in [key for key in document if key not in wanted]:
        del document[key]
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict) and value:
            _update(document[key], value)
        elif key not in document or document[key] != value:
            document[key] = _in_lines(value)


def _in_lines(value: Any) -> Any:
    """The value with each of its lists on one line, as in the file that it goes into."""
    if isinstance(value, dict):
        return {key: _in_lines(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    from ruamel.yaml.comments import CommentedSeq

    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        if key not in now:
            if before[key] == {}:
                continue  # it holds something now, and each of that has its own line
            lines.append(f"  {key}: {before[key]} -> (removed)")
        elif key not in before:
            lines.append(f"  {key}: (new) {now[key]}")
        elif before[key] != now[key]:
            lines.append(f"  {key}: {before[key]} -> {now[key]}")
    return lines
