"""Rows of a file, one by one: JSONL, JSON, CSV, TSV, Parquet, plain, gzip or zstd, from any place that fsspec reaches.

A row that cannot be read is a row all the same, with the check that it failed; only a file that is broken as a whole is
an error.
"""

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from molf.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
# CSV has no types; these columns of the benchmarks hold whole numbers.
WHOLE_NUMBERS = frozenset({"cop", "case_id"})
MAX_LINE = 32 * 2**20  # bytes; a longer one is no row of text but a file gone wrong
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
        suffixes = Path(location).suffixes
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
                    yield from _parquet(file)
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
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{self.location}: cannot be read: {line}") from None

    def _parse(self, stream: IO[bytes]) -> Iterator[Row]:
        if self.format == ".parquet":
            yield from _parquet(io.BytesIO(stream.read()))
            return
        start = stream.peek(2)[:2]  # type: ignore[attr-defined]
        if start in UTF_16:
            raise UserError(f"{self.location}: the file is UTF-16; save it as UTF-8")
        if self.format in (".csv", ".tsv"):
            yield from _csv(self.location, stream, "\t" if self.format == ".tsv" else ",")
        elif self.format == ".jsonl":
            yield from _json_lines(stream)
        else:
            yield from _json(self.location, stream)


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
        self.frame, self.ready, self.whole = self.new(), b"", True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = self.new()
            data = data or self.file.read(1 << 18)
            if not data:
                if not self.whole:
                    raise EOFError
                return 0
            self.ready = self.frame.decompress(data)
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


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines that end with LF, CR LF or CR; None for one over MAX_LINE bytes."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield None
        elif b"\r" in line:
            yield from line.splitlines()
        else:
            yield line


def _json_lines(stream: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream), start=1):
        if line is None:
            yield Row(number, '""', IS_SHORT, ())
            continue
        try:
            text = (line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line).decode()
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
    return Row(number, text, None, record.keys())


def _unread(number: int, text: str, problem: str) -> Row:
    return Row(number, json.dumps(text[:KEPT]), problem, ())


def _json(location: str, stream: IO[bytes]) -> Iterator[Row]:
    """Items of a JSON list, each kept as its own text; or JSON lines under the name of JSON, as many tools write."""
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: byte {error.start} is not UTF-8") from None
    space, find = re.compile(r"\s*"), json.JSONDecoder().raw_decode
    at = space.match(text).end()  # type: ignore[union-attr]
    if text[at : at + 1] == "{":
        first = text[at:].split("\n", 1)
        if len(first) == 2 and first[1].strip() and _row(1, first[0].strip()).problem is None:
            yield from _json_lines(io.BytesIO(text.encode()))
            return
    if text[at : at + 1] != "[":
        found = "an object" if text[at : at + 1] == "{" else "nothing" if at == len(text) else "another value"
        raise UserError(f"{location}: a JSON list of objects is expected, found {found}")
    number, at = 1, space.match(text, at + 1).end()  # type: ignore[union-attr]
    while text[at : at + 1] != "]":
        try:
            _, end = find(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "pos", at)
            line = text.count("\n", 0, where) + 1
            raise UserError(
                f"{location}: row {number} is not JSON (line {line}: {getattr(error, 'msg', 'nested too deeply')}), so "
                "nothing behind it can be read"
            ) from None
        yield _row(number, text[at:end])
        at = space.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] not in (",", "]"):
            raise UserError(f"{location}: the list ends too early, after row {number}; fetch the file again")
        if text[at] == ",":
            at = space.match(text, at + 1).end()  # type: ignore[union-attr]
        number += 1


def _csv(location: str, stream: IO[bytes], delimiter: str) -> Iterator[Row]:
    # Bytes that are no UTF-8 become halves of surrogate pairs, which the checks of each text find.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{location}: the header cannot be read: {error}") from None
    if header[:1] == [""] and len(header) > 1 and "index" not in header:
        header[0] = "index"  # pandas leaves its name out
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or "" in header:
        what = f"names {', '.join(repeated)} twice" if any(repeated) else "has a column without a name"
        raise UserError(f"{location}: the header {what}; each column needs a name of its own")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            over = "field larger" in str(error)
            yield _unread(number, f"lines {number} to {reader.line_num}: {error}", IS_SHORT if over else IS_CSV)
            continue
        if not cells:  # an empty line
            continue
        if len(cells) != len(header):
            yield _unread(number, json.dumps(cells), HAS_FIELDS)
            continue
        yield Row(number, _dump(dict(zip(header, map(_cell, header, cells), strict=True))), None, header)


def _cell(column: str, value: str) -> Any:
    if value == "":
        return None
    return int(value) if column in WHOLE_NUMBERS and re.fullmatch(r"\s*-?\d{1,18}\s*", value) else value


def _parquet(file: IO[bytes]) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=2000):
        for record in batch.to_pylist():
            number += 1
            yield Row(number, _dump(record), None, record.keys())


def as_row(number: int, record: Any) -> Row:
    """A row that is at hand as a mapping."""
    return Row(number, _dump(record), None, record.keys())


def _dump(record: Any) -> str:
    text = json.dumps(record, ensure_ascii=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:  # what no file can hold stays as an escape
        return json.dumps(record, default=_plain)
    return text


def _plain(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
