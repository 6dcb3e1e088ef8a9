"""Documents out of files: .txt .md .jsonl .json .csv .parquet, each also as .gz, one by one and with their place.

A text file is one document; elsewhere each row is one. What of a row is the document, `extract(row, where)` says.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from trainer.bounds import open_unpacked
from trainer.data.values import table_row
from trainer.errors import UserError

PARQUET_ROWS, PARQUET_BYTES = 1000, 1 << 30  # that are read at once, and what they may take


class Document(str):
    """A document's text that knows where it comes from: a file and line."""

    __slots__ = ("where",)
    where: str

    def __new__(cls, text: str, where: str) -> Document:
        document = super().__new__(cls, text)
        document.where = where
        return document


class Extractor(Protocol):
    """Makes a document of a row; see rows.DocumentExtractor."""

    def __call__(self, row: Any, where: str) -> Document:
        """Return the document, '' for an empty one; raise UserError for a row of another shape."""
        ...

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        """Return those of a table's columns that a document is made of; raise UserError if it has none such."""
        ...


TEXT_FORMS = {".txt", ".md"}
# How columns are called that hold a question and its answer, the likeliest first.
QUESTIONS = ("prompt", "question", "query", "problem", "instruction", "input", "user", "source")
ANSWERS = ("completion", "answer", "response", "solution", "output", "assistant", "target", "reply", "summary")
FORMS = TEXT_FORMS | {".jsonl", ".json", ".csv", ".parquet"}


def form_of(path: Path) -> str | None:
    """Return the file's form (its suffix without .gz), or None for one that isn't known."""
    name = path.name.lower().removesuffix(".gz")
    return next((form for form in sorted(FORMS, reverse=True) if name.endswith(form)), None)


def find_files(path: Path) -> list[Path]:
    """Return the data files at `path` (a file, a folder to search through, or a pattern), sorted, none hidden.

    Raises UserError where there is none.
    """
    known = ", ".join(sorted(FORMS))
    if not path.exists():
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise UserError(f"{path}: no such file or folder")
        return [file for found in files for file in find_files(found)]
    if path.is_file():
        if not form_of(path):
            raise UserError(f"{path}: no known form: rename it to one of {known}")
        return [path]
    files = sorted(
        file for file in path.rglob("*")
        if file.is_file() and form_of(file) and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path}: no data files in this folder; known forms: {known}")
    return files


def describe(files: list[Path]) -> str:
    """Return what was recognised, like '3 .md files, 1 .csv file'."""
    counts = Counter(str(form_of(file)) for file in files)
    return ", ".join(f"{n:,} {form} file{'s' * (n > 1)}" for form, n in sorted(counts.items()))


def read_documents(files: list[Path], extract: Extractor) -> Iterator[Document]:
    """Yield every document's text, empty ones included; raise a UserError with file and line for an unreadable row."""
    for path in files:
        try:
            yield from READERS[str(form_of(path))](path, extract)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, decompressing .gz."""
    return open_unpacked(path) if path.name.lower().endswith(".gz") else path.open("rb")


def decode(raw: bytes, path: Path, line: int) -> str:
    """Decode UTF-8 that begins at `line`;a UserError names the line that isn't UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = line + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{bad}: not UTF-8 ({error.reason}). Convert it: iconv -f ENCODING -t UTF-8") from None


def text_of(row: Any, column: str, where: str) -> str:
    """Return a row's text; '' for a null; raise a UserError for a row of another shape."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object or a string, not a {type(row).__name__}")
    if column not in row:
        names = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: no column '{column}'; it has {names}. {what_they_may_be(row)}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column '{column}' holds a {type(text).__name__}, not text")
    return text


def what_they_may_be(names: Iterable[str]) -> str:
    """Return the flag that says what columns hold, as far as their names tell."""
    known = {str(name).lower(): str(name) for name in names}
    asked, said = (next((known[name] for name in likely if name in known), None) for likely in (QUESTIONS, ANSWERS))
    if asked and said:
        return f"Say what they are: --columns prompt={asked},completion={said}, or choose one: --text_column NAME"
    return "Choose one: --text_column NAME, or say what they are: --columns prompt=NAME,completion=NAME"


def read_text(path: Path, extract: Extractor) -> Iterator[Document]:
    """Yield a whole text file."""
    with open_bytes(path) as file:
        yield extract(decode(file.read(), path, 1), str(path))


def read_jsonl(path: Path, extract: Extractor) -> Iterator[Document]:
    """Yield the document of each line's object or string; blank lines don't count."""
    with open_bytes(path) as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    row = json.loads(decode(raw, path, line))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{line}: not JSON: {what_is_wrong(error)}") from None
                yield extract(row, f"{path}:{line}")


def what_is_wrong(error: Exception) -> str:
    """Return why JSON can't be read: bad syntax, nested too deep, or a number with thousands of digits."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]


def read_json(path: Path, extract: Extractor) -> Iterator[Document]:
    """Yield the documents of a JSON array; a file with an object a line is read as .jsonl."""
    with open_bytes(path) as file:
        text = decode(file.read(), path, 1)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        yield from read_jsonl(path, extract)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {what_is_wrong(error)}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield extract(row, f"{path}: row {number}")


def read_csv(path: Path, extract: Extractor) -> Iterator[Document]:
    """Yield the document of each record; the first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    with open_bytes(path) as file:
        records = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            for row in records:
                if None in row or None in row.values():
                    wanted = len(records.fieldnames or [])
                    raise UserError(f"{path}:{records.line_num}: not {wanted} fields as in line 1")
                yield extract(row, f"{path}:{records.line_num}")
        except csv.Error as error:
            raise UserError(f"{path}:{records.line_num + 1}: not CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: after line {records.line_num}: not UTF-8 ({error.reason})") from None


def read_parquet(path: Path, extract: Extractor) -> Iterator[Document]:
    """Yield the document of each row."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(path) as file:
            source = parquet.ParquetFile(file)
            number, columns = 0, extract.columns(source.schema_arrow.names, str(path))
            for batch in source.iter_batches(PARQUET_ROWS, columns=columns):
                if batch.nbytes > PARQUET_BYTES:
                    raise UserError(f"{path}: after row {number}: {PARQUET_ROWS} rows take "
                                    f"{batch.nbytes / 1e9:.1f} GB of memory")
                for row in batch.to_pylist():
                    number += 1
                    yield extract(table_row(row), f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".json": read_json,
           ".csv": read_csv, ".parquet": read_parquet}
