"""Records that were parsed where their file was opened, as bytes that another process can take.

The same records give the same bytes wherever in a file they stand, so that a hash of the bytes identifies the work; values that
JSON has no word for (bytes, dates of a Parquet column) come back as what they were, or as a `Foreign` that keeps the name of
their type.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fullrank.data.parse import Origin, RawRecord, Reject


@dataclass(frozen=True)
class Foreign:
    """A value of a type that no column of a record may have, such as a decoded image."""

    type_name: str


def encode(item: RawRecord | Reject, first: int, offset: int | None) -> bytes:
    """One record as JSON: [line and offset counted from those of the block, fields or reason, what to mind]."""
    place = [item.origin.line - first, None if item.origin.offset is None else item.origin.offset - (offset or 0)]
    if isinstance(item, Reject):
        return _json([*place, item.reason, int(item.loses_more)])
    try:
        return _json([*place, item.fields, 0])
    except TypeError:
        return _json([*place, _packed(item.fields), 1])


def decode(payload: bytes, path: str, first: int, offset: int | None) -> Iterator[RawRecord | Reject]:
    """The records of a JSON array of what `encode` gives."""
    for line, distance, found, mind in json.loads(payload):
        place = None if distance is None or offset is None else offset + distance
        origin = Origin(path, first + line, place, "line" if place is not None else "record")
        if isinstance(found, str):
            yield Reject(origin, found, bool(mind))
        else:
            yield RawRecord(origin, _unpacked(found) if mind else found)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


#: Types that are kept: name -> (type, value to JSON, JSON to value).
_KEPT: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda found: datetime.timedelta(*found),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
}


def _packed(value: Any) -> Any:
    """The value with each of its parts in a list that tells what it is; JSON can carry the outcome whatever the value."""
    if isinstance(value, dict):
        return ["dict", [[str(key), _packed(below)] for key, below in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_packed(item) for item in value]]
    if value is None or type(value) in (str, int, float, bool):
        return ["plain", value]
    for name, (kind, to_json, _) in _KEPT.items():
        if type(value) is kind:
            return [name, to_json(value)]
    return ["foreign", type(value).__name__]


def _unpacked(packed: list[Any]) -> Any:
    name, value = packed
    if name == "dict":
        return {key: _unpacked(below) for key, below in value}
    if name == "list":
        return [_unpacked(item) for item in value]
    if name == "foreign":
        return Foreign(value)
    return value if name == "plain" else _KEPT[name][2](value)
