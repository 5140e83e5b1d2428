"""A task's raw rows to the files that training reads: checked, split, described."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from molf.config import TaskBlock
from molf.errors import UserError
from molf.paths import read_json, write_json, write_parquet
from molf.tasks import TASKS

SPLITS = ("train", "validation", "test")
HALF_PAIR = re.compile("[\ud800-\udfff]")
CARVED = 0.1  # share of the rows that a split gets which the source lacks and no limit sizes


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
        records = pd.DataFrame([_record(text) for text in rows["record"]], index=rows["source_row"], dtype=object)
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
        _own_databases(splits[split], directory, name)
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


def _record(text: str) -> dict[str, Any]:
    """A row from its JSON; halves of surrogate pairs, which no file can hold, become NUL, which the checks reject."""
    record: dict[str, Any] = json.loads(text)
    if "\\ud" in text:
        plain = json.dumps(record, ensure_ascii=False)
        record = json.loads(HALF_PAIR.sub(r"\\u0000", plain))
    return record


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
    seed, limits = block.split.seed, block.limits
    pool = pools["train"].sample(frac=1, random_state=seed)

    def carve(limit: int | None) -> pd.DataFrame:
        """Cuts rows off the train rows: as many as the limit says, else a tenth, at least one."""
        nonlocal pool
        count = limit or max(1, int(len(pools["train"]) * CARVED))
        part, pool = pool.head(count), pool.iloc[count:]
        return part

    if block.kind == "fact":
        given = {"source: a test split": "test" in pools, "limits.test": limits.test}
        if any(given.values()):
            why = "fact is scored on the facts that it trains; leave it out"
            raise UserError([f"tasks.{name}.{what}: {why}" for what, has in given.items() if has])
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


def _own_databases(frame: pd.DataFrame, directory: Path, name: str) -> None:
    """Copies the databases that rows run on beside them, and points the rows there.

    Raises:
        UserError: Every row names a database and none is there, so that no query could run.
    """
    if "database" not in frame:
        return
    if (frame["db_id"].notna() & frame["database"].isna()).all():
        raise UserError(
            f"tasks.{name}.options.databases: the queries run on databases such as {frame['db_id'].iloc[0]}, and none "
            "is here; set it to the folder or archive that holds DB/DB.sqlite"
        )
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
        if not count["raw"]:  # the source has no such split
            lines.append(f"  {split}: {count.get('kept', 0)}, taken from the rows above")
            continue
        lines.append(
            f"  {split}: {count.get('kept', 0)} kept of {count['raw']} raw; {count['rejected']} rejected, "
            f"{count['duplicates']} duplicates"
        )
    lines += [f"  rejected: {check}: {count}" for check, count in summary["reasons"].items()]
    lines += [f"  left out: {count} {what}" for what, count in summary["leaks"].items() if count]
    return "\n".join(lines)
