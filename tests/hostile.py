"""Hostile data files with the truth about them: what each holds, line by line, known from how it was made.

`cases` yields files of the kinds that crashed writers, wrong encodings, careless exports and ill will leave behind. Every file is
put together from pieces whose meaning is known by construction: JSON is written here character by character, valid texts from a
grammar and invalid ones by breaking them at a known place. No parser is asked, neither the reader that is tested nor Python's.

    for case in cases(seed=0, count=5000):
        case.file_bytes, case.suffix    # what to write, and the end of its name
        case.expected                   # per record: line, byte offset, and its fields, or None where it must be refused
        case.refused                    # words of the error where the whole file must be refused
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Expected:
    """A record that is there, or a place where one must be refused."""

    line: int
    offset: int
    fields: dict[str, Any] | None
    """None: must be refused, at this line and byte."""


@dataclass(frozen=True)
class Case:
    """One file."""

    name: str
    file_bytes: bytes
    suffix: str
    expected: list[Expected] = field(default_factory=list)
    refused: str = ""
    """Where not empty, the file as a whole must be refused with these words."""


def cases(seed: int, count: int, only: str | None = None) -> Iterator[Case]:
    """`count` files, of all classes in turn or of one only; the same for the same seed."""
    names = [only] if only else list(CLASSES)
    for number in range(count):
        name = names[number % len(names)]
        rng = random.Random(f"{seed} {name} {number // len(names)}")
        made = CLASSES[name](rng)
        yield Case(f"{name}-{number // len(names)}", made.file_bytes, made.suffix, made.expected, made.refused)


# ---- valid JSON, written by hand ------------------------------------------------------------------------------------

_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
#: Characters that readers stumble over: line ends of other standards, byte order marks, controls, planes beyond the first.
_CHARACTERS = [
    *"abcXYZ 019.,:;{}[]()<>'`~!?@#$%^&*-_=+|/\\\"",
    *"\t\n\r\b\f\0\x01\x1f\x7f",
    *"äéßñ¡\x85\xa0\u0301\u2028\u2029\u200b\u202e\u3000\ufeff\ufffd\uffff\ud7ff\ue000",
    *"漢字עבריתالعربية한국어ไทย",
    *"\U0001f600\U0001f1e9\U00010000\U0010ffff\U000e0041",
    "\\ud83d",  # six characters, not an escape
]
#: (as written, what it is)
_NUMBERS: list[tuple[str, int | float]] = [
    ("0", 0),
    ("-0", 0),
    ("-0.0", -0.0),
    ("7", 7),
    ("-12", -12),
    ("0.5", 0.5),
    ("1e2", 100.0),
    ("1E+2", 100.0),
    ("25e-1", 2.5),
    ("1e-999", 0.0),
    ("9007199254740993", 2**53 + 1),
    ("-9223372036854775809", -(2**63) - 1),
    ("1" + "0" * 400, 10**400),
    ("1.7976931348623157e308", 1.7976931348623157e308),
    ("5e-324", 5e-324),
    ("0." + "0" * 300 + "1", 1e-301),
]


def _escaped(char: str, rng: random.Random) -> str:
    """\\uXXXX, as a surrogate pair beyond the first plane."""
    code = ord(char)
    units = [code] if code < 0x10000 else [0xD800 + ((code - 0x10000) >> 10), 0xDC00 + ((code - 0x10000) & 0x3FF)]
    return "".join(f"\\u{unit:04{rng.choice('xX')}}" for unit in units)


def _string(text: str, rng: random.Random) -> str:
    """A JSON string: each character as it is where that is allowed, or escaped one way or the other."""
    written = []
    for char in text:
        must_escape = char < " " or char in '"\\'
        way = rng.random()
        if char in _SHORT_ESCAPES and (way < 0.5 if must_escape else way < 0.1):
            written.append(_SHORT_ESCAPES[char])
        elif must_escape or way > 0.9:
            written.append(_escaped(char, rng))
        else:
            written.append(char)
    return '"' + "".join(written) + '"'


def _text(rng: random.Random, longest: int = 12) -> str:
    return "".join(rng.choice(_CHARACTERS) for _ in range(rng.randint(0, longest)))


def _gap(rng: random.Random, spaces: str) -> str:
    return "".join(rng.choice(spaces) for _ in range(rng.choice([0, 0, 0, 1, 1, 3]))) if spaces else ""


def _value(rng: random.Random, depth: int, spaces: str) -> tuple[str, Any]:
    kind = rng.random()
    if depth > 0 and kind < 0.15:
        return _object(rng, depth - 1, spaces)
    if depth > 0 and kind < 0.3:
        items = [_value(rng, depth - 1, spaces) for _ in range(rng.randint(0, 4))]
        comma = _gap(rng, spaces) + "," + _gap(rng, spaces)
        return "[" + _gap(rng, spaces) + comma.join(text for text, _ in items) + _gap(rng, spaces) + "]", [v for _, v in items]
    if kind < 0.5:
        return rng.choice(_NUMBERS)
    if kind < 0.6:
        return rng.choice([("true", True), ("false", False), ("null", None)])
    text = _text(rng, 30)
    return _string(text, rng), text


def _object(rng: random.Random, depth: int = 3, spaces: str = " \t\r") -> tuple[str, dict[str, Any]]:
    """An object with at least one member, and what it is."""
    members: dict[str, Any] = {}
    written = []
    for number in range(rng.randint(1, 4)):
        key = rng.choice(["prompt", "completion", "text", "", "é", "e\u0301", "A", "a", _text(rng)])
        key = key if key not in members else f"{key}{number}"
        if key in members:
            continue
        text, members[key] = _value(rng, depth, spaces)
        written.append(_string(key, rng) + _gap(rng, spaces) + ":" + _gap(rng, spaces) + text)
    comma = _gap(rng, spaces) + "," + _gap(rng, spaces)
    return "{" + _gap(rng, spaces) + comma.join(written) + _gap(rng, spaces) + "}", members


#: A line of a JSON Lines file, without its end, and the fields it holds; None where it is no record.
_Line = tuple[bytes, dict[str, Any] | None]


def _good(rng: random.Random) -> _Line:
    text, members = _object(rng)
    return text.encode(), members


def _simple(rng: random.Random) -> _Line:
    """A record as people write them."""
    prompt, completion = f"question {rng.randrange(10**6)}", rng.choice(["yes", "no", "naïve", "Straße"])
    return f'{{"prompt": "{prompt}", "completion": "{completion}"}}'.encode(), {"prompt": prompt, "completion": completion}


# ---- lines that are no records --------------------------------------------------------------------------------------


def _holding(value: str, rng: random.Random) -> bytes:
    """An object whose only fault, if any, is this value."""
    places = ['{{"a": {}}}', '{{"a":1,"b":{}}}', '{{"a":[{}]}}', '{{"m":[{{"role":"user","x":{}}}]}}', ' {{"a" : {} }} ']
    return rng.choice(places).format(value).encode()


def _truncated(rng: random.Random) -> _Line:
    """Any beginning of an object is no object: its first brace is not closed."""
    whole = _good(rng)[0]
    return whole[: rng.randrange(1, len(whole))].rstrip(b" \t\r") or b"{", None


def _trailing(rng: random.Random) -> _Line:
    more = rng.choice([",", "]", "}", "{}", " null", "x", " // why", "#", '{"a": 1}', ";", "\x0c", "\u00a0", ' ,{"a":1}', "\0"])
    return _good(rng)[0] + more.encode(), None


def _no_object(rng: random.Random) -> _Line:
    texts = ["[]", "[1, 2]", '[{"a": 1}]', '"text"', '"{}"', "0", "-1", "1.5e3", "true", "false", "null", '""', "[[]]"]
    return rng.choice(texts).encode(), None


def _wrong_number(rng: random.Random) -> _Line:
    texts = (
        "NaN Infinity -Infinity nan inf -inf +1 01 -01 1. .5 -.5 0x1F 1e 1e+ 1.e1 --1 1_000 1,000.5 1/2 0b1 1f - + ١ １ -NaN ∞"
    )
    return _holding(rng.choice(texts.split()), rng), None


def _overflow(rng: random.Random) -> _Line:
    short = ["1e309", "-1e309", "1e999", "-1E+999", "1.8e308", "0.1e400"]
    return _holding(rng.choice([*short, "9" * 400 + ".0", "1" * 310 + "e0", "1" + "0" * 5000, "-" + "9" * 9999]), rng), None


def _wrong_word(rng: random.Random) -> _Line:
    words = ["True", "False", "None", "TRUE", "Null", "nul", "tru", "undefined", "N/A", "yes", "text", 'a"b"', "u'a'", "b'a'"]
    signs = ["'text'", "`text`", "<a>", "$1", "@", "&amp;", "\\n", '"', "'"]
    return _holding(rng.choice([*words, *signs]), rng), None


_WRONG_GRAMMAR = """
{,}  {"a"}  {"a":}  {:1}  {"a":1,}  {,"a":1}  {"a":1,,"b":2}  {"a":1 "b":2}  {"a" 1}  {"a"::1}  {a:1}  {'a':1}  {1:1}  {null:1}
{"a":[1,]}  {"a":[,1]}  {"a":[1 2]}  {"a":[1:2]}  {"a":(1)}  {"a":1;"b":2}  {"a"=1}  {"a":1]  {"a":[1}  {"a":[1}]  {[]:1}
{{"a":1}}  {"a":{}}}  {  }  {]  "a":1  a  {"a":1/**/}  {"a":"b" "c"}  {"a":"b"+"c"}  {"a":'b"}  {"a":["b}  {"a":"b
{"a  \\{}  {}\\  prompt,completion  <record/>  ---  # a: 1  a: 1  //  {"a":1}}  [{"a":1}  {"a":1},  {"a":1}{  {"a":+}  {"a":[}]}
"""


def _wrong_grammar(rng: random.Random) -> _Line:
    texts = [text for line in _WRONG_GRAMMAR.splitlines() for text in line.split("  ") if text]
    return rng.choice(texts).encode(), None


def _control_character(rng: random.Random) -> _Line:
    code = rng.choice([code for code in range(32) if code != 10])
    place = rng.choice([b'{"a": "x%cy"}', b'{"a%c": 1}', b'{"a": [{"b": "%c"}]}'])
    return place % code, None


_ODD_SPACES = "\x0b\x0c\x1c\x7f\x85\xa0\u1680\u2003\u200b\u2028\u2029\u3000\ufeff"


def _odd_space(rng: random.Random) -> _Line:
    """White space that JSON does not know between tokens, or a whole line of it."""
    odd = rng.choice([rng.choice(_ODD_SPACES), "\x0b", "\x0c", "\x1c"])
    places = ['{{{}"a": 1}}', '{{"a":{} 1}}', '{{"a": 1{}}}', '{{"a": 1}}{}', '{{"a": [1,{}2]}}', "{}", " {}\t"]
    return rng.choice(places).format(odd).encode(), None


def _wrong_escape(rng: random.Random) -> _Line:
    short = ["\\x41", "\\'", "\\a", "\\0", "\\N", "\\", "\\ ", "\\U0001F600"]
    unicode = ["\\u", "\\u1", "\\u12", "\\u123", "\\u12G4", "\\u+123", "\\u 123", "\\u{1F600}"]
    return _holding('"' + rng.choice(["", "x"]) + rng.choice(short + unicode) + rng.choice(['"', 'y"']), rng), None


def _half_pair(rng: random.Random) -> _Line:
    high = f"\\u{rng.randrange(0xD800, 0xDC00):04{rng.choice('xX')}}"
    low = f"\\u{rng.randrange(0xDC00, 0xE000):04{rng.choice('xX')}}"
    wrong = rng.choice(
        [high, low, low + high, high + high + low, high + "x" + low, high + "\\n", "\\\\" + low, high + "😀", high + "\\u0041"]
    )
    text = '"' + rng.choice(["", "x", "é", "[" * 70]) + wrong + rng.choice(["", "y", "\\\\"]) + '"'
    return rng.choice([_holding(text, rng), f"{{{text}: 1}}".encode()]), None


def _twice(rng: random.Random) -> _Line:
    key = rng.choice(["a", "", "prompt", "é", "😀", "a b"])
    first, second = _string(key, rng), _string(key, rng)
    between = "".join(f'"k{number}": {number}, ' for number in range(rng.choice([0, 0, 1, 40])))
    text = f"{{{first}: 1, {between}{second}: {rng.choice(['1', '2', 'null'])}}}"
    return rng.choice(["{}", '{{"m": {}}}', '{{"m": [{}]}}', '{{"m": [[{{"n": {}}}]]}}']).format(text).encode(), None


def _nested(depth: int, rng: random.Random) -> tuple[bytes, dict[str, Any]]:
    """An object with lists and objects in one another, `depth` of them with the object itself."""
    value: Any = 0
    opening, closing = [], []
    for _ in range(depth - 1):
        if rng.random() < 0.5:
            opening.append("[")
            closing.append("]")
            value = [value]
        else:
            opening.append('{"k":')
            closing.append("}")
            value = {"k": value}
    text = '{"a":' + "".join(reversed(opening)) + "0" + "".join(closing) + "}"
    return text.encode(), {"a": value}


def _too_deep(rng: random.Random) -> _Line:
    depth = rng.choice([65, 66, 80, 100, 128, 500, 501, 1000, 5000, *([100_000] if rng.random() < 0.15 else [])])
    whole = _nested(depth, rng)[0]
    return rng.choice([whole, b'{"a":' + b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth, whole[:-1]]), None


def _deep(rng: random.Random) -> _Line:
    """As deep as is read, or wide with many brackets, or with brackets in text: all records."""
    which = rng.random()
    if which < 0.4:
        return _nested(rng.choice([2, 30, 63, 64]), rng)
    if which < 0.7:
        count = rng.randint(60, 300)
        return b'{"a":[' + b",".join([b"[],{}"] * count) + b"]}", {"a": [[], {}] * count}
    text = rng.choice(["[", "{", '[{"', '\\"[', "]["]) * rng.randint(60, 300)
    return b'{"a":' + _string(text, rng).encode() + b"}", {"a": text}


_BAD_BYTES = [
    *(b"\x80", b"\xbf", b"\x93text\x94", b"\xe9", b"\xfc", b"\xa4\xe5"),  # Latin-1, Windows-1252, a torn character
    *(b"\xc3", b"\xc3\x28", b"\xe2\x82", b"\xf0\x9f\x98"),  # begun and not ended
    *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xf0\x80\x80\x80"),  # longer than they need be
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb8\x80"),  # halves of surrogate pairs, and a pair
    *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff"),  # beyond Unicode
]


def _not_utf8(rng: random.Random) -> _Line:
    bad = rng.choice(_BAD_BYTES)
    place = rng.choice(
        [b'{"a": "x%by"}', b'{"a%b": 1}', b'{"a": %b}', b'%b{"a": 1}', b'{"a": 1}%b', b'{"a": "\\u00e9 \xc3\xa9 %b"}', b"%b"]
    )
    return place.replace(b"%b", bad), None


def _nul(rng: random.Random) -> _Line:
    zeros = b"\0" * rng.choice([9, 16, 100, 511, 4096])
    record = _simple(rng)[0]
    middle = rng.randrange(1, len(record))
    torn = [record[:middle] + zeros, record[:middle] + b"\0" + record[middle:]]
    return rng.choice([zeros, zeros + record, record + zeros, *torn]), None


def _inner_mark(rng: random.Random) -> _Line:
    mark = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
    return mark + _simple(rng)[0], None


def _joined(rng: random.Random) -> _Line:
    """Two records with no line feed between them."""
    between = rng.choice([b"", b" ", b"\r", b",", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0c", b"\t", b"\\n"])
    return _simple(rng)[0] + between + _simple(rng)[0], None


# ---- JSON Lines files -----------------------------------------------------------------------------------------------

_BLANK = [b"", b" ", b"\t", b"\r", b"  \r", b" \t \r\r"]


def _lines_file(rng: random.Random, lines: list[_Line], *, mark: bool | None = None, final_end: bool | None = None) -> Case:
    """The lines, blank ones strewn in, each with a line end of its own; the truth follows from the lengths."""
    mark = rng.random() < 0.1 if mark is None else mark
    final_end = rng.random() < 0.7 if final_end is None else final_end
    content = bytearray(b"\xef\xbb\xbf" if mark else b"")
    expected = []
    number = 1
    for position, (line, fields) in enumerate(lines):
        while rng.random() < 0.15:
            content += rng.choice(_BLANK) + b"\n"
            number += 1
        expected.append(Expected(number, len(content), fields))
        content += line
        if final_end or position < len(lines) - 1:
            content += rng.choice([b"\n", b"\n", b"\r\n"])
            number += 1
    return Case("", bytes(content), rng.choice([".jsonl", ".jsonl", ".ndjson"]), expected)


def _among_good(line: Callable[[random.Random], _Line]) -> Callable[[random.Random], Case]:
    """Files in which such lines stand among records."""

    def made(rng: random.Random) -> Case:
        # A record first: what the first bytes of a file mean for all of it has cases of its own.
        lines = [_simple(rng), line(rng)]
        lines += [rng.choice([line, _good, _simple])(rng) for _ in range(rng.randint(0, 4))]
        return _lines_file(rng, lines)

    return made


def _torn(rng: random.Random) -> Case:
    """A last line that its writer did not finish."""
    lines = [_good(rng) for _ in range(rng.randint(1, 4))]
    return _lines_file(rng, [*lines, _truncated(rng)], final_end=False)


def _marked(rng: random.Random) -> Case:
    """A byte order mark at the beginning is none of the record's business; a second one is."""
    first = rng.choice([_good(rng), _simple(rng), (b"\xef\xbb\xbf" + _simple(rng)[0], None), _truncated(rng)])
    return _lines_file(rng, [first, _good(rng)], mark=True)


def _wide(rng: random.Random) -> Case:
    text = "\n".join('{"prompt": "question é", "completion": "answer"}' for _ in range(rng.randint(1, 30)))
    codec = rng.choice(["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    mark = "\ufeff" if rng.random() < 0.5 else ""
    suffix = rng.choice([".jsonl", ".json", ".csv", ".txt"])
    return Case("", (mark + ("[" if suffix == ".json" else "") + text).encode(codec), suffix, refused=codec[:6].upper())


def _nothing(rng: random.Random) -> Case:
    suffix = rng.choice([".jsonl", ".json", ".csv", ".txt"])
    spaces = [] if suffix == ".csv" else [b" \n\t\r\n\n", b"\r", b" "]  # in a table they could be a column's name
    content = rng.choice([b"", b"\n", b"\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", *spaces])
    return Case("", content, suffix, refused="holds no records")


def _compressed(rng: random.Random) -> Case:
    """Whole compressed files, of one member or several; offsets are those of what was compressed."""
    plain = _lines_file(rng, [rng.choice([_good, _simple, _truncated, _nul, _not_utf8])(rng) for _ in range(rng.randint(1, 9))])
    cut = rng.randrange(len(plain.file_bytes) + 1)
    parts = [plain.file_bytes] if rng.random() < 0.5 else [plain.file_bytes[:cut], plain.file_bytes[cut:]]
    suffix, compress = rng.choice([(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
    return Case("", b"".join(compress(part) for part in parts), plain.suffix + suffix, plain.expected)


# ---- JSON arrays ----------------------------------------------------------------------------------------------------

_ARRAY_SPACE = " \t\r\n"


class _Growing:
    """A file that grows, and the place of its end."""

    def __init__(self, begun: bytes = b"") -> None:
        self.content = bytearray(begun)
        self.expected: list[Expected] = []

    def here(self, fields: dict[str, Any] | None) -> None:
        """What comes next is this."""
        self.expected.append(Expected(self.content.count(b"\n") + 1, len(self.content), fields))

    def case(self, suffix: str) -> Case:
        return Case("", bytes(self.content), suffix, self.expected)


def _array_begun(rng: random.Random, least: int = 0) -> _Growing:
    """`[` and some good elements, each with a comma after it."""
    file = _Growing(rng.choice([b"", b"", b"\xef\xbb\xbf"]))
    file.content += _gap(rng, _ARRAY_SPACE).encode() + b"[" + _gap(rng, _ARRAY_SPACE).encode()
    for _ in range(rng.randint(least, 3)):
        text, fields = _object(rng, spaces=_ARRAY_SPACE)
        file.here(fields)
        file.content += text.encode() + _gap(rng, _ARRAY_SPACE).encode() + b"," + _gap(rng, _ARRAY_SPACE).encode()
    return file


def _array_ended(file: _Growing, rng: random.Random) -> Case:
    """One more element, and `]`."""
    text, fields = _object(rng, spaces=_ARRAY_SPACE)
    file.here(fields)
    file.content += text.encode() + _gap(rng, _ARRAY_SPACE).encode() + b"]" + rng.choice([b"", b"\n", b" \r\n"])
    return file.case(".json")


def _array_good(rng: random.Random) -> Case:
    return _array_ended(_array_begun(rng), rng)


def _array_resumed(rng: random.Random) -> Case:
    """Elements that are no records, though it is certain where they end: reading goes on."""
    file = _array_begun(rng)
    for _ in range(rng.randint(1, 3)):
        faulty = rng.choice([_half_pair, _twice, _no_object, _overflow, _not_utf8_inside, _well_formed_too_deep, _not_finite])
        file.here(None)
        file.content += faulty(rng)[0].strip() + _gap(rng, _ARRAY_SPACE).encode() + b"," + _gap(rng, _ARRAY_SPACE).encode()
    return _array_ended(file, rng)


def _not_utf8_inside(rng: random.Random) -> _Line:
    return rng.choice([b'{"a": "x%b"}', b'{"a%b": 1}', b'{"a": ["[", "%b"]}']).replace(b"%b", rng.choice(_BAD_BYTES)), None


def _well_formed_too_deep(rng: random.Random) -> _Line:
    return _nested(rng.choice([65, 100, 300]), rng)[0], None


def _not_finite(rng: random.Random) -> _Line:
    return _holding(rng.choice(["NaN", "Infinity", "-Infinity"]), rng), None


def _array_broken(rng: random.Random) -> Case:
    """Elements broken at a known byte: all before them is read, and nothing after them."""
    file = _array_begun(rng, least=1)
    way = rng.randrange(8)
    after = b', {"a": 1}, {"b": "]"}]'
    if way == 0:  # something that begins no value
        file.content += rng.choice([b'{"a": ', b"", b'{"a": "[", "b": [1, '])
        file.here(None)
        file.content += rng.choice([b"?", b"'a'", b"$", b"\xff", b"\0", b";"]) + b"}" + after
    elif way == 1:  # a comma before the end
        file.here(None)
        file.content += b"]"
    elif way == 2:  # the file ends after a comma
        file.here(None)
    elif way == 3:  # it ends inside an element
        file.here(None)
        whole = _object(rng, spaces=_ARRAY_SPACE)[0].encode()
        file.content += whole[: rng.randrange(1, len(whole))]
        while file.content[-1:].isspace():  # white space at the end would be no beginning of the element
            del file.content[-1:]
    elif way == 4:  # no comma between two
        text, fields = _object(rng, spaces=_ARRAY_SPACE)
        file.here(fields)
        file.content += text.encode() + rng.choice([b"", b" ", b"\n"])
        file.here(None)
        file.content += b'{"a": 1}]'
    elif way == 5:  # it ends after an element
        text, fields = _object(rng, spaces=_ARRAY_SPACE)
        file.here(fields)
        file.content += text.encode() + _gap(rng, _ARRAY_SPACE).encode()
        file.here(None)
    elif way == 6:  # more after the array
        text, fields = _object(rng, spaces=_ARRAY_SPACE)
        file.here(fields)
        file.content += text.encode() + b"]" + _gap(rng, _ARRAY_SPACE).encode()
        file.here(None)
        file.content += rng.choice([b"[]", b",", b"]", b"\0\0\0", b'{"a": 1}', b"x"])
    else:  # deeper than any parser can be asked about
        file.here(None)
        depth = rng.choice([600, 5000, *([100_000] if rng.random() < 0.3 else [])])
        file.content += rng.choice([b'{"a":' + b"[" * depth, _nested(depth, rng)[0]]) + after
    return file.case(".json")


def _array_not(rng: random.Random) -> Case:
    content = rng.choice(
        [b'{"a": 1}', b'{"data": []}', b'{"a": 1}\n{"a": 2}\n', b"null", b"]", b"\0\0\0\0\0\0\0\0\0", b"'", b"\xff[", b"a,b\n1,2"]
    )
    return Case("", content, ".json", refused="expected an array of objects")


# ---- tables ---------------------------------------------------------------------------------------------------------


def _cell(rng: random.Random, delimiter: str) -> tuple[str, str]:
    """A value as written, quoted where it must be, and the value."""
    plain = ["yes", "", "naïve", "5' 6", " x ", "漢字", "NaN", "\ufeff", "\u2028"]
    value = rng.choice([*plain, 'say "hi"', '"', "a,b", "a\tb", "two\nlines", "two\r\nlines", "\r"])
    must = any(char in value for char in f'"\r\n{delimiter}')
    if must or rng.random() < 0.3:
        return '"' + value.replace('"', '""') + '"', value
    return value, value


def _table(rng: random.Random, bad: Callable[[_Growing, str, random.Random], bool] | None) -> Case:
    """A table of three columns; `bad` puts in a row that is none, and says whether reading goes on after it."""
    suffix, delimiter = rng.choice([(".csv", ","), (".csv", ","), (".tsv", "\t")])
    end = rng.choice(["\n", "\r\n"])
    names = ["prompt", "completion", "nöte, 1" if delimiter == "\t" else "note"]
    file = _Growing(rng.choice(["", "", "\ufeff"]).encode() + (delimiter.join(names) + end).encode())
    goes_on = True
    bad_at = rng.randint(1, 4)
    for number in range(6):
        if rng.random() < 0.1:
            file.content += end.encode()
        if bad and number == bad_at:
            goes_on = bad(file, delimiter, rng)
            file.content += end.encode()
        elif goes_on:
            cells = [_cell(rng, delimiter) for _ in names]
            file.here(dict(zip(names, (value for _, value in cells), strict=True)))
            file.content += (delimiter.join(text for text, _ in cells) + end).encode()
        else:
            file.content += delimiter.join(["never", "read", "again"]).encode() + end.encode()
    return file.case(suffix)


def _row_of_wrong_length(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    file.content += delimiter.join(_cell(rng, delimiter)[0] or "x" for _ in range(rng.choice([1, 2, 4, 9]))).encode()
    return True


def _row_of_bad_bytes(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    bad = rng.choice([*_BAD_BYTES, b"\0", b"\0" * 512])
    file.content += rng.choice([b"x" + bad, b'"two\n' + bad + b'"', bad]) + delimiter.encode() + b"b" + delimiter.encode() + b"c"
    return True


def _row_of_nul(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    file.content += b"\0" * rng.choice([1, 8, 4096])
    return True


def _row_with_return(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    file.content += f"a{delimiter}b\rc{delimiter}d".encode()
    return True


def _row_with_wrong_quote(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    file.content += rng.choice(
        [f'"a" b{delimiter}c{delimiter}d', f'a{delimiter}"b"c"{delimiter}d', f'""a"{delimiter}b{delimiter}c']
    ).encode()
    return False


def _row_never_closed(file: _Growing, delimiter: str, rng: random.Random) -> bool:
    file.here(None)
    file.content += f'a{delimiter}"b{delimiter}c'.encode()
    return False


def _table_refused(rng: random.Random) -> Case:
    content, words = rng.choice(
        [
            (b"a,b,a\n1,2,3\n", "twice"),
            (b'a,"b\n1,2\n', "not valid CSV"),
            (b'"a" b,c\n1,2\n', "not valid CSV"),
            (b"a,\xff\n1,2\n", "not UTF-8"),
            (b"a,b\0\n1,2\n", "NUL"),
            (b"a,b\n", "holds no records"),
            (b"a,b\r\n\r\n", "holds no records"),
            (b"a,b\r1,2\r3,4\r", "carriage return"),
        ]
    )
    return Case("", content, ".csv", refused=words)


def _document(rng: random.Random) -> Case:
    """A text file is one record, whatever its line ends."""
    text = "\n".join([_text(rng, 60).replace("\0", ""), "end", *(_text(rng, 60).replace("\0", "") for _ in range(3))])
    mark = rng.choice([b"", b"\xef\xbb\xbf"])
    while text.startswith("\ufeff"):
        text = text[1:]
    return Case("", mark + text.encode(), ".txt", [Expected(1, len(mark), {"text": text})])


def _document_bad(rng: random.Random) -> Case:
    before = "".join(rng.choice(["word ", "zwölf ", "\n", "\r\n"]) for _ in range(20))
    file = _Growing(b"a" + before.encode())
    file.here(None)
    file.content += rng.choice([b"\xff", b"\0", b"\xed\xa0\x80", b"\x80", b"\0" * 100]) + b" more"
    return file.case(".txt")


CLASSES: dict[str, Callable[[random.Random], Case]] = {
    "good": _among_good(_good),
    "deep": _among_good(_deep),
    "truncated": _among_good(_truncated),
    "trailing": _among_good(_trailing),
    "no-object": _among_good(_no_object),
    "wrong-number": _among_good(_wrong_number),
    "overflow": _among_good(_overflow),
    "wrong-word": _among_good(_wrong_word),
    "wrong-grammar": _among_good(_wrong_grammar),
    "control-character": _among_good(_control_character),
    "odd-space": _among_good(_odd_space),
    "wrong-escape": _among_good(_wrong_escape),
    "half-pair": _among_good(_half_pair),
    "twice": _among_good(_twice),
    "too-deep": _among_good(_too_deep),
    "not-utf8": _among_good(_not_utf8),
    "nul": _among_good(_nul),
    "inner-mark": _among_good(_inner_mark),
    "joined": _among_good(_joined),
    "torn": _torn,
    "marked": _marked,
    "wide": _wide,
    "nothing": _nothing,
    "compressed": _compressed,
    "array-good": _array_good,
    "array-resumed": _array_resumed,
    "array-broken": _array_broken,
    "array-not": _array_not,
    "table-good": lambda rng: _table(rng, None),
    "table-wrong-length": lambda rng: _table(rng, _row_of_wrong_length),
    "table-bad-bytes": lambda rng: _table(rng, _row_of_bad_bytes),
    "table-nul": lambda rng: _table(rng, _row_of_nul),
    "table-return": lambda rng: _table(rng, _row_with_return),
    "table-wrong-quote": lambda rng: _table(rng, _row_with_wrong_quote),
    "table-never-closed": lambda rng: _table(rng, _row_never_closed),
    "table-refused": _table_refused,
    "document": _document,
    "document-bad": _document_bad,
}
