"""What changed in the data sets between two versions: rows, and reasons of rejection; no checkout is touched."""

import json
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from molf.blocks import SPLITS
from molf.errors import UserError, plain
from molf.paths import PREPARED, RAW
from molf.revisions import Revision, Unavailable, WorkingTree
from molf.rowdiff import Rows, compare_tables, unread_rows

WIDTH = 100  # characters of a shown value
KINDS = {"raw": RAW, "prepared": PREPARED}
REJECTED = "rejected.parquet"
STATES = {"same": "no change", "new": "made since", "gone": "gone", "none": "not made, then or now"}


# --- the whole -----------------------------------------------------------------------------------------------------


def changes(
    root: Path,
    revision: str,
    to: str | None,
    blocks: Collection[str],
    task: str | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Compares raw and prepared data of every task, or of one.

    Args:
        root: The project's folder.
        revision: The earlier version, anything that git takes for a commit.
        to: The later one; None takes the working tree.
        blocks: The tasks of params.yaml, which the working tree is asked for.
        task: Compares this one alone.
        key: Column by which rows are told apart; None takes an id where there is one.

    Returns:
        {from, to, tasks: {task: {raw, prepared, reasons, stale}}}. raw and prepared have a `state`: same, changed, new
        (made since), gone, missing (made then, and not here), unavailable (with `problem`), none; `splits`, each as
        `compare_tables` tells it; `files`, of others such as databases: {added, removed, changed}. reasons: those that
        reject another number of rows than before: {split, column, check, before, now, first: {source_row, value}}.
        stale: what lies in the working tree is not what its source and params.yaml make now.

    Raises:
        UserError: There is no such revision, task or key.
    """
    before = Revision(root, revision)
    now: WorkingTree | Revision = WorkingTree(root) if to is None else Revision(root, to)
    later = set(blocks) if isinstance(now, WorkingTree) else _tasks(now)
    names = sorted(_tasks(before) | later)
    if task is not None:
        if task not in names:
            raise UserError(f"there is no task {task} in {before.name} or in {now.name}; there is {', '.join(names)}")
        names = [task]
    result: dict[str, Any] = {}
    for name in names:
        here = name in later
        parts = {kind: _part(before, now, folder / name, here, key) for kind, folder in KINDS.items()}
        made = {part["state"] for part in parts.values()} - {"none", "missing", "gone"}
        stale = isinstance(now, WorkingTree) and bool(made) and _stale(root, name)
        result[name] = {**parts, "reasons": parts["prepared"].pop("reasons", []), "stale": stale}
    ways = {split["by"] for entry in result.values() for kind in KINDS for split in entry[kind]["splits"].values()}
    if key is not None and "place" in ways and key not in ways:
        raise UserError(f"--key {key}: the rows that changed have no such column; without --key an id is looked for")
    return {"from": before.name, "to": now.name, "tasks": result}


def _tasks(version: Revision) -> set[str]:
    """Names of the tasks that have data."""
    return {name for folder in KINDS.values() for name in version.outputs(folder)}


def _stale(root: Path, task: str) -> bool:
    """Whether `fetch` or `prepare` would run now: the files here are not what source and params.yaml make."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return bool(repo.status(targets=[f"fetch@{task}", f"prepare@{task}"]))
    except DvcException:  # such as a stage that waits for another; the comparison is right all the same
        return False


@dataclass(frozen=True)
class _Output:
    """A folder of data at both times, with its files below it; empty where it was not made."""

    folder: Path
    before: Revision
    now: WorkingTree | Revision
    then: set[str]
    here: set[str]

    def equal(self, file: str) -> bool:
        """Whether a file is there at both times with the same bytes."""
        if file not in self.then & self.here:
            return False
        return self.before.md5(self.folder / file) == self.now.md5(self.folder / file)


def _part(
    before: Revision, now: WorkingTree | Revision, folder: Path, expected: bool, key: str | None
) -> dict[str, Any]:
    """Raw or prepared data of a task."""
    part: dict[str, Any] = {"state": "none", "splits": {}, "files": {}}
    try:
        output = _Output(folder, before, now, before.files(folder), now.files(folder) if expected else set())
        if not output.here:
            state = ("missing" if expected else "gone") if output.then else "none"
            return {**part, "state": state}
        part["splits"] = _splits(output, key)
        part["files"] = _others(output)
        part["reasons"] = _reasons(output)
    except Unavailable as error:
        return {"state": "unavailable", "problem": str(error), "splits": {}, "files": {}}
    differ = any(_differs(split) for split in part["splits"].values())
    changed = differ or part["reasons"] or any(part["files"].values())
    part["state"] = "new" if not output.then else "changed" if changed else "same"
    return part


def _differs(split: dict[str, Any]) -> bool:
    numbers = [split[what] for what in ("added", "removed", "changed", "moved_in", "moved_out")]
    return any(numbers) or split["reordered"] or any(split["columns"].values())


def _splits(output: _Output, key: str | None) -> dict[str, dict[str, Any]]:
    """What happened to the rows of each split, read only where the files differ."""
    found, differ = {}, []
    for split in SPLITS:
        name = f"{split}.parquet"
        if output.equal(name) or name in output.here and not output.then:
            with output.now.open(output.folder / name) as file:
                rows = int(pq.ParquetFile(file).metadata.num_rows)
            found[split] = unread_rows(rows if output.then else 0, rows)
        elif name in output.then | output.here:
            differ.append(split)
    with ExitStack() as stack:

        def tables(version: Revision | WorkingTree, files: set[str]) -> dict[str, Rows]:
            paths = {split: output.folder / f"{split}.parquet" for split in differ if f"{split}.parquet" in files}
            return {split: Rows(stack.enter_context(version.open(path))) for split, path in paths.items()}

        if differ:
            before, now = tables(output.before, output.then), tables(output.now, output.here)
            found |= compare_tables(before, now, key)
    return {split: found[split] for split in SPLITS if split in found}


def _others(output: _Output) -> dict[str, list[str]]:
    """Files that are no table, such as databases."""

    def names(files: set[str]) -> set[str]:
        return {file for file in files if not file.endswith((".parquet", ".json"))}

    then, here = names(output.then), names(output.here)
    changed = [file for file in then & here if not output.equal(file)]
    return {"added": sorted(here - then), "removed": sorted(then - here), "changed": sorted(changed)}


def _reasons(output: _Output) -> list[dict[str, Any]]:
    """Reasons of rejection by which another number of rows went than before."""
    if output.equal(REJECTED):
        return []
    then = _rejected(output.before, output.folder / REJECTED) if REJECTED in output.then else {}
    here = _rejected(output.now, output.folder / REJECTED) if REJECTED in output.here else {}
    return [
        {
            **dict(zip(("split", "column", "check"), reason, strict=True)),
            "before": then.get(reason, (0,))[0],
            "now": here.get(reason, (0,))[0],
            "first": (here.get(reason) or then[reason])[1],
        }
        for reason in dict.fromkeys([*here, *then])
        if here.get(reason, (0,))[0] != then.get(reason, (0,))[0]
    ]


def _rejected(version: Revision | WorkingTree, path: Path) -> dict[tuple[str, str, str], tuple[int, dict[str, Any]]]:
    """{(split, column, check): (rows, the first of them)}."""
    with version.open(path) as file:
        table = pq.ParquetFile(file)
        wanted = ("split", "file", "source_row", "column", "check", "value")
        frame = table.read([name for name in wanted if name in table.schema_arrow.names]).to_pandas()
    frame = frame.drop_duplicates([name for name in frame.columns if name != "value"])
    found = {}
    for (split, column, check), rows in frame.groupby(["split", "column", "check"], sort=False):
        first = rows.iloc[0]
        found[split, column, check] = len(rows), {"source_row": int(first["source_row"]), "value": first["value"]}
    return found


# --- shown ---------------------------------------------------------------------------------------------------------


def states(entry: dict[str, Any]) -> dict[str, str]:
    """The state of a task's raw and prepared data."""
    return {kind: entry[kind]["state"] for kind in KINDS}


def table(result: dict[str, Any]) -> str:
    """What `changes` found, for the terminal: what a data set holds is escaped and cut."""
    lines = [f"from {result['from']} to {result['to']}"]
    for name, entry in result["tasks"].items():
        found = set(states(entry).values())
        if found <= {"same", "none"} and not entry["stale"]:
            lines.append(f"{name}: {STATES['same' if 'same' in found else 'none']}")
            continue
        lines.append(name)
        for kind, state in states(entry).items():
            lines += _part_lines(name, kind, state, entry[kind])
        for reason in entry["reasons"]:
            where = f"{reason['split']}, {reason['column']}: {reason['check']}"
            first = f"first row {reason['first']['source_row']}: {_shown(reason['first']['value'])}"
            lines.append(f"  rejected: {where}: {reason['before']:,} -> {reason['now']:,} rows ({first})")
        if entry["stale"]:
            lines.append(f"  not up to date with its source and params.yaml: `dvc repro prepare@{name}`, then again")
    return "\n".join(map(plain, lines))


def _part_lines(task: str, kind: str, state: str, part: dict[str, Any]) -> list[str]:
    match state:
        case "missing":
            return [f"  {kind}: not here; `dvc pull --with-deps prepare@{task}`, or `dvc repro prepare@{task}`"]
        case "unavailable":
            return [f"  {kind}: {part['problem']}"]
        case "new":
            rows = ", ".join(f"{rows['now']:,} {split}" for split, rows in part["splits"].items())
            return [f"  {kind}: {STATES[state]}: {rows} rows"]
        case "changed":
            lines = []
            for split, rows in part["splits"].items():
                lines += _split_lines(f"{kind} {split}", rows) if _differs(rows) else []
            return lines + [f"  {kind}: {what} {file}" for what, files in part["files"].items() for file in files]
    return [f"  {kind}: {STATES[state]}"]


def _split_lines(title: str, rows: dict[str, Any]) -> list[str]:
    numbers = [f"{rows[what]:,} {what}" for what in ("added", "removed", "changed")]
    for what, where in (("moved_in", "from"), ("moved_out", "to")):
        numbers += [f"{rows[what]:,} {where} other splits"] if rows[what] else []
    lines = [f"  {title}: {rows['before']:,} -> {rows['now']:,} rows: {', '.join(numbers)}"]
    if rows["by"] == "place":
        lines[0] += " (no id: a row removed and one added at one place count as changed)" if rows["changed"] else ""
    elif rows["by"] != "content":
        lines[0] += f" (rows told apart by {rows['by']})"
    if rows["reordered"]:
        lines.append("    rows that stayed have another order")
    lines += [f"    {what} column {name}" for what, names in rows["columns"].items() for name in names]
    for what, examples in rows["examples"].items():
        for example in examples:
            start = f"    {what}, {_place(example['place'])}: "
            if what != "changed":
                lines.append(start + _shown(example["fields"]))
                continue
            fields = [f"{name}: {_difference(sides)}" for name, sides in example["fields"].items()]
            lines += (
                [start + fields[0]] if len(fields) == 1 else [start.rstrip(), *(f"      {text}" for text in fields)]
            )
        if rows[what] > len(examples):
            lines.append(f"    {what}: {rows[what] - len(examples):,} more")
    return lines


def _place(place: dict[str, Any]) -> str:
    if "example_id" in place:
        return str(place["example_id"])
    return f"row {place['source_row']}" + (f" of file {place['file'] + 1}" if place.get("file") else "")


def _difference(sides: dict[str, Any]) -> str:
    """`before -> now`, each cut around where they part."""
    texts = [_json(sides[side]) if side in sides else "(none)" for side in ("before", "now")]
    longest, width = max(map(len, texts)), WIDTH // 2
    part = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, part - width // 2) if longest > width else 0
    return " -> ".join(("..." if start else "") + _cut(text[start:], width) for text in texts)


def _shown(value: Any) -> str:
    return _cut(_json(value), WIDTH)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width] + "..."
