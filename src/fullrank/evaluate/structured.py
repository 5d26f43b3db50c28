"""Answers that are JSON: whether they are, whether a JSON Schema allows them, and which of the reference's fields they have.

JSON is that of RFC 8259: NaN and Infinity are none, and of a key written twice the last one counts. `jsonschema` (extra `json`)
validates against the draft that the schema names, 2020-12 where it names none; references to other documents are not fetched, and
`format` is not asserted, as the specification has it by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fullrank.errors import UsageError, missing_extra

FieldPath = tuple[str | int, ...]


class NotJson(ValueError):
    """A text that is no JSON, with the reason."""


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        NotJson: saying why it is none.
    """

    def refuse(word: str) -> Any:
        raise NotJson(f"{word} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except NotJson:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: brackets by the thousand
        raise NotJson(str(error) or "nested too deeply") from None


def leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """(path, value) of every field that holds no further ones; lists count theirs from 0. An empty object or list is a leaf."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from leaves(below, (*path, index))
    else:
        yield path, value


def is_equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are: numbers as numbers (1 is 1.0), true is not 1, the order of keys plays no part."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)


def fields(reference: Any, answer: Any) -> tuple[int, int]:
    """(leaf fields of the reference that the answer has at the same path with an equal value, leaf fields of the reference)."""
    given = dict(leaves(answer))
    wanted = list(leaves(reference))
    return sum(path in given and is_equal(value, given[path]) for path, value in wanted), len(wanted)


def schema_check(path: Path, purpose: str) -> Callable[[Any], str]:
    """A function that says what a JSON Schema has against a value, or nothing.

    Raises:
        UsageError: the file is no JSON Schema, or refers to another document; jsonschema is not installed.
    """
    try:
        import jsonschema_specifications
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise missing_extra("jsonschema", "json", purpose) from None
    try:
        schema = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, NotJson) as error:
        raise UsageError(f"{path}: {purpose}: cannot be read as JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise UsageError(f"{path}: {purpose}: a JSON Schema is an object, found a {type(schema).__name__}")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise UsageError(f"{path}: {purpose}: not a valid JSON Schema: {where or 'the schema'}: {error.message}") from None
    validator = kind(schema, registry=jsonschema_specifications.REGISTRY)  # which knows the drafts and fetches nothing

    def check(value: Any) -> str:
        try:
            error = next(validator.iter_errors(value), None)
        except Unresolvable as unresolvable:
            raise UsageError(
                f"{path}: {purpose}: a reference leads nowhere: {unresolvable}",
                hint="a schema may refer to its own parts only; nothing is fetched",
            ) from None
        except RecursionError:
            return "nested too deeply"
        return str(error.message) if error else ""

    return check
