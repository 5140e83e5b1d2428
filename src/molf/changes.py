"""What changed in the data sets between two versions: rows, and reasons of rejection; no checkout is touched.

A version is a git revision, whose files are read out of DVC's cache or remote, or the working tree.
"""

import hashlib
import io
import json
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from molf.config import SPLITS
from molf.errors import UserError, first_line, plain
from molf.paths import PREPARED, RAW
from molf.rowdiff import Rows, compare_tables, unread_rows

WIDTH = 100  # characters of a shown value
KINDS = {"raw": RAW, "prepared": PREPARED}
REJECTED = "rejected.parquet"
STATES = {"same": "no change", "new": "made since", "gone": "gone", "none": "not made, then or now"}


class Unavailable(Exception):
    """A file that a version has and that cannot be had here; the message says why and what to type."""


class WorkingTree:
    """The data sets as they lie in the project's folder."""

    name = "the working tree"

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, folder: Path) -> set[str]:
        base = self.root / folder
        return {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}

    def md5(self, path: Path) -> str:
        with self.open(path) as file:
            return hashlib.file_digest(file, "md5").hexdigest()

    def open(self, path: Path) -> io.BufferedReader:
        return (self.root / path).open("rb")

    def stale(self, task: str) -> bool:
        """Whether `fetch` or `prepare` would run now: the files here are not what source and params.yaml make."""
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(str(self.root)) as repo:
                return bool(repo.status(targets=[f"fetch@{task}", f"prepare@{task}"]))
        except DvcException:  # such as a stage that waits for another; the comparison is right all the same
            return False


class Revision:
    """The data sets at a git revision.

    A file that only the remote has is put into DVC's cache, as `dvc fetch` would.

    Raises:
        UserError: There is no such revision, or no repository.
    """

    def __init__(self, root: Path, revision: str) -> None:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.scm import RevError

        try:
            # The remote of now: that revision may have had none, or another.
            with Repo(str(root)) as repo:
                self._remote: str | None = repo.config["core"].get("remote")
                known = {"core": {"remote": self._remote}, "remote": dict(repo.config["remote"])}
            config = known if self._remote else {}
            # The project may be a folder of a larger repository: paths count from the repository's root.
            self._files = DVCFileSystem(
                str(root), rev=revision, subrepos=True, config=config, repo_factory=partial(Repo, config=config)
            )
            commit: str = self._files.repo.get_rev()
            top = Path(self._files.repo.scm.root_dir)
        except RevError as error:
            raise UserError(f"{error}; `git log --oneline` lists revisions, a branch or tag does too") from None
        except DvcException as error:
            raise UserError(f"{error}: run this in the project's root folder") from None
        self._base = root.resolve().relative_to(top.resolve())
        self.name = revision if commit.startswith(revision) else f"{revision} ({commit[:7]})"

    def tasks(self) -> set[str]:
        """Names of the tasks that have data.

        Raises:
            UserError: DVC cannot read its files of that revision.
        """
        from dvc.exceptions import DvcException

        found = set()
        for folder in KINDS.values():
            try:
                entries = self._files.ls(str(self._base / folder), detail=True)
            except FileNotFoundError:
                continue
            except DvcException as error:
                raise UserError(f"{self.name}: {error}") from None
            found |= {Path(entry["name"]).name for entry in entries if entry.get("md5")}
        return found

    def files(self, folder: Path) -> set[str]:
        base = self._base / folder
        try:
            if not self._files.info(str(base)).get("md5"):  # named in dvc.yaml, and not made then
                return set()
            return {str(Path(name).relative_to(base)) for name in self._files.find(str(base))}
        except FileNotFoundError:
            return set()
        except Exception as error:  # whatever DVC's index and the remote's library raise
            raise self._unavailable(folder, error) from error

    def md5(self, path: Path) -> str:
        return str(self._files.info(str(self._base / path))["md5"])

    def open(self, path: Path) -> IO[bytes]:
        try:
            file: IO[bytes] = self._files.open(str(self._base / path), cache=True)
            return file
        except Exception as error:
            raise self._unavailable(path, error) from error

    def _unavailable(self, path: Path, error: Exception) -> Unavailable:
        here = f"{path} of {self.name} is not in DVC's cache"
        fetch = f"dvc fetch --all-commits {Path(*path.parts[:3])}"
        if self._remote is None:
            return Unavailable(
                f"{here} and there is no remote: `dvc remote add -d NAME URL` (docs/data.md), then `{fetch}`"
            )
        if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
            return Unavailable(
                f"{here}, nor in the remote {self._remote}: who made it types `dvc push --all-commits`, then `{fetch}`"
            )
        return Unavailable(f"{here} and the remote {self._remote} cannot be read ({first_line(error)}): then `{fetch}`")


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
    later = set(blocks) if isinstance(now, WorkingTree) else now.tasks()
    names = sorted(before.tasks() | later)
    if task is not None:
        if task not in names:
            raise UserError(f"there is no task {task} in {before.name} or in {now.name}; there is {', '.join(names)}")
        names = [task]
    result: dict[str, Any] = {}
    for name in names:
        here = name in later
        parts = {kind: _part(before, now, folder / name, here, key) for kind, folder in KINDS.items()}
        made = {part["state"] for part in parts.values()} - {"none", "missing", "gone"}
        stale = isinstance(now, WorkingTree) and bool(made) and now.stale(name)
        result[name] = {**parts, "reasons": parts["prepared"].pop("reasons", []), "stale": stale}
    ways = {split["by"] for entry in result.values() for kind in KINDS for split in entry[kind]["splits"].values()}
    if key is not None and "place" in ways and key not in ways:
        raise UserError(f"--key {key}: the rows that changed have no such column; without --key an id is looked for")
    return {"from": before.name, "to": now.name, "tasks": result}


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
