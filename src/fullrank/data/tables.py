"""Rows of tables as records: CSV and TSV, every value text; Parquet, every value as its column's type has it.

Promises: a row that cannot be read costs that row alone where it is certain where the next one begins, and otherwise the rest of
the file (of the row group, in Parquet), which the refusal then says.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullrank.data.parse import LONGEST_BYTES, Origin, RawRecord, Reject, encoding_problem, line_chunks, shortened
from fullrank.data.streams import Stream
from fullrank.errors import DataError

_CHUNK_BYTES = 1 << 20
_CSV_HINT = "the first row names the columns, and every other row has a value for each"


class _Lines:
    """The lines of a file as text, for the csv module, which asks for as many as a row needs."""

    def __init__(self, stream: Stream) -> None:
        self.line, self.offset = 1, 0
        """Of the line that comes next."""
        self.last = b""
        self.problem = ""
        """Why the row being read cannot be used."""
        self.reject: Reject | None = None
        """Why there are no more lines, where that is not the file's end."""
        self._row_bytes = 0
        self._chunks = line_chunks(stream, _CHUNK_BYTES)

    def begin_row(self) -> None:
        self.problem, self._row_bytes = "", 0

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            if isinstance(chunk, Reject):
                self.reject = replace(chunk, loses_more=True)
                return
            self.line, self.offset, payload = chunk
            for raw in io.BytesIO(payload):
                self.line, self.offset, self.last = self.line + 1, self.offset + len(raw), raw
                self._row_bytes += len(raw)
                if self._row_bytes > LONGEST_BYTES:
                    raise csv.Error(f"a row of more than {LONGEST_BYTES} bytes; a quote may never be closed")
                if b"\0" in raw:
                    self.problem = self.problem or "a NUL byte, which is no text, as a crashed writer leaves it"
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    self.problem = self.problem or encoding_problem(error)
                    text = raw.decode(errors="surrogateescape")  # keeps the columns apart; such a row is never used
                yield text


def csv_rows(stream: Stream, delimiter: str) -> Iterator[RawRecord | Reject]:
    """A header, then one record a row, every value text; a row may span lines inside quotes, blank lines are no rows.

    Raises:
        DataError: the header cannot be used.
    """
    csv.field_size_limit(LONGEST_BYTES)  # the module's own limit, 131,072 characters, is shorter than a long document
    lines = _Lines(stream)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        lines.begin_row()
        origin = Origin(stream.path, lines.line, lines.offset)
        row: list[str] = []
        problem, is_certain = "", True
        try:
            row = next(rows)
        except StopIteration:
            if lines.reject:
                yield lines.reject
            return
        except csv.Error as error:
            is_about_return = "new-line character" in str(error)
            problem = f"not valid CSV: {'a carriage return outside quotes, within a line' if is_about_return else error}"
            # Outside quotes a row ends with its line; after a wrong quote nobody can tell whether it does.
            is_certain = is_about_return and b'"' not in lines.last
            if lines.reject:
                yield replace(lines.reject, origin=origin)
                return
        problem = lines.problem or problem
        if not header and (problem or row):
            _check_header(row, problem, origin)
            header = row
        elif problem:
            ending = "" if is_certain else "; the rest of the file was not read"
            yield Reject(origin, problem + ending, not is_certain)
        elif row and len(row) != len(header):
            yield Reject(origin, f"{len(row)} values where the header names {len(header)} columns")
        elif row:
            yield RawRecord(origin, dict(zip(header, row, strict=True)))
        if not is_certain:
            return


def _check_header(header: list[str], problem: str, origin: Origin) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        problem = problem or f"the header names the column {shortened(repr(repeated[0]))} twice"
    if problem:
        raise DataError(f"{origin}: {problem}", hint=_CSV_HINT)


# ---- Parquet --------------------------------------------------------------------------------------------------------

#: Rows held at a time; a row may be a long document.
_BATCH_ROWS = 256
#: What Arrow raises for text that is not UTF-8, a date beyond the year 9999, a type without a Python equal.
_NOT_FOR_PYTHON = (ValueError, TypeError, OverflowError, NotImplementedError)


def parquet_rows(path: Path) -> Iterator[RawRecord | Reject]:
    """One record a row, counted over the whole file.

    Raises:
        DataError: the file is not Parquet, or names a column twice.
    """
    import pyarrow
    from pyarrow import parquet

    hint = "write the file again; each row is one record"
    troubles = (pyarrow.ArrowException, OSError, ValueError)  # ValueError: names that are not UTF-8
    try:
        opened = parquet.ParquetFile(path, page_checksum_verification=True)
        names = opened.schema_arrow.names
    except troubles as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}", hint=hint) from error
    with opened as file:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"{path}: names the column {shortened(repr(repeated[0]))} twice", hint=hint)
        before = 0
        for group in range(file.num_row_groups):
            number = before
            before += file.metadata.row_group(group).num_rows
            problem = ""
            try:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                    for found in _batch_rows(batch):
                        number += 1
                        origin = Origin(str(path), number, unit="record")
                        yield Reject(origin, found) if isinstance(found, str) else RawRecord(origin, without_nested_nulls(found))
            except troubles as error:
                problem = f": {_first_line(error)}"
            if number < before:
                reason = f"records {number + 1} to {before} cannot be read as Parquet{problem}"
                yield Reject(Origin(str(path), number + 1, unit="record"), reason, before - number > 1)


def _batch_rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of a record batch; in place of one with a value that Python cannot hold, the reason."""
    try:
        found: list[dict[str, Any] | str] = batch.to_pylist()
    except _NOT_FOR_PYTHON:
        found = [_row(batch, index) for index in range(batch.num_rows)]
    return found


def _row(batch: Any, index: int) -> dict[str, Any] | str:
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except _NOT_FOR_PYTHON as error:
            column_name = f"{shortened(repr(name))} ({column.type})"
            return f"the column {column_name} holds a value that cannot be read: {_first_line(error)}"
    return row


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def without_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the null members of nested structs left out.

    Arrow gives every struct of a column the same members, so that a chat turn without tool calls comes back with
    `tool_calls: null`; chat templates that ask whether the key is there would be misled.
    """

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: prune(below) for key, below in value.items() if below is not None}
        return [prune(item) for item in value] if isinstance(value, list) else value

    return {name: prune(value) for name, value in row.items()}
