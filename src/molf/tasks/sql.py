"""Text to SQL: Gretel's synthetic_text_to_sql and Spider (Yu et al. 2018), told apart by their columns."""

import logging
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from molf.errors import RunError
from molf.sqlexec import Job, Outcome, SqlExecutor, has_order, same_result
from molf.tasks.columns import is_missing, joined, of_text, prepared, text

if TYPE_CHECKING:
    import pandera.pandas as pa

    from molf.blocks import SqlOptions
    from molf.config import Evaluation
    from molf.evaluation import LanguageModel

NAME = "sql"
PRIMARY = "execution_accuracy"
COMPONENTS = ["execution_accuracy"]
BINARY = "execution_accuracy"
GRETEL = {"sql_prompt": "question", "sql_context": "context", "sql": "query"}
SPIDER = ["db_id", "question", "query", "context"]
ASKED = [["sql_prompt", "sql_context"], ["question", "context"]]  # of both, what a question needs
SQLITE = "sqlite"  # what it says of a query
FILLS, PARSES, RUNS = "context runs", "query is SQL", "query runs in its context"
OF_CONTEXT = "context: "  # begins what the executor says of a context
DEEPEST = 10  # nested parentheses of a query that sqlglot is asked of
SYNTAX = r"syntax error|incomplete input|unrecognized token"


def prompt(context: str, question: str) -> str:
    """The schema, then the question as an SQL comment, then the word that asks for the query."""
    return f"{context}\n\n-- Question: {question}\n-- Query:"


def completion(query: str) -> str:
    return f" {query}"


def columns(options: "SqlOptions") -> list[list[str]]:
    """The raw columns that must be there: one of these lists (Gretel's, Spider's)."""
    return [list(GRETEL), SPIDER]


def asked(options: "SqlOptions") -> list[list[str]]:
    return ASKED


def raw_schema(options: "SqlOptions") -> "pa.DataFrameSchema":
    """Checks normalised rows. Which of the two sets of columns must be there is `columns`' matter."""
    import pandera.pandas as pa
    import pyarrow.compute as pc

    def of_context(said: Any) -> Any:
        return pc.starts_with(said, OF_CONTEXT)

    def is_syntax(said: Any) -> Any:
        return pc.match_substring_regex(said, SYNTAX)

    fills = of_text(lambda said: pc.invert(of_context(said)), FILLS)
    parses = of_text(lambda said: pc.or_(of_context(said), pc.invert(is_syntax(said))), PARSES)
    runs = of_text(lambda said: pc.or_(of_context(said), is_syntax(said)), RUNS)
    return question_schema(options).add_columns(
        {
            **{name: text(required=False) for name in ("sql", "query", "db_id")},
            SQLITE: pa.Column(nullable=True, required=False, checks=[fills, parses, runs]),
        }
    )


def question_schema(options: "SqlOptions") -> "pa.DataFrameSchema":
    import pandera.pandas as pa

    return pa.DataFrameSchema({name: text(required=False) for names in ASKED for name in names})


def tolerated(options: "SqlOptions") -> frozenset[str]:
    """The checks that run the query, unless it must run."""
    return frozenset() if options.must_run else frozenset({FILLS, PARSES, RUNS})


def _spelled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows under our names of the columns, whichever set they are of; without columns of the other set."""
    there = set(frame.columns)
    if set(GRETEL) <= there or set(ASKED[0]) <= there and not set(SPIDER) <= there:
        return frame[[name for name in GRETEL if name in there]].rename(columns=GRETEL)
    return frame


def normalise(frame: pd.DataFrame, options: "SqlOptions") -> pd.DataFrame:
    """Both sets are flat already; a column `sqlite` says why a query does not run, None where it does.

    It runs on its database where there is one, else in its context.
    """
    rows = _spelled(frame)
    names = rows["db_id"] if "db_id" in rows else [None] * len(rows)
    queries = rows["query"] if "query" in rows else [None] * len(rows)
    said: list[str | None] = [None] * len(rows)
    jobs = {}
    for i, (context, query, name) in enumerate(zip(rows["context"], queries, names, strict=True)):
        if isinstance(context, str) and isinstance(query, str):
            file = _database(options.databases, name.strip()) if isinstance(name, str) else None
            jobs[i] = Job(context, query, None if file is None else Path(file))
    with SqlExecutor() as executor:
        for i, outcome in zip(jobs, executor.run_all(jobs.values()), strict=True):
            said[i] = outcome.reason
    # A column of the other set's name is not what that set means by it.
    other = SPIDER if rows is not frame else GRETEL
    own = frame.drop(columns=[name for name in other if name in frame])
    return own.assign(**{SQLITE: pd.Series(said, index=frame.index, dtype=object)})


def prepared_schema() -> "pa.DataFrameSchema":
    return prepared(
        context=text(), question=text(), query=text(), db_id=text(optional=True), database=text(optional=True)
    )


def hint(failures: pd.DataFrame, options: "SqlOptions") -> str | None:
    return None


def questions(frame: pd.DataFrame, options: "SqlOptions") -> pd.DataFrame:
    rows = _spelled(frame)
    pairs = zip(rows["context"], rows["question"], strict=True)
    prompts = [prompt(context.strip(), question.strip()) for context, question in pairs]
    return pd.DataFrame({"prompt": prompts}, index=frame.index)


def to_examples(frame: pd.DataFrame, options: "SqlOptions") -> pd.DataFrame:
    """Valid normalised rows as prompt, completion, context, question, query, db_id and database; the index stays.

    `db_id` is None for Gretel. `database` is the path of the db file, None where there is none;
    `options.databases` must be a folder here.
    """
    rows = _spelled(frame)
    own = {name: [value.strip() for value in rows[name]] for name in ("context", "question", "query")}
    names = [name.strip() for name in rows["db_id"]] if "db_id" in rows else [None] * len(rows)
    files = [_database(options.databases, name) for name in names]
    return pd.DataFrame(
        {
            "prompt": questions(frame, options)["prompt"],
            "completion": [completion(query) for query in own["query"]],
            **own,
            "db_id": pd.Series(names, index=frame.index, dtype=str),
            "database": pd.Series(files, index=frame.index, dtype=str),
        },
        index=frame.index,
    )


def _database(folder: str | None, name: str | None) -> str | None:
    # A name with a slash would reach outside the folder.
    if folder is None or name is None or Path(name).name != name:
        return None
    path = Path(folder) / name / f"{name}.sqlite"
    try:
        return str(path) if path.is_file() else None
    except OSError:  # no file can have so long a name
        return None


def identity(frame: pd.DataFrame, options: "SqlOptions") -> pd.Series:
    """The question and its query; a context is shared by many questions of one database."""
    return joined(_spelled(frame), ["question", "query"])


def combine(means: dict[str, float]) -> float:
    return means["execution_accuracy"]


def predict(lm: "LanguageModel", examples: pd.DataFrame, evaluation: "Evaluation") -> pd.DataFrame:
    """Greedy queries, run beside the gold ones, each in a fresh database.

    Returns:
        example_id, prediction (query), query (gold), and execution_accuracy (0, 1, or NaN where `left_out` says why),
        exact_match, valid_sql (0 or 1); left_out (reason or None), gold_error, error (what SQLite said, or None),
        error_kind (which of `sqlworker.KINDS` the error is, or None).
    """
    predictions = [text.strip() for text in lm.generate(examples["prompt"].tolist(), evaluation.max_new_tokens.sql)]
    contexts, golds, names = (examples[name].tolist() for name in ("context", "query", "db_id"))
    files = [None if is_missing(file) else Path(file) for file in examples["database"]]
    jobs = [
        Job(context, query, file)
        for context, gold, predicted, file in zip(contexts, golds, predictions, files, strict=True)
        for query in (gold, predicted)
    ]
    rows = []
    with SqlExecutor() as executor:
        outcomes = executor.run_all(jobs)
        for predicted, query, db_id, file in zip(predictions, golds, names, files, strict=True):
            gold, outcome = next(outcomes), next(outcomes)
            # Spider's context has tables without rows, on which most queries agree.
            left_out = _left_out(gold, lacks_database=not is_missing(db_id) and file is None)
            rows.append(
                {
                    "execution_accuracy": float("nan")
                    if left_out
                    else float(same_result(gold, outcome, in_order=has_order(query))),
                    "exact_match": float(right(predicted, query)),
                    "valid_sql": float(outcome.ok),
                    "left_out": left_out,
                    "gold_error": gold.reason,
                    "error": outcome.reason,
                    "error_kind": outcome.kind,
                }
            )
    texts = {"left_out": str, "gold_error": str, "error": str, "error_kind": str}
    result = pd.DataFrame({"example_id": examples["example_id"].to_numpy(), "prediction": predictions, "query": golds})
    return result.join(pd.DataFrame(rows).astype(texts))


def _left_out(gold: Outcome, lacks_database: bool) -> str | None:
    if lacks_database:
        return "no_database"
    return None if gold.ok else "gold_does_not_run"


def right(answer: str, gold: str) -> bool:
    """Whether the queries are one in sqlglot's spelling; what may be a text in double quotes keeps its case."""
    if canonical(answer) != canonical(gold):
        return False
    pairs = zip(_quoted(answer), _quoted(gold), strict=False)
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def canonical(query: str) -> str:
    """The query in sqlglot's spelling of SQLite, so that equal ones differ in no space, case or quote.

    What sqlglot cannot parse stays as it is, without the semicolon at its end.
    """
    from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

    try:
        spelled = [
            normalize_identifiers(parsed, dialect="sqlite").sql(dialect="sqlite", identify=True, comments=False)
            for parsed in _statements(query)
        ]
    except Exception:  # of any type, for a model's text finds the parser's own defects as well
        return query.strip().rstrip(";").rstrip()
    return "; ".join(spelled)


def _quoted(query: str) -> list[str | None]:
    """The names of a query's columns in its order; None where they stand without quotes or behind a table's name.

    "Ann" is a text for SQLite where no column has that name, and Spider's queries write most of theirs so.
    """
    from sqlglot import exp

    try:
        columns = [column for parsed in _statements(query) for column in parsed.find_all(exp.Column)]
    except Exception:  # as above
        return []
    return [column.name if column.this.args.get("quoted") and not column.table else None for column in columns]


def _statements(query: str) -> list[Any]:
    """Sqlglot's trees; it raises anything.

    What it takes for a type with arguments it reads twice, so that CHAR( within CHAR( within CHAR( and so on, as a
    model may say it, takes twice the time with each; the benchmarks' own queries go 5 deep.
    """
    from sqlglot.dialects.dialect import Dialect
    from sqlglot.tokens import TokenType

    # It warns of each statement that it passes through unparsed.
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    dialect = Dialect.get_or_raise("sqlite")
    tokens = dialect.tokenize(query)
    steps = {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}
    if max(accumulate(steps.get(token.token_type, 0) for token in tokens), default=0) > DEEPEST:
        raise ValueError(f"parentheses are nested deeper than {DEEPEST}")
    return [parsed for parsed in dialect.parser().parse(tokens, query) if parsed is not None]


def metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """Execution accuracy over the examples that can be judged (`n`), the other two scores over all.

    `errors` counts, by kind, the predictions that do not run.

    Raises:
        RunError: No example can be judged.
    """
    accuracy = float(predictions["execution_accuracy"].mean())
    reasons = {str(reason): int(count) for reason, count in predictions["left_out"].value_counts().items()}
    if is_missing(accuracy):
        raise RunError(
            f"sql: no gold query can be judged ({reasons}); Spider's rows need their databases "
            "(options.databases: the folder or archive with DB/DB.sqlite)"
        )
    return {
        "primary": combine({"execution_accuracy": accuracy}),
        "primary_name": PRIMARY,
        "n": int(predictions["execution_accuracy"].notna().sum()),
        "left_out": reasons,
        "execution_accuracy": accuracy,
        "exact_match": float(predictions["exact_match"].mean()),
        "valid_sql": float(predictions["valid_sql"].mean()),
        "errors": {str(kind): int(count) for kind, count in predictions["error_kind"].value_counts().items()},
    }
