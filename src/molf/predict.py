"""A file of prompts answered by a cell's model, or by two side by side: rows pass through in chunks."""

import codecs
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from molf import readers
from molf.asking import PROMPT, Answer, Asked, Question
from molf.errors import Interrupted, RunError, UserError, plain
from molf.paths import atomic
from molf.readers import Row, RowFile

STDIN = "-"
BATCHES = 8  # that are held at once, so that they can be of like length
CHUNK_BYTES = 16 * 2**20  # of rows that are held at once
OUTPUTS = (".jsonl", ".csv", ".tsv")
GIVEN = " (given)"  # behind the name of a row's own column that is also one of ours


@dataclass
class Counts:
    """What came of the rows.

    Attributes:
        rows: All.
        failed: Those with an error.
        first: The first error, with its place.
        judged: Those with an answer and a right one.
        right: Of these, the right answers of each cell.
        same: Rows on which two cells say the same.
    """

    rows: int = 0
    failed: int = 0
    first: str = ""
    judged: int = 0
    right: list[int] = field(default_factory=lambda: [0, 0])
    same: int = 0


# --- rows in ---------------------------------------------------------------------------------------------------------


def read(file: str) -> Iterable[Row]:
    """The rows of a file, of a text file or of standard input (`-`) its lines as prompts.

    Raises:
        UserError: There is no such file, or its name tells no format.
    """
    if file == STDIN:
        return prompts(sys.stdin.buffer)
    if file.lower().endswith(".txt"):
        if not Path(file).is_file():
            raise UserError(f"{file}: there is no such file")
        return _text_file(file)
    try:
        return RowFile(file)
    except UserError as error:
        raise UserError(f"{error}; or .txt with a prompt in each line; or - for such lines from a pipe") from None


def _text_file(file: str) -> Iterator[Row]:
    with open(file, "rb") as stream:
        yield from prompts(stream)


def prompts(stream: IO[bytes]) -> Iterator[Row]:
    """Lines as rows with a prompt each; empty ones are left out."""
    for number, line in enumerate(readers.split_lines(stream), start=1):
        if line is None:
            yield Row(number, '""', readers.IS_SHORT, ())
            continue
        try:
            text = (line[3:] if number == 1 and line.startswith(codecs.BOM_UTF8) else line).decode().rstrip("\r\n")
        except UnicodeDecodeError:
            shown = line.decode(errors="backslashreplace")[: readers.KEPT]
            yield Row(number, json.dumps(shown), readers.IS_UTF_8, ())
            continue
        if text.strip():
            yield Row(number, json.dumps({PROMPT: text}), None, (PROMPT,))


def chunks(rows: Iterable[Row], first: int, size: int) -> Iterator[list[Row]]:
    """Rows in lists: a small one, so that the first answers come soon, then larger ones.

    What was read before a file turns out to be broken comes before the error.
    """
    held: list[Row] = []
    length, most = 0, first
    try:
        for row in rows:
            held.append(row)
            length += len(row.record)
            if len(held) >= most or length > CHUNK_BYTES:
                yield held
                held, length, most = [], 0, size
    except UserError:
        if held:
            yield held
        raise
    if held:
        yield held


# --- rows out --------------------------------------------------------------------------------------------------------


def as_record(asked: Asked, question: Question, answers: Sequence[Answer]) -> dict[str, Any]:
    """A row's own columns and ours: the same ones in every row.

    Args:
        asked: Whom.
        question: The row.
        answers: One of each cell; none where the row has an error.
    """
    ours: dict[str, Any] = {PROMPT: question.prompt}
    for i, _ in enumerate(asked.cells):
        name = "other_prediction" if i else "prediction"
        answer = answers[i] if answers else None
        ours[name] = answer.text if answer else None
        if asked.by_letter:
            ours |= {f"{name}_option": answer.option if answer else None}
            ours |= {f"{name}_probability": answer.probability if answer else None}
    if len(asked.cells) > 1:
        ours["same"] = answers[0].text == answers[1].text if answers else None
    ours["gold"] = question.gold
    for i, _ in enumerate(asked.cells):
        judged = answers and question.gold is not None
        ours["other_right" if i else "right"] = (
            asked.task.right(answers[i].text, question.gold or "") if judged else None
        )
    ours["error"] = question.error
    own = {}
    for name, value in question.record.items():
        if name not in ours:
            own[name] = value
        elif value != ours[name]:
            own[f"{name}{GIVEN}"] = value
    return {**own, **ours}


def as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)


def as_text(asked: Asked, question: Question, record: dict[str, Any]) -> str:
    """A row for people: nothing of it can drive the terminal."""
    names = [cell.name for cell in asked.cells]
    width = max(len(name) for name in (*names, PROMPT))

    def line(name: str, text: str) -> str:
        return f"  {name:{width}}  {text}"

    lines = [f"row {question.place}"]
    if question.prompt is not None:
        lines += [line(PROMPT if i == 0 else "", plain(text)) for i, text in enumerate(question.prompt.split("\n"))]
    if question.error is not None:
        return "\n".join([*lines, line("error", plain(question.error))])
    for i, name in enumerate(names):
        key = "other_prediction" if i else "prediction"
        text = plain(record[key]) or "(nothing)"
        if asked.by_letter:
            text += f": {plain(record[f'{key}_option'])} ({record[f'{key}_probability']:.0%})"
        judged = record["other_right" if i else "right"]
        lines.append(line(name, text + ("" if judged is None else "  [right]" if judged else "  [wrong]")))
    if question.gold is not None:
        lines.append(line("gold", plain(question.gold)))
    return "\n".join(lines)


class Output:
    """A file that appears whole at the end; until then, and after an error, its rows are JSON lines in `PATH.part`.

    Raises:
        UserError: The name tells no format that is written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in OUTPUTS:
            raise UserError(f"--out {path}: the format is told by the name; allowed: {', '.join(OUTPUTS)}")
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; give a file's name")
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.columns: dict[str, None] = {}
        self.rows = 0  # that are worth keeping
        self._file = self.part.open("w", encoding="utf-8")

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            if self.path.suffix == ".jsonl":
                os.replace(self.part, self.path)
                return
            atomic(self.path, self._as_table)
        if kind is None or not self.rows:
            self.part.unlink()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            self.columns.update(dict.fromkeys(record))
            self._file.write(as_json(record) + "\n")
        self._file.flush()
        self.rows += len(records)

    def _as_table(self, path: Path) -> None:
        # Only now all columns are known: rows of JSON may each have their own.
        delimiter = "\t" if self.path.suffix == ".tsv" else ","
        with self.part.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(self.columns)
            for line in lines:
                record = json.loads(line)
                table.writerow([_cell(record.get(name)) for name in self.columns])


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else as_json(value)


# --- the whole -------------------------------------------------------------------------------------------------------


def predict(asked: Asked, file: str, out: Path | None, most_rows: int | None, readable: bool) -> Counts | None:
    """Answers every row and writes it, in the file's order.

    Args:
        asked: Whom.
        file: As `read` takes it.
        out: Where the rows go; None: standard output.
        most_rows: So many of the first rows; None: all.
        readable: Whether standard output gets text for people instead of JSON lines.

    Returns:
        What came of the rows; None if who read the output went away, as `head` does.

    Raises:
        UserError: The file cannot be read, or no row of it can be asked.
        Interrupted: With where the rows are that were answered.
    """
    from tqdm import tqdm

    if out is not None and file != STDIN and Path(file).exists() and out.exists() and out.samefile(file):
        raise UserError(f"--out {out} is the file that is asked; give another name")
    size = asked.params.evaluation.batch_size
    # Who types prompts waits for each answer.
    typed = file == STDIN and sys.stdin.isatty()
    rows = islice(iter(read(file)), most_rows)
    counts = Counts()
    with ExitStack() as stack:
        written = None if out is None else stack.enter_context(Output(out))
        bar = stack.enter_context(tqdm(unit=" rows", disable=True if readable else None, leave=False))
        try:
            for chunk in chunks(rows, 1 if typed else size, 1 if typed else BATCHES * size):
                questions = asked.questions(chunk)
                good = [question for question in questions if question.error is None]
                said = asked.answers(good) if good else []
                answered = iter(zip(*said, strict=True))
                records = [as_record(asked, q, () if q.error is not None else next(answered)) for q in questions]
                if written is not None:
                    written.write(records)
                else:
                    pairs = zip(questions, records, strict=True)
                    if not _print(as_text(asked, *pair) if readable else as_json(pair[1]) for pair in pairs):
                        return None
                _count(counts, questions, records)
                bar.update(len(chunk))
        except KeyboardInterrupt:
            raise Interrupted(_kept(counts, written)) from None
        except (UserError, RunError) as error:
            if counts.rows:
                raise type(error)(f"{error}\n{_kept(counts, written)}") from None
            raise
        if not counts.rows:
            raise UserError(f"{'standard input' if file == STDIN else file} has no rows")
        if counts.failed == counts.rows:
            if written is not None:
                written.rows = 0
            raise UserError(f"no row of {file} can be asked, the first because: {counts.first}")
    return counts


def _print(lines: Iterable[str]) -> bool:
    """Prints lines; false once nobody reads them any more."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python complains at its end, when it flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _count(counts: Counts, questions: Sequence[Question], records: Sequence[dict[str, Any]]) -> None:
    for question, record in zip(questions, records, strict=True):
        counts.rows += 1
        if question.error is not None:
            counts.failed += 1
            counts.first = counts.first or f"row {question.place}: {question.error}"
            continue
        counts.same += bool(record.get("same"))
        if question.gold is not None:
            counts.judged += 1
            counts.right[0] += record["right"]
            counts.right[1] += record.get("other_right", 0)


def _kept(counts: Counts, written: Output | None) -> str:
    where = f", as JSON lines in {written.part}" if written is not None and counts.rows else ""
    return f"{counts.rows:,} rows were answered{where}"


def summary(asked: Asked, counts: Counts, out: Path | None) -> list[str]:
    """What is said at the end."""
    answered = counts.rows - counts.failed
    lines = [f"{counts.rows:,} rows: {answered:,} answered, {counts.failed:,} with an error"]
    if counts.failed:
        lines[0] += f" (first: {counts.first})"
    if counts.judged:
        for cell, right in zip(asked.cells, counts.right, strict=False):
            lines.append(f"{cell.name}: {right:,} of {counts.judged:,} with a gold answer right")
    if len(asked.cells) > 1:
        lines.append(f"the same answer: {counts.same:,} of {answered:,}")
    if out is not None:
        lines.append(f"written: {out}")
    name = asked.cells[0].name
    lines.append(f"next: molf lineage {name}" if len(asked.cells) > 1 else f"next: molf predict {name} ... --with CELL")
    return [plain(line) for line in lines]
