"""Rows of a file, one by one: JSONL, JSON, CSV, TSV, Parquet, plain, gzip or zstd, from any place that fsspec reaches.

A row that cannot be read is a row all the same, with the check that it failed; only a file that is broken as a whole is
an error.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from molf.errors import UserError, first_line
from molf.tasks import med

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
MAX_LINE = 32 * 2**20  # bytes; a longer one is no row of text but a file gone wrong
MAX_ITEM = 8 * MAX_LINE  # characters in which the end of a list's item is looked for
BATCH = 2000, 64 * 2**20  # rows of Parquet that are held at once, and their bytes
KEPT = 2000  # characters of a row's text that stay when it cannot be read
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

IS_JSON = "is JSON"
IS_OBJECT = "is a JSON object"
KEYS_ONCE = "has each key once"
IS_UTF_8 = "is UTF-8"
IS_SHORT = f"is a line of at most {MAX_LINE // 2**20} MiB"
HAS_FIELDS = "has as many fields as the header"
IS_CSV = "has its quotes in pairs"


class Row(NamedTuple):
    """A row as its file has it.

    Attributes:
        number: Of the line (JSONL, CSV: where the row begins) or of the row (JSON, Parquet), from 1.
        record: The row as JSON text; of a row that cannot be read, the beginning of its text as a JSON string.
        problem: The check that the row failed, or None.
        columns: Names of its fields; empty if it cannot be read.
    """

    number: int
    record: str
    problem: str | None
    columns: Collection[str]


class RowFile:
    """A file's rows, read in one pass.

    Args:
        location: A path, or any URL that fsspec reads; its suffix tells the format.

    Attributes:
        sha256, bytes: Of the file as it lies there; known after the last row.

    Raises:
        UserError: The name tells no format; while reading: the file lacks or is broken.
    """

    def __init__(self, location: str) -> None:
        suffixes = [suffix.lower() for suffix in Path(_file_name(location)).suffixes]
        self.location = location
        self.compression = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSIONS else ""
        kinds = suffixes[: len(suffixes) - bool(self.compression)]
        self.format = kinds[-1] if kinds else ""
        if self.format not in FORMATS:
            raise UserError(
                f"{location}: the format is told by the name; allowed: {', '.join(FORMATS)}, also with .gz or .zst"
            )
        self.sha256, self.bytes = "", 0

    def __iter__(self) -> Iterator[Row]:
        import fsspec

        try:
            with fsspec.open(self.location, "rb") as file:
                digest = _Digest(file)
                if self.format == ".parquet" and not self.compression:
                    # Parquet is read from its end, so its bytes are hashed apart.
                    while digest.read(1 << 20):
                        pass
                    file.seek(0)
                    yield from _parquet(self.location, file)
                else:
                    stream: IO[bytes] = io.BufferedReader(digest, 1 << 20)
                    if self.compression == ".gz":
                        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 20)  # type: ignore[arg-type]
                    elif self.compression == ".zst":
                        stream = io.BufferedReader(_Zstandard(stream), 1 << 20)
                    yield from self._parse(stream)
                    while digest.read(1 << 20):  # what lies behind the last row
                        pass
                self.sha256, self.bytes = digest.hash.hexdigest(), digest.count
        except FileNotFoundError:
            raise UserError(f"{self.location}: there is no such file") from None
        except EOFError:
            raise UserError(f"{self.location}: the compressed file ends too early; fetch it again") from None
        except UserError:
            raise
        except Exception as error:  # whatever a file system or a decompressor raises
            raise UserError(f"{self.location}: cannot be read: {first_line(error)}") from None

    def _parse(self, stream: IO[bytes]) -> Iterator[Row]:
        if self.format == ".parquet":
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(stream, file)
                yield from _parquet(self.location, file)
            return
        start = stream.peek(2)[:2]  # type: ignore[attr-defined]
        if start in UTF_16:
            raise UserError(f"{self.location}: the file is UTF-16; save it as UTF-8")
        if self.format in (".csv", ".tsv"):
            yield from _csv(self.location, stream, "\t" if self.format == ".tsv" else _comma(stream))
        elif self.format == ".jsonl":
            yield from _json_lines(split_lines(stream))
        else:
            yield from _json(self.location, stream)


def _file_name(location: str) -> str:
    """The file's name in a path or URL: without a query, and of chained URLs (`zip://a.csv::b.zip`) the first name."""
    if "://" not in location:
        return location
    parts = [part.split("?")[0].split("#")[0] for part in location.split("::")]
    return next((part for part in parts if Path(part).suffix), location)


class _Digest(io.RawIOBase):
    """A file that counts and hashes what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.count = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        self.hash.update(data)
        self.count += len(data)
        buffer[: len(data)] = data
        return len(data)


class _Zstandard(io.RawIOBase):
    """Decompresses; unlike zstandard's own reader it notices a file that ends too early."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self.file, self.new = file, zstandard.ZstdDecompressor().decompressobj
        # A view, since cutting the front off megabytes of bytes would copy the rest each time.
        self.frame, self.ready, self.whole = self.new(), memoryview(b""), True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = self.new()
            # So little, since a kilobyte of a file made to harm becomes 40 megabytes.
            data = data or self.file.read(1 << 12)
            if not data:
                if not self.whole:
                    raise EOFError
                return 0
            self.ready = memoryview(self.frame.decompress(data))
            self.whole = self.frame.eof
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count


class _Repeated(ValueError):
    """An object has a key twice, so that one of its values would be lost."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _Repeated
    return record


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def split_lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines that end with LF, CR LF or CR; None for one over MAX_LINE bytes."""
    held = b""
    while line := held + stream.readline(MAX_LINE + 1 - len(held)):
        held = b""
        if len(line) <= MAX_LINE and b"\r" not in line:
            yield line
        elif len(line) <= MAX_LINE:
            yield from line.splitlines()
        elif b"\r" in line:  # lines that end with CR, and the beginning of one more
            ended, _, held = line.rpartition(b"\r")
            yield from ended.splitlines()
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield None


def _json_lines(lines: Iterable[bytes | None]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield Row(number, '""', IS_SHORT, ())
            continue
        try:
            text = (line[3:] if number == 1 and line.startswith(codecs.BOM_UTF8) else line).decode()
        except UnicodeDecodeError:
            yield _unread(number, line.decode(errors="backslashreplace"), IS_UTF_8)
            continue
        text = text.strip()
        if text:
            yield _row(number, text)


def _row(number: int, text: str) -> Row:
    """A row from its JSON text."""
    try:
        record = _decode(text)
    except _Repeated:
        return _unread(number, text, KEYS_ONCE)
    except (ValueError, RecursionError):  # a number of over 4,300 digits is a ValueError too
        return _unread(number, text, IS_JSON)
    if not isinstance(record, dict):
        return _unread(number, text, IS_OBJECT)
    if "\\u" in text and not encodable("".join(record)):
        return _unread(number, text, IS_UTF_8)
    return Row(number, text, None, record.keys())


def _unread(number: int, text: str, problem: str) -> Row:
    return Row(number, json.dumps(text[:KEPT]), problem, ())


def encodable(text: str) -> bool:
    """Whether a file can hold the text: bytes that were no UTF-8, and halves of surrogate pairs, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(location: str, stream: IO[bytes]) -> Iterator[Row]:
    """Items of a JSON list, each kept as its own text; or JSON lines under the name of JSON, as many tools write."""
    mark = stream.read(3) if stream.peek(3)[:3] == codecs.BOM_UTF8 else b""  # type: ignore[attr-defined]
    start = b""
    while not start.strip() and (byte := stream.read(1)):
        start += byte
    if start.endswith(b"["):
        yield from _items(location, stream, mark + start)
        return
    found = "another value" if start.strip() else "nothing"
    if start.endswith(b"{"):
        rows = _json_lines(chain(split_lines(io.BytesIO(start + stream.readline(MAX_LINE))), split_lines(stream)))
        first, second = next(rows, None), next(rows, None)
        if first is not None and second is not None and first.problem is None:
            yield from chain([first, second], rows)
            return
        found = "an object"
    raise UserError(f"{location}: a JSON list of objects is expected, found {found}")


class _Text:
    """The text of a JSON file, some of it at a time.

    Args:
        location: For messages.
        stream: Read on from where it is.
        start: What was read of it before.

    Attributes:
        held: Text that is at hand.
        at: Place in it up to which all is done with.
        lines: Line breaks before it.
    """

    def __init__(self, location: str, stream: IO[bytes], start: bytes) -> None:
        self.location, self.stream, self.count, self.lines = location, stream, len(start), start.count(b"\n")
        self.held, self.at, self.decode = "", 0, codecs.getincrementaldecoder("utf-8")().decode

    def more(self) -> bool:
        """Reads on, and drops what is done with; False at the end."""
        # As much again as there is, so that a long value is not tried too often.
        data = self.stream.read(max(1 << 20, len(self.held) - self.at))
        self.count += len(data)
        try:
            text = self.decode(data, not data)
        except UnicodeDecodeError as error:
            at = self.count - len(error.object) + error.start
            raise UserError(f"{self.location}: byte {at} is not UTF-8") from None
        if data:
            self.lines += self.held.count("\n", 0, self.at)
            self.held, self.at = self.held[self.at :] + text, 0
        return bool(data)

    def next(self) -> str:
        """The next character that is no white space, which stays; empty at the end."""
        while True:
            self.at = SPACE.match(self.held, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.held) or not self.more():
                return self.held[self.at : self.at + 1]

    def value(self) -> str:
        """The text of the JSON value that comes next.

        Raises:
            ValueError: It is none.
            RecursionError: It is nested too deeply.
        """
        while True:
            try:
                end = FIND(self.held, self.at)[1]
            except ValueError:
                if len(self.held) - self.at < MAX_ITEM and self.more():
                    continue
                raise
            if end < len(self.held) or not self.more():  # at the border a number may go on
                text, self.at = self.held[self.at : end], end
                return text


SPACE = re.compile(r"[ \t\n\r]*")
# A number may have more digits than Python converts, which is its row's own matter.
FIND = json.JSONDecoder(parse_int=len).raw_decode


def _items(location: str, stream: IO[bytes], start: bytes) -> Iterator[Row]:
    text, number = _Text(location, stream, start), 0
    while text.next() != "]":
        number += 1
        try:
            item = text.value()
        except (ValueError, RecursionError) as error:
            line = text.lines + text.held.count("\n", 0, getattr(error, "pos", text.at)) + 1
            raise UserError(
                f"{location}: row {number} is not JSON (line {line}: {getattr(error, 'msg', 'nested too deeply')}), so "
                "nothing behind it can be read"
            ) from None
        yield _row(number, item) if len(item) <= MAX_LINE else Row(number, '""', IS_SHORT, ())
        if text.next() not in (",", "]"):
            raise UserError(f"{location}: the list ends too early, after row {number}; fetch the file again")
        if text.next() == ",":
            text.at += 1
    text.at += 1
    if text.next():
        raise UserError(f"{location}: more follows behind the list of {number} rows; make it one list, or JSON lines")


class _Long(Exception):
    """A line is too long to be read."""


class _TableLines:
    """The lines of a table, of which some can be read once more.

    Attributes:
        number: Of lines that were given out.
        given: Those since it was emptied; None for one that is too long.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.number = text, 0
        self.given: list[str | None] = []
        self.again: deque[str | None] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self._read()
        self.number += 1
        self.given.append(line)
        if line is None:
            raise _Long
        return line

    def _read(self) -> str | None:
        line = self.text.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) <= MAX_LINE:
            return line
        while line and line[-1] not in "\r\n":
            line = self.text.readline(MAX_LINE)
        return None

    def back(self) -> str:
        """Takes back all given lines but the first, which it returns; empty if that is too long."""
        first, *rest = self.given
        self.again.extendleft(reversed(rest))
        self.number -= len(rest)
        return first or ""


def _comma(stream: IO[bytes]) -> str:
    """What parts a table's columns: commas, or semicolons, as spreadsheets write where the comma is in numbers."""
    header = stream.peek(1)[:65536].split(b"\n", 1)[0]  # type: ignore[attr-defined]
    return ";" if b";" in header and b"," not in header else ","


def _csv(location: str, stream: IO[bytes], delimiter: str) -> Iterator[Row]:
    # Bytes that are no UTF-8 become halves of surrogate pairs, which the checks of each text find.
    lines = _TableLines(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except (csv.Error, _Long) as error:
        raise UserError(f"{location}: the header cannot be read: {str(error) or 'the line is too long'}") from None
    if header[:1] == [""] and len(header) > 1 and "index" not in header:
        header[0] = "index"  # pandas leaves its name out
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or "" in header:
        what = f"names {', '.join(repeated)} twice" if any(repeated) else "has a column without a name"
        raise UserError(f"{location}: the header {what}; each column needs a name of its own")
    if not encodable("".join(header)):
        raise UserError(f"{location}: the header is not UTF-8: {_shown(', '.join(header))}; save the file as UTF-8")
    # CSV has no types; in a table with MedMCQA's columns the last of them holds whole numbers.
    whole = {med.COLUMNS[-1]} if set(med.COLUMNS) <= set(header) else set()
    while True:
        number = lines.number + 1
        lines.given.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _Long):
            # A quote without a partner takes the lines behind it into its field, which may well be rows.
            yield _unread(number, _shown(lines.back()), IS_SHORT if lines.given == [None] else IS_CSV)
            continue
        if not cells:  # an empty line
            continue
        if len(cells) != len(header):
            yield _unread(number, json.dumps(cells), HAS_FIELDS)
            continue
        record = dict(zip(header, cells, strict=True))
        yield Row(number, _dump({name: _cell(value, name in whole) for name, value in record.items()}), None, header)


def _cell(value: str, whole: bool) -> Any:
    if value == "":
        return None
    return int(value) if whole and re.fullmatch(r"\s*-?\d{1,18}\s*", value) else value


def _shown(text: str) -> str:
    """The beginning of a text, its bytes that were no UTF-8 escaped."""
    return text[:KEPT].rstrip("\r\n").encode("utf-8", "surrogateescape").decode(errors="backslashreplace")


def _parquet(location: str, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow.parquet

    table, number = pyarrow.parquet.ParquetFile(file), 0
    names = table.schema_arrow.names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{location}: names the column {', '.join(repeated)} twice; each needs a name of its own")
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    size = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
    for batch in table.iter_batches(batch_size=max(1, min(BATCH[0], BATCH[1] // max(1, size)))):
        for record in batch.to_pylist():
            number += 1
            yield Row(number, _dump(record), None, record.keys())


def as_row(number: int, record: Any) -> Row:
    """A row that is at hand as a mapping."""
    return Row(number, _dump(record), None, record.keys())


def _dump(record: Any) -> str:
    text = json.dumps(record, ensure_ascii=False, default=_plain)
    # What no file can hold stays as an escape.
    return text if encodable(text) else json.dumps(record, default=_plain)


def _plain(value: Any) -> str:
    # Bytes that are no text are found as such by the checks.
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
