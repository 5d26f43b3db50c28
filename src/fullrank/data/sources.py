"""Records out of files: JSON Lines, JSON, CSV, Parquet, and splits of hub datasets, one record at a time.

Promises: every record knows where it stands; what was read is exactly what the file says (strict UTF-8, strict JSON, no
key lost to a second one of the same name); a file that cannot be read is one error that lists its first problems with
their lines. What a record means is not known here: `fullrank.data.convert` says what form it has.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fullrank.errors import DataError, missing_extra
from fullrank.recipe import Source
from fullrank.run import file_digest, fingerprint

#: Problems of one file that are listed before reading gives up.
MOST_PROBLEMS = 10

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Origin:
    """Where a record stands: `train.jsonl:7`, or `train.parquet:record 7` where there are no lines. Counted from 1."""

    path: str
    line: int
    unit: Literal["line", "record"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}:record {self.line}"


@dataclass(frozen=True)
class RawRecord:
    """A record as it was found: column name -> value."""

    origin: Origin
    fields: dict[str, Any]


#: What a reader yields: a record, or a problem as `file:line: what was found`.
_Items = Generator[RawRecord | str, None, None]


def read(source: Source) -> Iterator[RawRecord]:
    """The records of a source in their order, the first `limit` of them where a limit is given.

    The file is read as the records are asked for (a .json file at once). After a problem no record is handed out any
    more, but reading goes on, so that the error lists up to `MOST_PROBLEMS` of them.

    Raises:
        DataError: the file is missing, of an unknown kind, empty, or holds something that cannot be read: each problem
            with its file and line.
        UsageError: a hub dataset without the `hub` extra.
    """
    if source.path is None:
        items, hint, place = _read_hub(source), "check the dataset and its split on the hub", str(source.hub)
    else:
        path = _existing_file(source.path)
        kind = _KINDS[path.suffix.lower()]
        items, hint, place = kind.read(path), kind.hint, str(path)
    problems: list[str] = []
    found = 0
    with closing(items):
        for item in items:
            if isinstance(item, str):
                problems.append(item)
            elif not problems:
                yield item
            found += 1
            if found == source.limit or len(problems) == MOST_PROBLEMS:
                break
    if problems:
        stopped = [f"{place}: not read beyond these {MOST_PROBLEMS} problems"] if len(problems) == MOST_PROBLEMS else []
        raise DataError("\n".join(problems + stopped), hint=hint)
    if not found:
        raise DataError(f"{place}: holds no records", hint=hint)


def digest(source: Source) -> str:
    """SHA-256 of what `read` reads: a file's kind and bytes, or a hub dataset's id, split and fingerprint, and limit.

    Raises:
        DataError: the file is missing or cannot be read, or the hub dataset cannot be loaded.
    """
    if source.path is None:
        return fingerprint("hub", source.hub, source.config, source.split, _load_hub(source)._fingerprint, source.limit)
    path = _existing_file(source.path)
    try:
        return fingerprint("file", path.suffix.lower(), file_digest(path), source.limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _existing_file(written: str) -> Path:
    path = Path(written)
    if path.suffix.lower() not in _KINDS:
        found = f"{path.suffix!r} files are not known" if path.suffix else "a data file's name tells its kind"
        raise DataError(f"{path}: {found}; allowed: {', '.join(_KINDS)}", hint="convert the file, or correct its name")
    if not path.is_file():
        found = "is not a file" if path.exists() else "no such file"
        raise DataError(f"{path}: {found}", hint="check the path in the recipe")
    return path


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is written twice in one object")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_repeated_keys)


def _excerpt(text: str, position: int) -> str:
    return text[position : position + 30].split("\n")[0]


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        near = _excerpt(error.doc, error.pos)
        where = f"near {near!r}" if near else "where the text ends"
        return f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}, {where}"
    return "not usable JSON: nested too deeply" if isinstance(error, RecursionError) else f"not usable JSON: {error}"


def _object_problem(value: Any, text: str) -> str | None:
    """Why a parsed value is no record; `text` is the JSON it was parsed from."""
    if not isinstance(value, dict):
        return f"expected a JSON object, found {kind_of(value)}"
    if "\\u" in text:  # only an escape can bring half a surrogate pair, which no tokenizer can take
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"a string holds half a surrogate pair ({error.object[error.start]!r}), which is no character"
    return None


def _encoding_problem(error: UnicodeDecodeError) -> str:
    column = error.start - error.object.rfind(b"\n", 0, error.start)
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {column}"


def _read_json_lines(path: Path) -> _Items:
    """One object a line. Lines end at the byte \\n alone: U+2028 and its like may stand inside strings."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(_BOM) if number == 1 else raw
            if not raw.strip():
                continue
            origin = Origin(str(path), number)
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
                value = _DECODER.decode(text)
                problem = _object_problem(value, text)
            except UnicodeDecodeError as error:
                problem = _encoding_problem(error)
            except (ValueError, RecursionError) as error:
                problem = _json_problem(error)
            yield f"{origin}: {problem}" if problem else RawRecord(origin, value)


def _read_json_array(path: Path) -> _Items:
    """The objects of one array, each with the line on which it begins."""
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield f"{path}:{line}: {_encoding_problem(error)}"
        return
    position, line = _past_space(text, 0, 1)
    if not text[position:]:
        return
    if text[position] != "[":
        yield f"{path}:{line}: expected an array of objects ([...]), found {_excerpt(text, position)!r}"
        return
    position, line = _past_space(text, position + 1, line)
    is_first = True
    while text[position : position + 1] != "]" or not is_first:
        origin = Origin(str(path), line)
        try:
            value, end = _DECODER.raw_decode(text, position)
            problem = _object_problem(value, text[position:end])
        except (ValueError, RecursionError) as error:
            found_line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield f"{path}:{found_line}: {_json_problem(error)}"
            return
        yield f"{origin}: {problem}" if problem else RawRecord(origin, value)
        position, line = _past_space(text, end, line + text.count("\n", position, end))
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            yield f"{path}:{line}: expected ',' or ']' after a record, found {mark or 'the end of the file'!r}"
            return
        position, line = _past_space(text, position + 1, line)
        is_first = False
    position, line = _past_space(text, position + 1, line)
    if text[position:]:
        yield f"{path}:{line}: more text after the array: {_excerpt(text, position)!r}"


def _past_space(text: str, position: int, line: int) -> tuple[int, int]:
    """The next position that holds no JSON white space, and its line."""
    while position < len(text) and text[position] in " \t\r\n":
        line += text[position] == "\n"
        position += 1
    return position, line


# ---- tables ---------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> _Items:
    """A header, then one record a row, every value text; a row may span lines inside quotes."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 131,072 characters, is shorter than a long document
    with path.open("rb") as file:
        # Decoded line by line, so that a wrong byte is known by its line.
        lines = (raw.removeprefix(_BOM if index == 0 else b"").decode() for index, raw in enumerate(file))
        rows = csv.reader(lines, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                yield f"{path}:{rows.line_num + 1}: {_encoding_problem(error)}"
                return
            except csv.Error as error:
                yield f"{path}:{line}: not valid CSV: {error}"
                return
            if not row:
                continue
            if not header:
                header = row
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    yield f"{path}:{line}: the header names the column {repeated[0]!r} twice"
                    return
            elif len(row) != len(header):
                yield f"{path}:{line}: {len(row)} values where the header names {len(header)} columns"
            else:
                yield RawRecord(Origin(str(path), line), dict(zip(header, row, strict=True)))


def _read_parquet(path: Path) -> _Items:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRecord(Origin(str(path), number, "record"), _without_nested_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        yield f"{path}: cannot be read as Parquet after {number} records: {error}"


def _without_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the null members of nested structs left out.

    Arrow gives every struct of a column the same members, so that a chat turn without tool calls comes back with
    `tool_calls: null`; chat templates that ask whether the key is there would be misled.
    """

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: prune(below) for key, below in value.items() if below is not None}
        return [prune(item) for item in value] if isinstance(value, list) else value

    return {name: prune(value) for name, value in row.items()}


# ---- hub ------------------------------------------------------------------------------------------------------------


def _load_hub(source: Source) -> Any:
    """The split as a `datasets.Dataset`."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub", f"the hub dataset {source.hub}") from None
    try:
        return datasets.load_dataset(source.hub, source.config, split=source.split, streaming=False)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"hub dataset {source.hub}, split {source.split}: cannot be loaded: {reason[0]}",
            hint="check its id and split, the network, and HF_TOKEN for a gated dataset",
        ) from error


def _read_hub(source: Source) -> _Items:
    for number, row in enumerate(_load_hub(source), start=1):
        yield RawRecord(Origin(f"{source.hub}[{source.split}]", number, "record"), _without_nested_nulls(row))


# ---- kinds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    read: Callable[[Path], _Items]
    hint: str


_JSON_LINES = _Kind(_read_json_lines, "each line holds one JSON object; an array of objects goes into a .json file")
_KINDS: dict[str, _Kind] = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": _Kind(_read_json_array, "it holds one array of objects; one object a line goes into a .jsonl file"),
    ".csv": _Kind(_read_csv, "the first row names the columns, and every other row has a value for each"),
    ".parquet": _Kind(_read_parquet, "write the file again; each row is one record"),
}


def kind_of(value: Any) -> str:
    """What a value from a data file is called in messages: `a list`, `text`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "binary data"}
    return names.get(type(value), f"a {type(value).__name__}")
