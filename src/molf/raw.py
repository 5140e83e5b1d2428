"""Raw rows of a task, as their source has them: the built-in generator, files, URLs or a hub data set."""

import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from molf.blocks import SHA, FileSource, GeneratedSource, HubSource, HubText, TaskBlock, UrlSource
from molf.errors import UserError, first_line
from molf.paths import atomic, file_hash, write_json
from molf.readers import Row, RowFile, as_row
from molf.sources import pinned
from molf.tasks import TASKS

MAX_DATABASE = 200 * 2**20  # bytes of one SQLite file in an archive
CHUNK_ROWS, CHUNK_BYTES = 20_000, 32 * 2**20  # of rows that are held before they are written


class Origin(NamedTuple):
    """Where some rows of a split come from.

    Attributes:
        name: As it is shown.
        rows: Each once.
        pin: The sha256 that the file must have, or None.
    """

    name: str
    rows: Iterable[Row]
    pin: str | None = None


def fetch(name: str, block: TaskBlock, directory: Path) -> dict[str, Any]:
    """Brings a task's raw rows into a folder, every row as its source had it.

    A row is kept as JSON text beside its place in the source, so that a value of a wrong type, or a row that cannot
    even be read, survives until `prepare` can name it. Rows pass through in chunks: memory does not grow with them.

    Args:
        name: The block's key below `tasks`.
        block: Where the rows come from.
        directory: Emptied first; afterwards SPLIT.parquet (file, source_row, record, problem) and source.json.

    Returns:
        The content of source.json: kind, generated, name, files {split: [{from, rows, bytes, sha256}]} (bytes
        and sha256 None where there is no file), columns {split: names}, written {split: sha256 of SPLIT.parquet}, for
        a hub set also id, config and revision, for generated rows the seed.

    Raises:
        UserError: A source cannot be read, is empty, is not what sources.lock pins, or lacks a column.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    source = block.source
    files: dict[str, list[dict[str, Any]]] = {}
    columns: dict[str, list[str]] = {}
    wanted = _wanted(name, block)
    for split, origins in _origins(name, block).items():
        files[split], columns[split] = write_split(f"tasks.{name}", origins, directory / f"{split}.parquet")
        if columns[split]:  # else no row can be read, and `prepare` says why
            _require_columns(name, wanted, ", ".join(origin.name for origin in origins), columns[split])
    if "train" not in files:
        there = f"only {', '.join(files)}" if files else "nor any other"
        raise UserError(f"tasks.{name}.source: there is no train split, {there}")
    if block.kind == "sql" and block.options.databases is not None:
        extract_databases(Path(block.options.databases), directory / "databases", f"tasks.{name}.options.databases")
    info: dict[str, Any] = {"kind": source.kind, "generated": isinstance(source, GeneratedSource), "name": name}
    written = {split: file_hash(directory / f"{split}.parquet") for split in files}
    info |= {"files": files, "columns": columns, "written": written}
    if isinstance(source, HubSource):
        info |= {"id": source.id, "config": source.config, "revision": hub_revision(f"tasks.{name}", source)}
    if isinstance(source, GeneratedSource):
        info["seed"] = source.seed
    write_json(directory / "source.json", info)
    return info


def _origins(name: str, block: TaskBlock) -> dict[str, list[Origin]]:
    """Where the rows of each split come from."""
    source, key = block.source, f"tasks.{name}.source"
    match source:
        case GeneratedSource():
            from molf import generate

            try:
                made = generate.rows(block.kind, {split: count for split, count in source.rows.items()}, source.seed)
            except ValueError as error:
                raise UserError(f"{key}.rows: {error}") from None
            return {
                split: [Origin("the built-in generator", map(as_row, range(1, len(rows) + 1), rows))]
                for split, rows in made.items()
            }
        case HubSource():
            revision = hub_revision(f"tasks.{name}", source)
            return {
                split: [Origin(f"{source.id}/{theirs}", hub_rows(f"tasks.{name}.source", source, theirs, revision))]
                for split, theirs in source.splits.items()
            }
        case FileSource():
            if not source.files and Path(source.path).is_dir():
                raise UserError(f"{key}.path: {source.path} is a folder; name its files in {key}.files")
            return {
                split: [Origin(path, RowFile(path)) for path in paths] for split, paths in source.locations().items()
            }
        case UrlSource():
            return {
                split: [Origin(url, RowFile(url), pinned(f"tasks.{name}", f"sha256:{url}")) for url in urls]
                for split, urls in source.locations().items()
            }


def write_split(key: str, origins: list[Origin], path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes the rows of one split.

    Args:
        key: Of the block, for messages.
        origins: Where they come from, in order.
        path: SPLIT.parquet (file, source_row, record, problem).

    Returns:
        What source.json says of its files, and the names of all columns.

    Raises:
        UserError: An origin cannot be read, is empty, or is not what sources.lock pins.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    kinds = {"file": pa.int32(), "source_row": pa.int64(), "record": pa.string(), "problem": pa.string()}
    schema = pa.schema(list(kinds.items()))
    files: list[dict[str, Any]] = []
    columns: dict[str, None] = {}

    def write(temporary: Path) -> None:
        held: list[tuple[int, int, str, str | None]] = []
        size = 0
        with (
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
            tqdm(desc=path.stem, unit=" rows", disable=None, leave=False) as bar,
        ):

            def flush() -> None:
                arrays = [
                    pa.array(values, kind) for values, kind in zip(zip(*held, strict=True), kinds.values(), strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                bar.update(len(held))
                held.clear()

            for number, origin in enumerate(origins):
                count = 0
                for row in origin.rows:
                    count += 1
                    columns.update(dict.fromkeys(row.columns))
                    held.append((number, row.number, row.record, row.problem))
                    size += len(row.record)
                    if len(held) == CHUNK_ROWS or size > CHUNK_BYTES:
                        flush()
                        size = 0
                if not count:
                    raise UserError(f"{key}: {origin.name} has no rows")
                hashed = (origin.rows.bytes, origin.rows.sha256) if isinstance(origin.rows, RowFile) else (None, None)
                if origin.pin not in (None, hashed[1]):
                    raise UserError(
                        f"{key}.source: {origin.name} is not what sources.lock pins; run `molf pin` to take it"
                    )
                files.append({"from": origin.name, "rows": count, "bytes": hashed[0], "sha256": hashed[1]})
            if held:
                flush()

    atomic(path, write)
    return files, list(columns)


def hub_rows(key: str, source: HubSource | HubText, split: str, revision: str) -> Iterator[Row]:
    """The rows of a split of a hub data set.

    Args:
        key: Of the block, for messages.
        source: Names the data set.
        split: By the data set's own name.
        revision: A commit.

    Raises:
        UserError: The data set cannot be loaded.
    """
    import datasets

    try:
        # A local folder has no revisions; tests and offline mirrors load it through the same call.
        local = Path(source.id).is_dir()
        data = datasets.load_dataset(source.id, source.config, split=split, revision=None if local else revision)
    except Exception as error:  # the hub, its cache and the readers of its files raise what they like
        raise UserError(
            f"{key}: {source.id} split {split!r} at {revision} cannot be loaded: {first_line(error)}"
        ) from None
    yield from map(as_row, range(1, len(data) + 1), data)


def hub_revision(key: str, source: HubSource | HubText) -> str:
    """The commit of a hub data set: the one that its block names, or what sources.lock pins for that key."""
    return source.revision if SHA.fullmatch(source.revision) else pinned(key, "revision")


def _wanted(name: str, block: TaskBlock) -> list[list[str]]:
    """The columns of which one list must be there; asked before anything is read, since the options may be wrong."""
    try:
        return TASKS[block.kind].columns(block.options)
    except UserError as error:
        raise UserError([f"tasks.{name}.options: {problem}" for problem in error.problems]) from None


def _require_columns(name: str, wanted: list[list[str]], origin: str, there: list[str]) -> None:
    if not any(set(columns) <= set(there) for columns in wanted):
        nearest = max(wanted, key=lambda columns: len(set(columns) & set(there)))
        lacking = [column for column in nearest if column not in there]
        raise UserError(
            f"tasks.{name}: {origin} lacks the column{'s' if len(lacking) > 1 else ''} {_names(lacking)}; "
            f"there is {_names(there)}"
        )


def _names(columns: list[str]) -> str:
    """Columns' names, in quotes where spaces would hide what they are."""
    return ", ".join(repr(name) if not name or name != name.strip() else name for name in columns)


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
