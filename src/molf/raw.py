"""Raw rows of a task, as their source has them: the built-in generator, files, URLs or a hub data set."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd

from molf.config import SHA, FileSource, GeneratedSource, HubSource, TaskBlock, UrlSource
from molf.errors import UserError
from molf.paths import write_json, write_parquet
from molf.sources import pinned
from molf.tasks import TASKS

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# CSV has no types; these columns of the benchmarks hold whole numbers.
WHOLE_NUMBERS = frozenset({"cop", "case_id"})
MAX_DATABASE = 200 * 2**20  # bytes of one SQLite file in an archive


def fetch(name: str, block: TaskBlock, directory: Path) -> dict[str, Any]:
    """Brings a task's raw rows into a folder, every row as its source had it.

    A row is kept as JSON text beside its number (from 1) in the source, so that a value of a wrong type survives until
    `prepare` can name it.

    Args:
        name: The block's key below `tasks`.
        block: Where the rows come from.
        directory: Emptied first; afterwards SPLIT.parquet (source_row, record) and source.json.

    Returns:
        The content of source.json: kind, generated, name, files {split: {from, rows}}.

    Raises:
        UserError: A source cannot be read, is empty or lacks a column: with its file, row or column.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    source = block.source
    files: dict[str, Any] = {}
    for split, (origin, rows) in _read_source(name, block).items():
        numbered = list(rows)
        if not numbered:
            raise UserError(f"tasks.{name}: {origin} has no rows")
        _require_columns(name, block.kind, origin, [row for _, row in numbered])
        frame = pd.DataFrame(
            {
                "source_row": pd.Series([number for number, _ in numbered], dtype="int64"),
                "record": [json.dumps(row, default=str) for _, row in numbered],
            }
        )
        write_parquet(directory / f"{split}.parquet", frame)
        files[split] = {"from": origin, "rows": len(numbered)}
    if not files:
        raise UserError(f"tasks.{name}.source: no split is given; at least train is needed")
    if "train" not in files:
        raise UserError(f"tasks.{name}.source: there is no train split, only {', '.join(files)}")
    if block.kind == "sql" and block.options.databases is not None:
        extract_databases(Path(block.options.databases), directory / "databases", f"tasks.{name}.options.databases")
    info = {"kind": source.kind, "generated": isinstance(source, GeneratedSource), "name": name, "files": files}
    if isinstance(source, HubSource):
        info |= {"id": source.id, "revision": _revision(name, source)}
    write_json(directory / "source.json", info)
    return info


def _read_source(name: str, block: TaskBlock) -> dict[str, tuple[str, Iterable[tuple[int, dict[str, Any]]]]]:
    """{split: (where from, its numbered rows)}."""
    source = block.source
    match source:
        case GeneratedSource():
            from molf import generate

            try:
                made = generate.rows(block.kind, {split: count for split, count in source.rows.items()}, source.seed)
            except ValueError as error:
                raise UserError(f"tasks.{name}.source.rows: {error}") from None
            return {split: ("the built-in generator", enumerate(rows, start=1)) for split, rows in made.items()}
        case HubSource():
            return {
                split: (f"{source.id}/{theirs}", _hub_rows(name, source, theirs))
                for split, theirs in source.splits.items()
            }
        case FileSource() | UrlSource():
            key = f"tasks.{name}.source"
            if isinstance(source, FileSource) and not source.files and Path(source.path).is_dir():
                raise UserError(f"{key}.path: {source.path} is a folder; name its files in {key}.files")
            located = source.locations()
            if isinstance(source, UrlSource):
                from molf.sources import url_sha256

                for split, urls in located.items():
                    for url in urls:
                        if url_sha256(url) != pinned(f"tasks.{name}", f"sha256:{url}"):
                            raise UserError(
                                f"{key}.files.{split}: {url} is not what sources.lock pins; run `molf pin` to take it"
                            )
            return {split: (paths[0], read_rows(paths[0])) for split, paths in located.items()}


def read_rows(location: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL, JSON, CSV, TSV or Parquet file, plain, gzip or zstd, numbered from 1 (JSONL: by line).

    Args:
        location: A path, or any URL that fsspec reads.

    Raises:
        UserError: The file lacks, is broken, or a row is none: with file and row.
    """
    import fsspec

    suffixes = Path(location).suffixes
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2 if compression else -1] if len(suffixes) > bool(compression) else ""
    if kind not in FORMATS:
        raise UserError(
            f"{location}: the format is told by the name; allowed: {', '.join(FORMATS)}, also with .gz or .zst"
        )
    try:
        with fsspec.open(location, "rb", compression=compression) as file:
            yield from _parse(location, kind, file)
    except FileNotFoundError:
        raise UserError(f"{location}: there is no such file") from None
    except EOFError:
        raise UserError(f"{location}: the compressed file ends too early; fetch it again") from None
    except UserError:
        raise
    except Exception as error:  # whatever a file system or a decompressor of fsspec raises
        raise UserError(
            f"{location}: cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from None


def _parse(location: str, kind: str, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    if kind == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist(), start=1)
        return
    if kind == ".jsonl":
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _record(location, number, _load_json(location, f"row {number}", line))
        return
    if kind == ".json":
        rows = _load_json(location, "the file", file.read())
        if not isinstance(rows, list):
            raise UserError(f"{location}: a JSON list of objects is expected, found {type(rows).__name__}")
        for number, row in enumerate(rows, start=1):
            yield number, _record(location, number, row)
        return
    try:
        text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: byte {error.start} is not UTF-8") from None
    reader = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
    for number, cells in enumerate(reader, start=1):
        if None in cells or None in cells.values():
            count = len(reader.fieldnames or [])
            raise UserError(f"{location}: row {number} has not the {count} fields of the header")
        yield number, {column: _cell(column, value) for column, value in cells.items()}


def _cell(column: str, value: str) -> Any:
    if value == "":
        return None
    return int(value) if column in WHOLE_NUMBERS and value.strip().lstrip("-").isdigit() else value


def _load_json(location: str, where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: {where}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{location}: {where} is not JSON: {error.msg} at character {error.pos + 1}") from None


def _record(location: str, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: row {number} is {type(row).__name__}, a JSON object is expected")
    return row


def _hub_rows(name: str, source: HubSource, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    revision = _revision(name, source)
    try:
        # A local folder has no revisions; tests and offline mirrors load it through the same call.
        local = Path(source.id).is_dir()
        data = datasets.load_dataset(source.id, source.config, split=split, revision=None if local else revision)
    except Exception as error:  # the hub, its cache and the readers of its files raise what they like
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"tasks.{name}.source: {source.id} split {split!r} at {revision} cannot be loaded: {line}"
        ) from None
    yield from enumerate(data, start=1)


def _revision(name: str, source: HubSource) -> str:
    return source.revision if SHA.fullmatch(source.revision) else pinned(f"tasks.{name}", "revision")


def _require_columns(name: str, kind: str, origin: str, rows: list[dict[str, Any]]) -> None:
    there = dict.fromkeys(key for row in rows for key in row)
    wanted = TASKS[kind].columns()
    if not any(set(columns) <= set(there) for columns in wanted):
        nearest = max(wanted, key=lambda columns: len(set(columns) & set(there)))
        lacking = [column for column in nearest if column not in there]
        raise UserError(
            f"tasks.{name}: {origin} lacks the column{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}; "
            f"there is {', '.join(map(str, there))}"
        )


def extract_databases(source: Path, directory: Path, key: str) -> None:
    """Copies DB/DB.sqlite files out of a folder or tar archive; any other member is passed over.

    Raises:
        UserError: The source lacks or is no archive, holds no database, or one is absurdly large.
    """
    if not source.exists():
        raise UserError(f"{key}: there is no {source}")
    found = 0
    if source.is_dir():
        for path in sorted(source.glob("*/*.sqlite")):
            if path.stem == path.parent.name:
                (directory / path.stem).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / path.stem / path.name)
                found += 1
    else:
        try:
            with tarfile.open(source) as archive:
                for member in archive:
                    # Only the last two names count, so that no member can lie outside the folder.
                    parts = Path(member.name).parts[-2:]
                    if not member.isfile() or len(parts) < 2 or parts[1] != f"{parts[0]}.sqlite" or parts[0] == "..":
                        continue
                    if member.size > MAX_DATABASE:
                        raise UserError(f"{key}: {member.name} is over {MAX_DATABASE:,} bytes")
                    file = archive.extractfile(member)
                    if file is not None:
                        (directory / parts[0]).mkdir(parents=True, exist_ok=True)
                        (directory / parts[0] / parts[1]).write_bytes(file.read())
                        found += 1
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{key}: {source} cannot be read: {error}") from None
    if not found:
        raise UserError(f"{key}: {source} holds no DB/DB.sqlite")
