"""Which files are meant, and to which split each belongs."""

import json
import os
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

from molf.blocks import SPLITS
from molf.errors import UserError
from molf.paths import read_json, write_json
from molf.raw import Origin, write_split
from molf.readers import COMPRESSIONS, FORMATS, RowFile

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "heldout"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
COUNTED = re.compile(r"\d+|of|part|shard|chunk|file|split")
LARGE = 200 * 2**20  # bytes; a larger file that cannot be read is not opened a second time
# How files that are not read become ones that are.
CONVERT = {
    ".ndjson": "it is JSONL under another name: rename it to .jsonl",
    ".txt": "a text file has no columns: write JSONL with a prompt and a completion in each row",
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".arrow": "datasets.load_from_disk(FOLDER).to_parquet(FILE) writes Parquet",
    ".feather": "pandas.read_feather(FILE).to_parquet(FILE) writes Parquet",
    ".pkl": "pickles run code and are never loaded; have its owner write Parquet",
    ".pickle": "pickles run code and are never loaded; have its owner write Parquet",
    ".zip": "unpack it and name the file in it",
    ".tar": "unpack it and name the file in it",
    ".bz2": "decompress it, or compress with gzip or zstd",
    ".xz": "decompress it, or compress with gzip or zstd",
}


def is_url(location: str) -> bool:
    return "://" in location


def find(location: str, others: dict[str, str]) -> dict[str, list[str]]:
    """Files by split: `location` is a file of train rows, or a folder whose names tell splits.

    Args:
        location: Path or URL of a file, or path of a folder.
        others: Further files: {split: path or URL}.

    Raises:
        UserError: A folder holds no such files, or those of several data sets.
    """
    files = {"train": [location]}
    if not is_url(location) and Path(location).is_dir():
        files = _in_folder(Path(location))
    for split, other in others.items():
        files[split] = [other]
    for paths in files.values():
        for path in paths:
            _readable(path)
    return {split: files[split] for split in SPLITS if split in files}


def _readable(location: str) -> None:
    suffix = Path(location).suffix.lower()
    if suffix in CONVERT:
        raise UserError(f"{location}: {suffix} is not read; {CONVERT[suffix]}")
    RowFile(location)


def _words(path: Path) -> list[str]:
    return re.findall(r"[a-z]+|\d+", path.name.lower().split(".")[0])


def stem(path: Path) -> str:
    """What a path's last part says beside its split and number, as a task's name; empty if it says nothing."""
    own = re.sub(r"[^a-z0-9_-]+", "-", path.name.lower().split(".")[0]).strip("-_")[:40]
    said = [word for word in _words(path) if word not in SPLIT_WORDS and not COUNTED.fullmatch(word)]
    return own if set(said) - {"data", "dataset"} else ""


def _is_rows(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return path.is_file() and bool(suffixes) and suffixes[-1] in FORMATS


def _in_folder(folder: Path) -> dict[str, list[str]]:
    """Files of a folder, of one level below it too, by the split that their names tell."""
    paths = sorted(path for path in [*folder.glob("*"), *folder.glob("*/*")] if _is_rows(path))
    if not paths:
        raise UserError(f"{folder}: no file in it has a name that ends with {', '.join(FORMATS)}")
    sets: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for path in paths:
        words = [*([] if path.parent == folder else _words(path.parent)), *_words(path)]
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")
        rest = tuple(word for word in words if word not in SPLIT_WORDS and not COUNTED.fullmatch(word))
        sets.setdefault(rest, {}).setdefault(split, []).append(str(path))
    # Beside files that name a split, others are a list of labels, a description and the like.
    named = {rest: found for rest, found in sets.items() if found.keys() - {""}} or sets
    if len(named) > 1:
        lines = [f"{folder} holds files of {len(named)} data sets; name one, and its other splits by --split-of:"]
        for found in list(named.values())[:10]:
            lines.append(f"    {', '.join(Path(path).name for paths in found.values() for path in paths[:3])}")
        raise UserError("\n".join(lines))
    found = next(iter(named.values()))
    if "eval" in found:
        found["test" if "test" not in found else "validation"] = found.pop("eval")
    unnamed = found.pop("", [])
    if "train" not in found:
        if not unnamed:
            raise UserError(f"{folder}: there is {', '.join(found)} and no train file; name the one to train on itself")
        found["train"] = unnamed
    return found


def beside(location: str) -> list[str]:
    """Names of files beside a file that seem to be its other splits."""
    path = Path(location)
    own = _words(path)
    if is_url(location) or not any(SPLIT_WORDS.get(word) == "train" for word in own):
        return []
    rest = [word for word in own if word not in SPLIT_WORDS]
    return [
        other.name
        for other in sorted(path.parent.glob("*"))
        if other != path and _is_rows(other) and [w for w in _words(other) if w not in SPLIT_WORDS] == rest
        if any(word in SPLIT_WORDS for word in _words(other))
    ]


def source(files: dict[str, list[str]]) -> dict[str, Any]:
    """The `source` of a block that names these files."""

    def named(names: list[str]) -> str | list[str]:
        return names[0] if len(names) == 1 else names

    every = [path for paths in files.values() for path in paths]
    if any(map(is_url, every)):
        return {"kind": "url", "path": "sources.lock", "files": {split: named(paths) for split, paths in files.items()}}
    if len(every) == 1:
        return {"kind": "file", "path": _from_here(every[0])}
    folder = Path(os.path.commonpath([Path(path).resolve().parent for path in every]))
    inside = {
        split: named([str(Path(path).resolve().relative_to(folder)) for path in paths])
        for split, paths in files.items()
    }
    return {"kind": "file", "path": _from_here(str(folder)), "files": inside}


def _from_here(path: str) -> str:
    """A path as params.yaml names it: relative to the project's root where it lies there."""
    full, root = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(root)) if full.is_relative_to(root) else path


def spool(files: dict[str, list[str]], directory: Path, most: int | None) -> dict[str, Any]:
    """Reads all rows once and keeps them as `fetch` does.

    Args:
        files: By split.
        directory: Afterwards holds SPLIT.parquet and source.json.
        most: Rows of each split at most; None: all.

    Returns:
        The content of source.json.

    Raises:
        UserError: A file cannot be read, or has no rows; says how a JSON object becomes rows.
    """
    found: dict[str, Any] = {"kind": "file", "generated": False, "name": ""}
    found |= {"files": {}, "columns": {}}
    for split, paths in files.items():
        origins = [Origin(path, RowFile(path) if most is None else islice(RowFile(path), most)) for path in paths]
        try:
            found["files"][split], found["columns"][split] = write_split(
                "inspect", origins, directory / f"{split}.parquet"
            )
        except UserError as error:
            hints = [hint for path in paths if "found an object" in str(error) and (hint := _inside(path))]
            if "without a name" in str(error):
                hints.append("if lines stand above the header, remove them: tail -n +3 FILE begins with the third line")
            raise UserError([*error.problems, *hints]) from None
    write_json(directory / "source.json", found)
    return found


def _inside(location: str) -> str | None:
    """How the object that a JSON file holds becomes rows, where that is plain."""
    path = Path(location)
    try:
        if is_url(location) or path.suffix != ".json" or path.stat().st_size > LARGE:
            return None
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or not held:
        return None

    def text(value: str) -> str:  # as Python has it too, without the quotes that the shell needs
        return json.dumps(value, ensure_ascii=False)

    def command(rows: str) -> str:
        # What stands in the file goes into a line that is pasted: it must not run there.
        code = f"import json; d = json.load(open({text(location)})); [print(json.dumps(r)) for r in {rows}]"
        return f"python -c {shlex.quote(code)} > {shlex.quote(path.with_suffix('.jsonl').name)}"

    start = f"{location} holds"
    lists = [key for key, value in held.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        key = max(lists, key=lambda key: len(held[key]))
        if "paragraphs" in held[key][0]:  # SQuAD's own files
            rows = (
                f'({{"context": p["context"], **q}} for t in d[{text(key)}] for p in t["paragraphs"] for q in p["qas"])'
            )
            return f"{start} texts, each with its questions: {command(rows)}"
        return f"{start} {len(held[key]):,} rows below {key!r}: {command(f'd[{text(key)}]')}"
    if all(isinstance(value, dict) for value in held.values()):
        names = [list(value) for value in held.values()]
        if all(own == names[0] for own in names) and all(name.isdigit() for name in names[0]):  # as pandas writes it
            rows = "(dict(zip(d, v)) for v in zip(*(c.values() for c in d.values())))"
            return f"{start} a column each in {', '.join(map(repr, list(held)[:5]))}: {command(rows)}"
        rows = '({"key": k, **v} for k, v in d.items())'
        return f"{start} {len(held):,} rows, each below a key of its own: {command(rows)}"
    if all(isinstance(value, str | int | float) for value in held.values()):
        rows = '({"question": k, "answer": v} for k, v in d.items())'
        return f"{start} {len(held):,} pairs: {command(rows)}"
    return f"{start} one object with {', '.join(map(repr, list(held)[:5]))}: write a row for each example"


def keep_splits(directory: Path, splits: set[str]) -> None:
    """Takes the other splits out of what `spool` wrote."""
    found = read_json(directory / "source.json")
    for part in ("files", "columns"):
        found[part] = {split: value for split, value in found[part].items() if split in splits}
    write_json(directory / "source.json", found)


def databases(location: str) -> str | None:
    """A folder or archive with SQLite files beside a file, as Spider's download has it."""
    if is_url(location):
        return None
    folder = Path(location) if Path(location).is_dir() else Path(location).parent
    for path in sorted(folder.glob("*")):
        name = path.name.lower()
        if "database" in name and (name.endswith((".tar", ".tar.gz", ".tgz")) or any(path.glob("*/*.sqlite"))):
            return _from_here(str(path))
    return None
