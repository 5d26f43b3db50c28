"""JSON into records: lines of JSON Lines and elements of JSON arrays, each read or refused with its place and the reason.

Promises: what comes out is exactly what the file says (strict UTF-8, strict JSON, no key lost to a second one of the same name,
no number turned into infinity, no half character); nothing a file holds raises or recurses without bound; the reading of one
record never depends on another. What a record means is not known here: `fullrank.data.convert` says what form it has.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from fullrank.data.streams import BOM, HEAD_BYTES, Stream, refuse_wide_encoding
from fullrank.errors import DataError

#: Objects and lists inside one another that are read, the record itself being the first. Chats with tool schemas stay below 20;
#: Python's own parsers give up, or crash, between 1,000 and 100,000.
DEEPEST = 64

#: Longest line or record that is read. A file without line ends, or with a quote that is never closed, would otherwise be held
#: in memory whole; a record of this length is some 30 million tokens.
LONGEST_BYTES = 128 << 20

#: White space of JSON (RFC 8259, section 2) within a line: a line of nothing else is blank.
SPACE = b" \t\r"


@dataclass(frozen=True)
class Origin:
    """Where a record stands: `train.jsonl:7`, or `train.parquet:record 7` where there are no lines. Counted from 1."""

    path: str
    line: int
    """0 where only the offset is known."""
    offset: int | None = None
    """The byte of the file (decompressed, where it is compressed) at which the record begins: its line, after a byte order
    mark; or its object in a JSON array. None where records do not lie in the file one after the other."""
    unit: Literal["line", "record"] = "line"

    def __str__(self) -> str:
        if not self.line:
            return f"{self.path} at byte {self.offset}"
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}:record {self.line}"


@dataclass(frozen=True)
class RawRecord:
    """A record as it was found: column name -> value."""

    origin: Origin
    fields: dict[str, Any]


@dataclass(frozen=True)
class Reject:
    """A record that could not be read."""

    origin: Origin
    reason: str
    """What was found, without the place."""
    loses_more: bool = False
    """It stands for more than one record: what follows it was not read, to the end of the file (of the row group, in Parquet),
    since it is not certain where the next record begins. How many they are nobody knows."""


# ---- one JSON text --------------------------------------------------------------------------------------------------


class _Unusable(ValueError):
    """Well-formed JSON (or nearly: NaN) that no record can hold."""


def _refuse_constant(name: str) -> Any:
    raise _Unusable(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Unusable(f"the number {shortened(text)} is too large for a 64-bit float")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Unusable(f"the key {shortened(repr(key))} is written twice in one object")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeated_keys)
#: Takes all that is JSON by its grammar, and NaN and infinities, and converts no number: for asking where a text ends.
_LENIENT = json.JSONDecoder(parse_constant=str, parse_float=str, parse_int=str)

#: An escape that may be half of a surrogate pair: \ud800 to \udfff.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Possessive, so that the time is linear in the text.
#: A string, closed or open to the end.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
#: All up to the next bracket outside strings, and that bracket.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+[\[\]{}]', re.DOTALL)
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in _STEP)
_JSON_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^,\]}\s]*")

#: Read at a time of a JSON array.
_WINDOW_BYTES = 1 << 20
#: Depth to which Python's parser is trusted with asking whether a text is JSON: half its limit on recursion.
_MOST_PARSED_DEPTH = 500

_TOO_LONG = f"longer than the {LONGEST_BYTES} bytes that are read as one record"
_REST_UNREAD = "the rest of the file was not read"


def _depth(raw: bytes) -> int:
    """Objects and lists inside one another, at most; exact as far as the text is JSON, which is as far as a parser comes."""
    if b"\\" in raw:  # without escapes a quote begins or ends a string; between every second one and the next lies none
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    depth = deepest = is_inside = 0
    for start in range(0, len(raw), _WINDOW_BYTES):
        parts = raw[start : start + _WINDOW_BYTES].split(b'"')
        brackets = b"".join(parts[is_inside::2]).translate(None, _NOT_BRACKETS)
        is_inside = (is_inside + len(parts) - 1) % 2
        depths = list(accumulate(map(_STEP.__getitem__, brackets), initial=depth))
        depth, deepest = depths[-1], max(deepest, max(depths))
    return deepest


def _parsed(raw: bytes) -> dict[str, Any] | str:
    """The object that one JSON text holds, or the reason why it is no record."""
    # As many brackets must be there before they can be so deep: most lines are done with two counts.
    if raw.count(b"{") + raw.count(b"[") > DEEPEST and _depth(raw) > DEEPEST:
        return f"not usable JSON: nested too deeply (more than {DEEPEST} levels)"
    try:
        text = raw.decode()
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return _nul_problem(raw) or encoding_problem(error)
    except json.JSONDecodeError as error:
        return _nul_problem(raw) or _syntax_problem(error, f" at column {error.colno}")
    except _Unusable as error:
        return f"not usable JSON: {error}"
    except ValueError:  # the conversion takes time that grows with the square of the digits, so that Python limits them
        return f"not usable JSON: an integer of more than {sys.get_int_max_str_digits()} digits"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {kind_of(value)}"
    if b"\\" in raw and _SURROGATE.search(raw):  # only an escape can bring half a pair, which no tokenizer can take
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"a string holds half a surrogate pair ({error.object[error.start]!r}), which is no character"
    return value


def _syntax_problem(error: json.JSONDecodeError, place: str) -> str:
    near = _excerpt(error.doc, error.pos)
    if near.startswith("\ufeff"):
        return "not valid JSON: a byte order mark (U+FEFF) stands inside the file, as where two files were joined"
    where = f"near {near!r}" if near else "where the text ends"
    if error.msg == "Extra data" and "\r" in error.doc[: error.pos]:
        where += "; a line ends with a line feed, a carriage return alone does not end it"
    return f"not valid JSON: {_said(error)}{place}, {where}"


def _said(error: json.JSONDecodeError) -> str:
    """The parser's words without the `at` that some of them end in, since the place follows in words of its own."""
    return (error.msg[:1].lower() + error.msg[1:]).removesuffix(" starting at").removesuffix(" at")


def _nul_problem(raw: bytes) -> str | None:
    if not raw.startswith(b"\0"):
        return None
    rest = raw.lstrip(b"\0")
    followed = f", followed by {shortened(repr(rest.decode(errors='replace')))}" if rest.strip(SPACE) else ""
    return f"{len(raw) - len(rest)} NUL bytes where a record should begin, as a crashed writer leaves them{followed}"


def _excerpt(text: str, position: int) -> str:
    return text[position : position + 30].split("\n")[0]


def shortened(text: str) -> str:
    """At most 60 characters of a text out of a file, for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def encoding_problem(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8; columns are bytes of the line, from 1."""
    column = error.start - error.object.rfind(b"\n", 0, error.start)
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {column}"


def kind_of(value: Any) -> str:
    """What a value from a data file is called in messages: `a list`, `text`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "binary data"}
    return names.get(type(value)) or f"a {getattr(value, 'type_name', type(value).__name__)}"


# ---- JSON Lines -----------------------------------------------------------------------------------------------------


def json_lines(payload: bytes, path: str, line: int, offset: int) -> Iterator[RawRecord | Reject]:
    """The records of whole lines, the first of which has this number and offset; blank lines are no records.

    Lines end at the byte \\n alone: U+2028 and its like may stand inside strings.
    """
    for raw in payload.split(b"\n"):
        if raw.strip(SPACE):
            origin = Origin(path, line, offset)
            found = _parsed(raw)
            yield RawRecord(origin, found) if isinstance(found, dict) else Reject(origin, found)
        line += 1
        offset += len(raw) + 1


def line_chunks(stream: Stream, chunk_bytes: int) -> Iterator[tuple[int, int, bytes] | Reject]:
    """Whole lines in pieces: (number of the first line, its offset, the lines as they are).

    A piece ends at the last line end within `chunk_bytes`, or at the first one after them, so that pieces follow from what the
    file holds and not from how it is read. A line beyond `LONGEST_BYTES` is a `Reject` and is not held in memory.
    """
    line, held = 1, stream.read(HEAD_BYTES)
    refuse_wide_encoding(held, stream.path)
    offset = len(BOM) if held.startswith(BOM) else 0
    held = held[offset:]
    while True:
        held += stream.read(chunk_bytes - len(held))
        if stream.at_end and not stream.broken:
            if held:
                yield line, offset, held
            return
        cut = held.rfind(b"\n") + 1
        if cut:
            yield line, offset, held[:cut]
            line, offset, held = line + held.count(b"\n", 0, cut), offset + cut, held[cut:]
        elif not stream.at_end:
            found, length, held = _long_line(stream, held, chunk_bytes)
            if found == b"":  # it breaks
                continue
            if found is None:
                yield Reject(Origin(stream.path, line, offset), f"{_TOO_LONG}: this line has {length}")
            else:
                yield line, offset, found
            line, offset = line + 1, offset + length
        else:
            yield Reject(Origin(stream.path, line, offset), f"{stream.broken}; {_REST_UNREAD}", loses_more=True)
            return


def _long_line(stream: Stream, begun: bytes, piece_bytes: int) -> tuple[bytes | None, int, bytes]:
    """(the line, None where it is too long, nothing where the data break in it; its length; what was read beyond it)"""
    pieces, length, end = [begun], len(begun), 0
    rest = b""
    while not end and not stream.at_end:
        piece = stream.read(piece_bytes)
        end = piece.find(b"\n") + 1
        taken, rest = (piece[:end], piece[end:]) if end else (piece, b"")
        length += len(taken)
        if length > LONGEST_BYTES:
            pieces.clear()
        else:
            pieces.append(taken)
    if stream.broken and not end:
        return b"", length, b""
    return b"".join(pieces) if length <= LONGEST_BYTES else None, length, rest


# ---- JSON arrays ----------------------------------------------------------------------------------------------------


class _Window:
    """The part of a file that is looked at, and the place in it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.data = stream.read(HEAD_BYTES)
        refuse_wide_encoding(self.data, stream.path)
        self.at = len(BOM) if self.data.startswith(BOM) else 0
        self.line = 1
        self._dropped = 0

    def more(self) -> bool:
        """Drops what is done with and reads on, at least as much as is held: looking again from `at` stays linear in all."""
        self._dropped += self.at
        self.data, self.at = self.data[self.at :], 0
        piece = self.stream.read(max(_WINDOW_BYTES, len(self.data)))
        self.data += piece
        return bool(piece)

    def mark(self) -> bytes:
        """The next byte that is no white space, `at` being moved to it; nothing at the end."""
        while True:
            self.move_to(_JSON_SPACE.match(self.data, self.at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.data) or not self.more():
                return self.data[self.at : self.at + 1]

    def move_to(self, position: int) -> None:
        self.line += self.data.count(b"\n", self.at, position)
        self.at = position

    def origin(self) -> Origin:
        return Origin(self.stream.path, self.line, self._dropped + self.at)

    def excerpt(self) -> str:
        return _excerpt(self.data[self.at : self.at + 120].decode(errors="replace"), 0)

    def value_end(self) -> int | None:
        """Where the value at `at` ends, by its strings and brackets; None where it does not, within `LONGEST_BYTES`."""
        while True:
            end = _value_end(self.data, self.at)
            if end is not None:
                return end
            if len(self.data) - self.at > LONGEST_BYTES or not self.more():
                is_open = self.data[self.at : self.at + 1] in (b"{", b"[", b'"')
                return None if is_open or self.stream.broken else len(self.data)


def _value_end(data: bytes, start: int) -> int | None:
    """Where the JSON value at `start` ends; None where it may go on behind the data."""
    if data[start : start + 1] not in (b"{", b"["):
        found = (_STRING if data[start : start + 1] == b'"' else _SCALAR).match(data, start)
        end = found.end() if found else start
        return end if end < len(data) else None
    depth, position = 0, start
    while found := _TO_BRACKET.match(data, position):
        position = found.end()
        depth += _STEP[data[position - 1]]
        if not depth:
            return position
    return None


def json_array(stream: Stream) -> Iterator[RawRecord | Reject]:
    """The objects of one array, each with the line and byte at which it begins; the file is never held whole.

    After an element that is well-formed JSON but no record (half a surrogate pair, NaN, a key written twice, ...) reading goes
    on, since it is certain where that element ends; after one that is not, it is not, and nothing more is read.

    Raises:
        DataError: the file holds no array.
    """
    window = _Window(stream)
    mark = window.mark()
    if not mark:
        if stream.broken:
            yield _end(window, "")
        return
    if mark != b"[":
        raise DataError(
            f"{window.stream.path}:{window.line}: expected an array of objects ([...]), found {window.excerpt()!r}",
            hint="a .json file holds one array of objects; one object a line goes into a .jsonl file",
        )
    window.move_to(window.at + 1)
    if window.mark() == b"]":
        mark = b"]"
        window.move_to(window.at + 1)
    while mark != b"]":
        window.mark()
        end = window.value_end()
        if end is None:
            yield _end(window, "a value that begins here does not end")
            return
        raw = window.data[window.at : end]
        found = _parsed(raw)
        if isinstance(found, dict):
            yield RawRecord(window.origin(), found)
        elif _depth(raw) > _MOST_PARSED_DEPTH:
            yield _end(window, found)
            return
        elif error := _syntax_error(raw):
            length = len(error.doc[: error.pos].encode(errors="surrogateescape"))
            window.move_to(window.at + length)
            near = f"near {window.excerpt()!r}" if window.excerpt() else "where the text ends"
            yield _end(window, f"not valid JSON: {_said(error)}, {near}")
            return
        else:
            yield Reject(window.origin(), found)
        window.move_to(end)
        mark = window.mark()
        if mark not in (b",", b"]"):
            shown = repr(window.excerpt()) if mark else "the end of the file"
            yield _end(window, f"expected ',' or ']' after a record, found {shown}")
            return
        window.move_to(window.at + 1)
    if window.mark() or stream.broken:
        yield _end(window, f"more text after the array: {window.excerpt()!r}")


def _end(window: _Window, reason: str) -> Reject:
    """The last that is told of a file."""
    return Reject(window.origin(), f"{window.stream.broken or reason}; {_REST_UNREAD}", loses_more=True)


def _syntax_error(raw: bytes) -> json.JSONDecodeError | None:
    """Why the text is not JSON by its grammar, wrong bytes inside strings apart."""
    try:
        _LENIENT.decode(raw.decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        return error
    return None


# ---- text -----------------------------------------------------------------------------------------------------------


def text_file(stream: Stream) -> Iterator[RawRecord | Reject]:
    """The whole file as one record with the column `text`; a file of white space only has none."""
    raw = stream.read(LONGEST_BYTES + len(BOM) + 1)
    refuse_wide_encoding(raw, stream.path)
    start = len(BOM) if raw.startswith(BOM) else 0
    raw = raw[start:]
    origin = Origin(stream.path, 1, start)
    nul = raw.find(b"\0")
    if stream.broken:
        yield Reject(origin, f"{stream.broken}, at byte {start + len(raw)}; nothing of the file was used")
    elif len(raw) > LONGEST_BYTES:
        yield Reject(origin, f"{_TOO_LONG}: this file has more")
    elif nul >= 0:
        yield Reject(Origin(stream.path, raw.count(b"\n", 0, nul) + 1, start + nul), "a NUL byte, which is no text")
    elif raw.strip():
        try:
            yield RawRecord(origin, {"text": raw.decode()})
        except UnicodeDecodeError as error:
            place = Origin(stream.path, raw.count(b"\n", 0, error.start) + 1, start + error.start)
            yield Reject(place, encoding_problem(error))
