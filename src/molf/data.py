"""A task's raw rows to the files that training reads: checked, split, described."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from molf import copies
from molf.blocks import SPLITS, TaskBlock
from molf.errors import UserError, plain
from molf.paths import atomic, read_json, write_json, write_parquet
from molf.placing import Placing, Pool, once
from molf.tasks import TASKS, Task
from molf.tasks.columns import NotUnicode, is_missing

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 20_000  # rows that are looked at together; memory beside the kept rows does not grow with their number
WHOLE_ROW = "(row)"  # stands for the column where a check is of the whole row
REJECTED = ["split", "file", "source_row", "column", "check", "value", "record"]
SHOWN, RECORD = 200, 2000  # characters of a value, and of a row, that rejected.parquet keeps
FEW = 20  # rows below which shares of answers say nothing
CLASSES = 26  # so many different answers are a choice, more are free text


def prepare(name: str, block: TaskBlock, raw: Path, directory: Path) -> dict[str, Any]:
    """Checks raw rows one by one and writes what training and evaluation read.

    Args:
        name: The block's key below `tasks`.
        block: Kind, limits, options, `max_rejected`.
        raw: `fetch`'s folder.
        directory: Emptied first; afterwards train, validation, test, rejected and copies.parquet, and summary.json.

    Returns:
        The content of summary.json.

    Raises:
        UserError: More than `max_rejected` of the rows are bad (with a table of reasons), a split holds copies of
            another's rows that are not allowed there, or a split is left empty.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    source = read_json(raw / "source.json")
    options: Any = block.options
    if block.kind == "sql" and options.databases is not None:
        options = options.model_copy(update={"databases": str(raw / "databases")})
    _require_group(name, block, source)
    pools: dict[str, Pool] = {}
    counts: dict[str, dict[str, int]] = {}
    bad: list[pd.DataFrame] = []
    doubles: list[pd.DataFrame] = []
    for split in source["files"]:
        pools[split], failures, total = _read(TASKS[block.kind], block, options, source, raw, split)
        bad.append(failures)
        doubled = once(split, pools[split])
        doubles.append(doubled)
        places = failures.loc[failures["rejected"], ["file", "source_row"]].drop_duplicates()
        counts[split] = {"raw": total, "rejected": len(places), "duplicates": len(doubled), "near_duplicates": 0}
    failures = pd.concat(bad, ignore_index=True)
    write_parquet(directory / "rejected.parquet", failures.loc[failures["rejected"], REJECTED])
    _refuse_many(name, block, failures, counts, source, directory)
    placed = Placing(name, block, pools)
    for split, near in placed.near_inside().items():
        counts[split]["near_duplicates"] = near
    write_parquet(directory / "copies.parquet", pd.concat([*doubles, placed.copies()], ignore_index=True))
    placed.refuse_leaks()
    digest = hashlib.sha256()
    described: dict[str, Any] = {"answers": {}, "lengths": {}}
    for split in SPLITS:
        table = placed.table(split)
        if not len(table):
            raise UserError(_nothing_left(name, split, counts, placed.left_out[split]["dropped"]))
        table = _own_databases(table, directory, name)
        _write(directory / f"{split}.parquet", table, TASKS[block.kind], digest, split)
        described["answers"][split], described["lengths"][split] = _answers(table), _lengths(table)
        counts.setdefault(split, dict.fromkeys(("raw", "rejected", "duplicates", "near_duplicates"), 0))
        counts[split] |= {**placed.left_out[split], "kept": len(table)}
    _add_databases(digest, directory)
    summary = {
        "task": name,
        "kind": block.kind,
        "generated": source["generated"],
        "source": source,
        "rows": counts,
        "reasons": _reasons(failures[failures["rejected"]]),
        "noticed": _reasons(failures[~failures["rejected"]]),
        "leaks": placed.leaks,
        **described,
        "data_hash": digest.hexdigest()[:16],
    }
    summary["warnings"] = _warnings(summary)
    write_json(directory / "summary.json", summary)
    return summary


def _require_group(name: str, block: TaskBlock, source: dict[str, Any]) -> None:
    group, there = block.split.group, source["columns"]["train"]
    if group is not None and there and group not in there:  # without columns no row can be read, which is said later
        raise UserError(f"tasks.{name}.split.group: the train rows have no column {group}; there is {', '.join(there)}")


def _nothing_left(name: str, split: str, counts: dict[str, dict[str, int]], dropped: int) -> str:
    own, said = counts.get(split), f"tasks.{name}: no row is left for {split}"
    if own is None:
        return (
            f"{said}, which is cut off the train rows, where equal prompts, a group, and near copies stay together; "
            f"give it a file of its own, give train more rows, or change limits.{split} or split.group"
        )
    gone = (
        f"{own['rejected']:,} are rejected, {own['duplicates']:,} equal others, {dropped:,} are copies of other splits'"
    )
    taken = ", and the other splits take the rest; give them smaller limits or shares, or" if split == "train" else ";"
    return f"{said}: of its {own['raw']:,} rows {gone}{taken} give it more rows"


# --- reading and checking ------------------------------------------------------------------------------------------


def _read(
    task: Task, block: TaskBlock, options: Any, source: dict[str, Any], raw: Path, split: str
) -> tuple[Pool, pd.DataFrame, int]:
    """The good rows of a split, every failed check (REJECTED and whether it rejects), and the number of all rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    file = pq.ParquetFile(raw / f"{split}.parquet")
    several = len(source["files"][split]) > 1
    schema, tolerated = task.raw_schema(options), task.tolerated(options)
    # A row may bring any number of columns that no task asks for.
    asked = {*chain(*task.columns(options)), *schema.columns, *(name.partition(".")[0] for name in schema.columns)}
    tables: list[pa.Table] = []
    arrays: dict[str, list[np.ndarray]] = {"keys": [], "prompts": [], "groups": []}
    signatures, signed = None, 0
    if block.duplicates.similarity is not None:
        # In one piece from the start: to join pieces would take their memory twice. What is not filled takes none.
        signatures = np.empty((file.metadata.num_rows, copies.SLOTS), np.uint32)
    failures = []
    with tqdm(total=file.metadata.num_rows, desc=split, unit=" rows", disable=None, leave=False) as bar:
        for batch in file.iter_batches(batch_size=CHUNK):
            bar.update(len(batch))
            rows = batch.to_pandas()
            broken = rows[rows["problem"].notna()]
            failures.append(_unread(split, broken))
            rows = rows[rows["problem"].isna()]
            if rows.empty:
                continue
            records = [read_record(text) for text in rows["record"]]
            columns = {
                column: pd.Series([record.get(column) for record in records], index=rows.index, dtype=object)
                for column in source["columns"][split]
                if column in asked
            }
            flat = task.normalise(pd.DataFrame(columns), options)
            failed = failed_checks(schema, flat)
            failed["rejected"] = ~failed["check"].isin(tolerated)
            failures.append(_placed(split, failed, rows))
            good = flat[~flat.index.isin(failed.loc[failed["rejected"], "index"])]
            if good.empty:
                continue
            examples = task.to_examples(good, options)
            kept = rows.loc[good.index]
            place = kept["source_row"].astype(str)
            if several:
                place = (kept["file"] + 1).astype(str) + "-" + place
            examples.insert(0, "example_id", split + "-" + place)
            tables.append(pa.Table.from_pandas(examples, preserve_index=False))
            arrays["prompts"].append(copies.exact_keys(examples["prompt"]))
            arrays["keys"].append(copies.exact_keys(examples["prompt"] + "\0" + examples["completion"]))
            if block.split.group is not None:
                groups = [_group(record.get(block.split.group)) for record in records]
                arrays["groups"].append(copies.exact_keys(pd.Series(groups, index=rows.index)[good.index]))
            if signatures is not None:
                signatures[signed : signed + len(good)] = copies.signatures(task.identity(good, options))
                signed += len(good)
    table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({"example_id": []})
    joined = {name: np.concatenate(parts) if parts else None for name, parts in arrays.items()}
    empty = copies.exact_keys([])
    pool = Pool(
        table,
        empty if joined["keys"] is None else joined["keys"],
        empty if joined["prompts"] is None else joined["prompts"],
        joined["groups"],
        None if signatures is None else signatures[:signed],
    )
    return pool, pd.concat(failures, ignore_index=True), file.metadata.num_rows


def read_record(text: str) -> dict[str, Any]:
    """A row from its JSON; texts that no file can hold are marked, so that a check can name them."""
    record: dict[str, Any] = json.loads(text)
    return _marked(record) if "\\ud" in text.lower() else record


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return NotUnicode(value)
    return value


def _group(value: object) -> str:
    """A group's name as text; what is missing or blank has none."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ""
    return json.dumps(value, sort_keys=True, default=str)


def _unread(split: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that could not even be read, as failed checks."""
    texts = [_shown(json.loads(record), RECORD) for record in rows["record"]]
    return pd.DataFrame(
        {
            "split": split,
            "file": rows["file"].astype("int64"),
            "source_row": rows["source_row"],
            "column": WHOLE_ROW,
            "check": rows["problem"].astype(str),
            "value": [text[:SHOWN] for text in texts],
            "record": texts,
            "rejected": True,
        }
    )


def _placed(split: str, failed: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Failed checks with their place in the source."""
    at = rows.loc[failed["index"]]
    return pd.DataFrame(
        {
            "split": split,
            "file": at["file"].to_numpy("int64"),
            "source_row": at["source_row"].to_numpy(),
            "column": failed["column"].to_numpy(),
            "check": failed["check"].to_numpy(),
            "value": failed["value"].to_numpy(),
            "record": [text[:RECORD] for text in at["record"]],
            "rejected": failed["rejected"].to_numpy(),
        }
    )


def failed_checks(schema: Any, frame: pd.DataFrame) -> pd.DataFrame:
    """Every failed check: index, column, check, value."""
    from pandera.errors import SchemaErrors

    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
        whole = cases["schema_context"] == "DataFrameSchema"
        if cases["index"].isna().any():
            wrong = cases[cases["index"].isna()].iloc[0]
            raise UserError(f"column {wrong['column']}: {wrong['check']}") from None
        cases = cases.assign(column=cases["column"].where(~whole, WHOLE_ROW), index=cases["index"].astype("int64"))
        # A check of whole rows comes back once for every column.
        cases = cases.drop_duplicates(["index", "column", "check"]).sort_values(["index", "column"], kind="stable")
        rows = cases["column"] == WHOLE_ROW
        values = [
            _shown(json.dumps(frame.loc[index].to_dict(), default=str, ensure_ascii=False) if of_row else value, SHOWN)
            for index, value, of_row in zip(cases["index"], cases["failure_case"], rows, strict=True)
        ]
        return pd.DataFrame(
            {
                "index": cases["index"].to_numpy(),
                "column": cases["column"].astype(str).to_numpy(),
                "check": cases["check"].astype(str).to_numpy(),
                "value": values,
            }
        )
    none = {
        name: pd.Series(dtype="int64" if name == "index" else str) for name in ("index", "column", "check", "value")
    }
    return pd.DataFrame(none)


def _shown(value: object, most: int) -> str:
    """A value as text that any file can hold, cut."""
    return str(value)[:most].encode("utf-8", "backslashreplace").decode()


def _refuse_many(
    name: str,
    block: TaskBlock,
    failures: pd.DataFrame,
    counts: dict[str, dict[str, int]],
    source: dict[str, Any],
    directory: Path,
) -> None:
    rows, bad = sum(count["raw"] for count in counts.values()), sum(count["rejected"] for count in counts.values())
    if bad / rows <= block.max_rejected and bad < rows:
        return
    lines = [
        f"tasks.{name}: {bad:,} of {rows:,} rows are rejected ({bad / rows:.1%}), "
        f"max_rejected allows {block.max_rejected:.1%}:"
    ]
    rejected = failures[failures["rejected"]]
    for reason in _reasons(rejected):
        first = reason["first"]
        shown = f" ({first['value']!r})" if first["value"] and reason["column"] != WHOLE_ROW else ""
        files = source["files"][reason["split"]]
        shown += f" of {files[first['file']]['from']}" if len(files) > 1 else ""
        lines.append(
            f"    {reason['split']}, {reason['column']}: {reason['check']}: {reason['rows']:,} rows, "
            f"first row {first['source_row']}{shown}"
        )
    hint = TASKS[block.kind].hint(rejected, block.options)
    lines += [f"    {hint}"] if hint else []
    lines.append(f"    each with its value: {directory / 'rejected.parquet'}")
    raise UserError("\n".join(lines))


def _reasons(failures: pd.DataFrame) -> list[dict[str, Any]]:
    """Failed checks by split, column and check, the most frequent first."""
    found = []
    for (split, column, check), group in failures.groupby(["split", "column", "check"], sort=False):
        first = group.iloc[0]
        place = {"file": int(first["file"]), "source_row": int(first["source_row"]), "value": first["value"]}
        found.append({"split": split, "column": column, "check": check, "rows": len(group), "first": place})
    return sorted(found, key=lambda reason: -reason["rows"])


# --- writing and describing ----------------------------------------------------------------------------------------


def _frames(table: "pa.Table") -> Iterator[pd.DataFrame]:
    for start in range(0, len(table), CHUNK):
        yield table.slice(start, CHUNK).to_pandas()


def _write(path: Path, table: "pa.Table", task: Task, digest: Any, split: str) -> None:
    """Checks prepared rows, writes them, and adds them to the digest of the data."""
    import pyarrow.parquet as pq

    schema = task.prepared_schema()
    digest.update(split.encode())
    for frame in _frames(table):
        schema.validate(frame)
        _add(digest, frame)
    atomic(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", row_group_size=CHUNK))


def data_hash(directory: Path) -> str:
    """The hash of a prepared data set, computed anew from its files."""
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(split.encode())
        for batch in pq.ParquetFile(directory / f"{split}.parquet").iter_batches(CHUNK):
            _add(digest, batch.to_pandas())
    _add_databases(digest, directory)
    return digest.hexdigest()[:16]


def _add(digest: Any, frame: pd.DataFrame) -> None:
    digest.update(frame.to_json(orient="records", lines=True, force_ascii=True).encode())


def _add_databases(digest: Any, directory: Path) -> None:
    for path in sorted((directory / "databases").glob("*")):
        digest.update(path.name.encode() + path.read_bytes())


def _own_databases(table: "pa.Table", directory: Path, name: str) -> "pa.Table":
    """Copies the databases that rows run on beside them, and points the rows there.

    Raises:
        UserError: Every row names a database and none is there, so that no query could run.
    """
    import pyarrow as pa

    if "database" not in table.column_names:
        return table
    names, files = table["db_id"].to_pylist(), table["database"].to_pylist()
    if all(name and not file for name, file in zip(names, files, strict=True)):
        raise UserError(
            f"tasks.{name}.options.databases: the queries run on databases such as {names[0]}, and none is here; set "
            "it to the folder or archive that holds DB/DB.sqlite"
        )
    targets = {file: directory / "databases" / Path(file).name for file in set(files) if file}
    for file, target in targets.items():
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    column = pa.array([str(targets[file]) if file else None for file in files], pa.large_string())
    return table.set_column(table.column_names.index("database"), "database", column)


def _answers(table: "pa.Table") -> dict[str, Any]:
    """How the answers are shared out: the most common one, its share, and how many there are."""
    import pyarrow.compute as pc

    answers, rows = table["completion"].value_counts().flatten()
    most = pc.max(rows)
    first = pc.min(answers.filter(pc.equal(rows, most))).as_py()
    share = most.as_py() / len(table)
    return {"most_common": first.strip()[:SHOWN], "share": share, "distinct": len(answers)}


def _lengths(table: "pa.Table") -> dict[str, dict[str, int]]:
    """Characters of prompts and completions: median, 95th percentile, longest."""
    import pyarrow.compute as pc

    found = {}
    for column in ("prompt", "completion"):
        lengths = pc.utf8_length(table[column]).to_numpy()
        low, high = np.percentile(lengths, [50, 95], method="nearest")
        found[column] = {"median": int(low), "p95": int(high), "longest": int(lengths.max())}
    return found


def _warnings(summary: dict[str, Any]) -> list[str]:
    """What a person should know before trusting a score on this data."""
    said = []
    for split, answers in summary["answers"].items():
        # Of few answers one may be half as frequent again as its equal share; of many, half of all.
        fair = 0.5 if answers["distinct"] > CLASSES else max(0.3, 1.5 / answers["distinct"])
        if summary["rows"][split]["kept"] >= FEW and answers["share"] > min(fair, 0.99):
            said.append(
                f"{split}: {answers['share']:.0%} of the answers are {answers['most_common']!r}; a model that always "
                f"says it would be right so often"
            )
    for notice in summary["noticed"]:
        said.append(
            f"{notice['split']}: {notice['rows']:,} rows are kept though they fail '{notice['check']}', the first at "
            f"row {notice['first']['source_row']} ({notice['first']['value']})"
        )
    for split, count in summary["rows"].items():
        if count["near_duplicates"] > 0.05 * max(1, count["raw"]):
            said.append(
                f"{split}: {count['near_duplicates']:,} of {count['raw']:,} rows are near copies of a row before them "
                "(copies.parquet), so it holds less than it seems"
            )
    for leak in summary["leaks"]:
        if not leak["dropped"]:
            said.append(
                f"{leak['exact'] + leak['near']:,} {leak['split']} rows have copies in {leak['of_split']} and are kept "
                "there: scores flatter"
            )
    return said


def describe(summary: dict[str, Any]) -> str:
    """What `prepare` did, for the terminal."""
    kind = "generated data" if summary["generated"] else "rows"
    lines = [f"task {summary['task']} ({summary['kind']}), {kind}:"]
    for split, count in summary["rows"].items():
        if not count["raw"]:  # the source has no such split
            lines.append(f"  {split}: {count['kept']:,}, taken from the rows above")
            continue
        lines.append(
            f"  {split}: {count['kept']:,} of {count['raw']:,} raw; {count['rejected']:,} rejected, "
            f"{count['duplicates']:,} equal copies left out, {count['near_duplicates']:,} near copies kept, "
            f"{count['dropped']:,} copies of other splits left out, {count['limited']:,} over the limit"
        )
    lines += [
        f"  rejected: {reason['split']}, {reason['column']}: {reason['check']}: {reason['rows']:,}"
        for reason in summary["reasons"]
    ]
    for leak in summary["leaks"]:
        verb = "left out" if leak["dropped"] else "kept"
        lines.append(
            f"  {verb}: {leak['exact']:,} {leak['split']} rows whose prompt stands in {leak['of_split']}, "
            f"{leak['near']:,} near copies"
        )
    lines += [f"  WARNING: {text}" for text in summary["warnings"]]
    return "\n".join(map(plain, lines))
