"""Rows from their source to the files that training reads: fetched as they are, checked, split, described."""

import csv
import hashlib
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
from molf.paths import read_json, write_json, write_parquet
from molf.sources import pinned
from molf.tasks import TASKS

SPLITS = ("train", "validation", "test")
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# CSV has no types; these columns of the benchmarks hold whole numbers.
WHOLE_NUMBERS = frozenset({"cop", "case_id"})
CARVED = 0.1  # share of the rows that a split gets which the source lacks and no limit sizes
MAX_DATABASE = 200 * 2**20  # bytes of one SQLite file in an archive


# --- fetch ---------------------------------------------------------------------------------------------------------


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

                for split, url in located.items():
                    if url_sha256(url) != pinned(f"tasks.{name}", f"sha256:{split}"):
                        raise UserError(
                            f"{key}.files.{split}: {url} is not what sources.lock pins; run `molf pin` to take it"
                        )
            return {split: (location, read_rows(location)) for split, location in located.items()}


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


# --- prepare -------------------------------------------------------------------------------------------------------


def prepare(name: str, block: TaskBlock, raw: Path, directory: Path) -> dict[str, Any]:
    """Checks raw rows one by one and writes what training and evaluation read.

    Args:
        name: The block's key below `tasks`.
        block: Kind, limits, options, `max_rejected`.
        raw: `fetch`'s folder.
        directory: Emptied first; afterwards train, validation, test and rejected.parquet, and summary.json.

    Returns:
        The content of summary.json.

    Raises:
        UserError: More than `max_rejected` of the rows are bad (with a table of reasons), or a split is left empty.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    task, source = TASKS[block.kind], read_json(raw / "source.json")
    options: Any = block.options
    if block.kind == "sql" and options.databases is not None:
        options = options.model_copy(update={"databases": str(raw / "databases")})
    pools: dict[str, pd.DataFrame] = {}
    rejected = []
    counts: dict[str, dict[str, int]] = {}
    for split in source["files"]:
        rows = pd.read_parquet(raw / f"{split}.parquet")
        records = pd.DataFrame([json.loads(text) for text in rows["record"]], index=rows["source_row"], dtype=object)
        for column in next(c for c in task.columns() if set(c) <= set(records.columns)):
            records[column] = records[column].where(records[column].notna(), None)
        flat = task.normalise(records, options)
        bad = _failures(task.raw_schema(options), flat)
        bad.insert(0, "split", split)
        rejected.append(bad)
        good = flat[~flat.index.isin(bad["source_row"])]
        examples = task.to_examples(good, options)
        examples.insert(0, "example_id", [f"{split}-{number}" for number in examples.index])
        doubled = examples.duplicated(["prompt", "completion"])
        pools[split] = examples[~doubled].reset_index(drop=True)
        counts[split] = {
            "raw": len(flat),
            "rejected": len(flat) - len(good),
            "duplicates": int(doubled.sum()),
        }
    failures = pd.concat(rejected, ignore_index=True)
    _refuse_many(name, block, failures, counts, pools)
    write_parquet(directory / "rejected.parquet", failures)
    splits, leaks = _split(name, block, pools)
    for split in SPLITS:
        if not len(splits[split]):
            raise UserError(f"tasks.{name}: no row is left for {split}; give it rows or a smaller limit to the others")
        _own_databases(splits[split], directory)
        task.prepared_schema().validate(splits[split])
        write_parquet(directory / f"{split}.parquet", splits[split])
        counts.setdefault(split, {"raw": 0, "rejected": 0, "duplicates": 0})["kept"] = len(splits[split])
    reasons = failures.drop_duplicates(["split", "source_row", "check"])["check"].value_counts()
    summary = {
        "task": name,
        "kind": block.kind,
        "generated": source["generated"],
        "source": source,
        "rows": counts,
        "reasons": {str(check): int(count) for check, count in reasons.items()},
        "leaks": leaks,
        "data_hash": _data_hash(splits, directory),
    }
    write_json(directory / "summary.json", summary)
    return summary


def _failures(schema: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """Every failed check: source_row, column, check, value."""
    from pandera.errors import SchemaErrors

    columns = ["source_row", "column", "check", "value"]
    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
        whole = cases["schema_context"] == "DataFrameSchema"
        # A check of whole rows comes back once for every column.
        cases = cases.assign(
            column=cases["column"].where(~whole, "(row)"), failure_case=cases["failure_case"].where(~whole, "")
        )
        cases = cases.drop_duplicates(["index", "column", "check"]).sort_values(["index", "column"], kind="stable")
        if cases["index"].isna().any():
            wrong = cases[cases["index"].isna()].iloc[0]
            raise UserError(f"column {wrong['column']}: {wrong['check']}") from None
        return pd.DataFrame(
            {
                "source_row": cases["index"].astype("int64"),
                "column": cases["column"].astype(str),
                "check": cases["check"].astype(str),
                "value": [_shown(value) for value in cases["failure_case"]],
            }
        ).reset_index(drop=True)
    return pd.DataFrame({name: pd.Series(dtype="int64" if name == "source_row" else str) for name in columns})


def _shown(value: object) -> str:
    """A value as text that any file can hold, cut at 200 characters."""
    return str(value).encode("utf-8", "backslashreplace").decode()[:200]


def _refuse_many(
    name: str,
    block: TaskBlock,
    failures: pd.DataFrame,
    counts: dict[str, dict[str, int]],
    pools: dict[str, pd.DataFrame],
) -> None:
    rows, bad = sum(count["raw"] for count in counts.values()), sum(count["rejected"] for count in counts.values())
    if bad <= block.max_rejected * rows and any(map(len, pools.values())):
        return
    lines = [
        f"tasks.{name}: {bad} of {rows} rows are rejected ({bad / rows:.1%}), "
        f"max_rejected allows {block.max_rejected:.1%}:"
    ]
    for (split, column, check), group in failures.groupby(["split", "column", "check"], sort=False):
        first = group.iloc[0]
        shown = f" ({first['value']!r})" if first["value"] else ""
        lines.append(f"    {split}, {column}: {check}: {len(group)} rows, first row {first['source_row']}{shown}")
    if block.kind == "med":
        wrong = set(failures.loc[failures["column"] == "cop", "value"])
        first_option = block.options.first_option
        # Counted from the other end, the wrong values are just the one that lies outside.
        if wrong == {"0"} and first_option == 1 or wrong == {"4"} and first_option == 0:
            lines.append(
                f"    `cop` seems to count from {1 - first_option}: set tasks.{name}.options.first_option to "
                f"{1 - first_option} (every answer would else be shifted by one)"
            )
    raise UserError("\n".join(lines))


def _split(
    name: str, block: TaskBlock, pools: dict[str, pd.DataFrame]
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """The three splits within their limits, and how many rows left one because another holds their prompt."""
    seed, limits = block.split_seed, block.limits
    pool = pools["train"].sample(frac=1, random_state=seed)

    def carve(limit: int | None) -> pd.DataFrame:
        """Cuts rows off the train rows: as many as the limit says, else a tenth, at least one."""
        nonlocal pool
        count = limit or max(1, int(len(pools["train"]) * CARVED))
        part, pool = pool.head(count), pool.iloc[count:]
        return part

    if block.kind == "fact":
        # Trained and scored on the same facts by definition; tuned on others, so the facts are drawn first.
        if "validation" in pools:
            facts, others = pool.head(limits.train or len(pool)), pools["validation"]
        elif limits.train:
            facts, others = pool.head(limits.train), pool.iloc[limits.train :]
        else:
            others = carve(limits.validation)
            facts = pool
        others, seen = _without(others, facts)
        facts = facts.sort_index().reset_index(drop=True)
        validation = _limited(others, limits.validation, seed)
        return {"train": facts, "validation": validation, "test": facts}, {"validation rows also in train": seen}
    test = _limited(pools["test"] if "test" in pools else carve(limits.test), limits.test, seed)
    rest, in_test = _without(pools["validation"] if "validation" in pools else carve(limits.validation), test)
    validation = _limited(rest, limits.validation, seed)
    train, held_out = _without(pool, pd.concat([test, validation]))
    leaks = {"validation rows also in test": in_test, "train rows also in test or validation": held_out}
    return {"train": _limited(train, limits.train, seed), "validation": validation, "test": test}, leaks


def _without(rows: pd.DataFrame, others: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Rows whose prompt stands not among the others', and the number of those left out."""
    seen = rows["prompt"].isin(others["prompt"])
    return rows[~seen], int(seen.sum())


def _limited(pool: pd.DataFrame, limit: int | None, seed: int) -> pd.DataFrame:
    """At most `limit` rows, drawn by the seed, in their order."""
    drawn = pool if limit is None or limit >= len(pool) else pool.sample(n=limit, random_state=seed)
    return drawn.sort_index().reset_index(drop=True)


def _own_databases(frame: pd.DataFrame, directory: Path) -> None:
    """Copies the databases that rows run on beside them, and points the rows there."""
    if "database" not in frame:
        return
    paths: list[str | None] = []
    for value in frame["database"]:
        if not isinstance(value, str):
            paths.append(None)
            continue
        target = directory / "databases" / Path(value).name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(value, target)
        paths.append(str(target))
    frame["database"] = pd.Series(paths, index=frame.index, dtype=str)


def _data_hash(splits: dict[str, pd.DataFrame], directory: Path) -> str:
    """sha256 over the kept rows and their databases, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(split.encode() + splits[split].to_json(orient="records", force_ascii=True).encode())
    for path in sorted((directory / "databases").glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(summary: dict[str, Any]) -> str:
    """What `prepare` did, for the terminal."""
    kind = "generated data" if summary["generated"] else "rows"
    lines = [f"task {summary['task']} ({summary['kind']}), {kind}:"]
    for split, count in summary["rows"].items():
        lines.append(
            f"  {split}: {count.get('kept', 0)} kept of {count['raw']} raw; {count['rejected']} rejected, "
            f"{count['duplicates']} duplicates"
        )
    lines += [f"  rejected: {check}: {count}" for check, count in summary["reasons"].items()]
    lines += [f"  left out: {count} {what}" for what, count in summary["leaks"].items() if count]
    return "\n".join(lines)
