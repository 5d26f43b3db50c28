"""Reading records: what each kind of file yields, where each record stands, and how bad files are refused."""

from __future__ import annotations

import bz2
import datetime
import decimal
import errno
import gzip
import json
import lzma
import random
import sys
import tracemalloc
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from fullrank import loading
from fullrank.data import parse, rows, sources, tables
from fullrank.data.sources import Block, Origin, RawRecord, Reject, blocks, digest, pinned, read, read_at, records, size
from fullrank.errors import DataError, UsageError
from fullrank.recipe import Source


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes bytes or text under a name; returns the source."""

    def to(name: str, content: bytes | str, **options: Any) -> Source:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Source(path=str(path), **options)

    return to


def places(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """Line and fields of every record; there is no reject."""
    found = list(read(source))
    assert all(isinstance(item, RawRecord) for item in found), found
    return [(record.origin.line, record.fields) for record in found]


def rejects(source: Source) -> list[Reject]:
    return [item for item in read(source) if isinstance(item, Reject)]


def refusal(source: Source) -> str:
    """What is said of a file that cannot be used at all."""
    with pytest.raises(DataError) as caught:
        list(read(source))
    return caught.value.message


# ---- JSON Lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
def test_json_lines_knows_each_line(write: Any, name: str) -> None:
    source = write(name, '\ufeff{"a": 1}\r\n\n  \n{"a": "\u00fc"}')
    assert places(source) == [(1, {"a": 1}), (4, {"a": "\u00fc"})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_json_lines_are_split_at_line_feeds_only(write: Any, separator: str) -> None:
    text = f"one{separator}two"
    source = write("a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + '\n{"a": "next"}\n')
    assert places(source) == [(1, {"a": text}), (2, {"a": "next"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "not valid JSON: expecting ',' delimiter at column 8, where the text ends"),
        (b'{"a": oops}', "near 'oops}'"),
        (b'{"a": 1} {"a": 2}', "extra data at column 10"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is written twice"),
        (b'{"m": [{"role": 1, "role": 2}]}', "the key 'role' is written twice"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b'"text"', "expected a JSON object, found text"),
        (b"null", "expected a JSON object, found null"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at column 8"),
        (b'{"a": "\\ud83d"}', "half a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested too deeply (more than 64 levels)"),
        (b'{"a": 1e999}', "the number 1e999 is too large for a 64-bit float"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
        (b"\0" * 512 + b'{"a": 1}', "512 NUL bytes where a record should begin"),
        (b"\0" * 512, "512 NUL bytes where a record should begin, as a crashed writer leaves them"),
        (b'\xef\xbb\xbf{"a": 1}', "a byte order mark (U+FEFF) stands inside the file"),
        (b'{"a": 1}\r{"a": 2}', "a carriage return alone does not end it"),
        (b'{"' + b"k" * 5000 + b'": 1, "' + b"k" * 5000 + b'": 1}', "kkk... is written twice"),
    ],
)
def test_a_bad_json_line_is_named_with_what_was_found(write: Any, line: bytes, said: str) -> None:
    source = write("a.jsonl", b'{"a": 0}\n\n' + line + b'\n{"a": 1}\n')
    first, bad, last = read(source)
    assert (first.fields, last.fields) == ({"a": 0}, {"a": 1})
    assert bad.origin == Origin(source.path, 3, 10)
    assert said in bad.reason
    assert len(bad.reason.splitlines()) == 1
    assert not bad.loses_more


def test_a_whole_surrogate_pair_is_a_character(write: Any) -> None:
    assert places(write("a.jsonl", r'{"a": "\ud83d\ude00"}')) == [(1, {"a": "\N{GRINNING FACE}"})]


def test_sixty_four_levels_are_read(write: Any) -> None:
    value: Any = {"a": 1}
    for _ in range(63):
        value = {"a": value}
    assert places(write("a.jsonl", json.dumps(value))) == [(1, value)]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 1 << 20])
def test_brackets_in_text_are_no_levels(write: Any, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(parse, "_WINDOW_BYTES", window)
    for text in ("[" * 99, "\\", '\\"' + "{" * 99, '"' * 5 + "[{" * 50, "\\\\" + "]" * 99, "}" * 99):
        value: Any = [text]
        for _ in range(62):
            value = [text, value]
        good = {"a": value}
        source = write("a.jsonl", json.dumps(good) + "\n" + json.dumps({"a": [value]}))
        first, second = read(source)
        assert first.fields == good
        assert "more than 64 levels" in second.reason


def test_every_record_knows_its_byte(write: Any) -> None:
    source = write("a.jsonl", '\ufeff{"a": "ü"}\r\n\n{"a": 2}')
    assert [item.origin.offset for item in read(source)] == [3, 17]
    assert read_at(source.path, 17, 3) == RawRecord(Origin(source.path, 3, 17), {"a": 2})
    assert str(read_at(source.path, 3).origin) == f"{source.path} at byte 3"


@pytest.mark.parametrize("offset", [1, 12, 500])
def test_a_record_that_is_no_longer_there_is_an_error(write: Any, offset: int) -> None:
    source = write("a.jsonl", '{"a": 1}\n\n{"b" 2}\n')
    with pytest.raises(DataError, match="there is no record here any more"):
        read_at(source.path, offset, 1)


@pytest.mark.parametrize("block_bytes", [8, 9, 16, 64, 1000])
def test_blocks_are_whole_lines_and_lose_nothing(write: Any, block_bytes: int) -> None:
    content = '{"a": 1}\n\n\r\n{"a": "' + "long " * 50 + '"}\n{bad\n' + '{"b": 22}\n' * 9 + '{"c": 3}'
    source = write("a.jsonl", content)
    found = list(blocks(source, block_bytes=block_bytes))
    for block in found:
        end = block.offset + len(block.payload)
        assert block.payload == content.encode()[block.offset : end]
        assert block.first == content.encode()[: block.offset].count(b"\n") + 1
        assert block.payload.endswith(b"\n") or end == len(content)
        assert len(block.payload) <= block_bytes or block.payload.count(b"\n") == 1
        assert (block.kind, block.seekable, block.source_bytes) == ("lines", True, end)
    assert [item for block in found for item in records(block)] == list(read(source))
    assert len(list(read(source))) == 13
    assert size(source) == len(content)


def test_equal_lines_at_other_places_make_equal_payloads(write: Any) -> None:
    lines = [json.dumps({"a": "x" * 80, "n": number}) + "\n" for number in range(100)]
    plain = [block.payload for block in blocks(write("a.jsonl", "".join(lines)), block_bytes=1000)]
    marked = [block.payload for block in blocks(write("b.jsonl", "\ufeff" + "".join(lines)), block_bytes=1003)]
    assert marked[0] == plain[0]
    longer = [block.payload for block in blocks(write("c.jsonl", "".join(lines) + '{"a": 1}\n'), block_bytes=1000)]
    assert longer[: len(plain) - 1] == plain[:-1]


def test_a_line_longer_than_a_block_is_a_block(write: Any) -> None:
    text = "word " * 2_000_000
    source = write("a.jsonl", json.dumps({"a": text}) + '\n{"a": 2}\n')
    assert places(source) == [(1, {"a": text}), (2, {"a": 2})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_record_too_long_to_hold_is_refused(write: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(parse, "LONGEST_BYTES", 1000)
    monkeypatch.setattr(parse, "_WINDOW_BYTES", 100)
    monkeypatch.setattr(tables, "LONGEST_BYTES", 1000)
    long = "x" * 2000
    content = {
        "a.jsonl": '{"a": "y"}\n{"a": "' + long + '"}\n{"a": "z"}\n',
        "a.json": '[{"a": "y"},\n{"a": "' + long + '"}]',
        "a.csv": 'a\ny\n"never closed\n' + "xxxxxxxx\n" * 300,
        "a.txt": long,
    }[name]
    source = write(name, content)
    found = [item for block in blocks(source, block_bytes=64) for item in records(block)]
    assert [item.fields for item in found if isinstance(item, RawRecord)] == {
        "a.jsonl": [{"a": "y"}, {"a": "z"}],
        "a.json": [{"a": "y"}],
        "a.csv": [{"a": "y"}],
        "a.txt": [],
    }[name]
    [bad] = [item for item in found if isinstance(item, Reject)]
    assert bad.origin.line == {"a.jsonl": 2, "a.json": 2, "a.csv": 3, "a.txt": 1}[name]
    assert bad.loses_more == (name in ("a.json", "a.csv"))


def test_a_file_without_line_ends_is_not_held(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "LONGEST_BYTES", 1 << 20)
    source = write("a.jsonl", b"\0" * (32 << 20) + b'\n{"a": 1}\n')
    tracemalloc.start()
    bad, good = read(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (bad.origin.line, bad.origin.offset) == (1, 0)
    assert good.origin == Origin(source.path, 2, (32 << 20) + 1)
    assert peak < 16 << 20


def test_the_limit_counts_what_is_rejected(write: Any) -> None:
    source = write("a.jsonl", '{"a": 1}\n\n{bad\n{"a": 2}\n{worse\n', limit=2)
    found = list(read(source))
    assert [type(item) for item in found] == [RawRecord, Reject]
    assert [block.payload for block in blocks(source)] == [b'{"a": 1}\n\n{bad\n']


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_every_kind_keeps_the_limit(write: Any, name: str) -> None:
    rows = [{"a": str(number)} for number in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content: Any = {"a.jsonl": lines, "a.json": json.dumps(rows), "a.csv": "a\n" + "\n".join(row["a"] for row in rows)}
    source = write(name, content.get(name) or gzip.compress(lines.encode()), limit=4)
    for block_bytes in (1, 20, 1000):
        found = [item for block in blocks(source, block_bytes=block_bytes) for item in records(block)]
        assert [item.fields for item in found] == rows[:4]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def test_a_json_array_gives_the_line_on_which_each_record_begins(write: Any) -> None:
    source = write("a.json", '\n[\n  {"a": 1},\n  {\n    "a": "x\u2028\\n"\n  }, {"a": 3}\n]\n')
    assert places(source) == [(3, {"a": 1}), (4, {"a": "x\u2028\n"}), (6, {"a": 3})]


def test_a_json_array_as_json_dump_writes_it(write: Any) -> None:
    rows = [{"a": [1, {"b": None}]}, {"a": "], [{"}]
    for indent in (None, 2):
        assert [fields for _, fields in places(write("a.json", json.dumps(rows, indent=indent)))] == rows


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[{"a": 1},\n{"a": 2}', 2, "found the end of the file"),
        ('[{"a": 1}\n{"a": 2}]', 2, "expected ',' or ']' after a record, found '{\"a\": 2}]'"),
        ('[{"a": 1},\n]', 2, "expecting value"),
        ('[{"a": 1},\n{"a":\n?}]', 3, "near '?}]'"),
        ('[{"a": 1}]\n[]', 2, "more text after the array"),
        ("[", 1, "expecting value, where the text ends"),
        ('[{"a": 1},\n{"a": "x}, {"b": "{}"}, {}]', 2, "a value that begins here does not end"),
        ('[{"a": 1},\n{"a": 2 "b": 3}, {}]', 2, "not valid JSON: expecting ',' delimiter, near '\"b\": 3}, {}]'"),
        ('[{"a": 1},\n\n{"a": [1, 2}', 3, "a value that begins here does not end"),
    ],
)
def test_a_json_file_is_read_up_to_where_it_breaks(write: Any, text: str, line: int, said: str) -> None:
    source = write("a.json", text)
    *good, bad = read(source)
    assert [item.fields for item in good] == [{"a": 1}, {"a": 2}][: len(good)]
    assert good or text == "["
    assert bad.origin.line == line
    assert said in bad.reason and bad.reason.endswith("; the rest of the file was not read")
    assert bad.loses_more


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (b'{"a":\nNaN}', "NaN is not a JSON number"),
        (b"2", "expected a JSON object, found a number"),
        (b'{"a": "\xe9"}', "not UTF-8: byte 0xe9 at column 8"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": 1, "a": 2}', "written twice"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
    ],
)
def test_a_json_element_that_is_no_record_costs_itself_only(write: Any, element: bytes, said: str) -> None:
    found = list(read(write("a.json", b'[{"a": 1},\n  ' + element + b',\n{"a": 3}]')))
    assert [type(item) for item in found] == [RawRecord, Reject, RawRecord]
    assert said in found[1].reason
    assert (found[1].origin.line, found[1].origin.offset) == (2, 13)


@pytest.mark.parametrize("text", ['{"data": []}', '{"a": 1}\n{"a": 2}\n'])
def test_json_that_is_no_array_is_refused(write: Any, text: str) -> None:
    assert ":1: expected an array of objects ([...]), found '{" in refusal(write("a.json", text))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 17])
def test_a_json_array_is_read_in_pieces_of_any_size(write: Any, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    rows = [{"a": 'q"\\'}, {"a": [1, {"b": "]}"}]}, {"a": "é\u2028\U0001f600"}]
    source = write("a.json", "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False))
    whole = list(read(source))
    monkeypatch.setattr(parse, "_WINDOW_BYTES", window)
    assert list(read(source)) == whole
    assert [item.fields for item in whole] == rows


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_rows_keep_quoted_line_breaks_and_know_their_first_line(write: Any) -> None:
    source = write("a.csv", '\ufeffprompt,completion\r\n"two\nlines, ""quoted""",x\r\n\r\n"y\u2028z",\r\n')
    assert places(source) == [
        (2, {"prompt": 'two\nlines, "quoted"', "completion": "x"}),
        (5, {"prompt": "y\u2028z", "completion": ""}),
    ]


def test_csv_takes_values_longer_than_the_modules_own_limit(write: Any) -> None:
    text = "word " * 40_000
    assert places(write("a.csv", f"text\n{text}\n")) == [(2, {"text": text})]


@pytest.mark.parametrize(
    ("text", "lines", "said"),
    [
        ("a,b\n1,2\n3\n4,5,6\n", [3, 4], "1 values where the header names 2 columns"),
        ('a,b\n1,2\n"x" y,2\n', [3], "not valid CSV"),
        ('a,b\n1,2\n"never closed,2\n\n', [3], "not valid CSV"),
        (b"a,b\n1,2\n3,\xff\n", [3], "not UTF-8: byte 0xff at column 3"),
    ],
)
def test_a_bad_csv_row_is_refused_with_its_line(write: Any, text: bytes | str, lines: list[int], said: str) -> None:
    found = rejects(write("a.csv", text))
    assert [bad.origin.line for bad in found] == lines
    assert said in found[0].reason


def test_after_a_wrong_quote_nothing_of_a_table_is_believed(write: Any) -> None:
    text = 'a,b\n1,2\n"He said "yes, and\nno" ok",2\n3,4\n'
    good, bad = read(write("a.csv", text))
    assert good.fields == {"a": "1", "b": "2"}
    assert (bad.origin.line, bad.origin.offset, bad.loses_more) == (3, 8, True)
    assert bad.reason.endswith("the rest of the file was not read")


@pytest.mark.parametrize(("text", "said"), [("a,a\n1,2\n", "names the column 'a' twice"), (b"a,\xff\n1,2\n", "not UTF-8")])
def test_a_csv_header_that_cannot_be_used_is_refused(write: Any, text: bytes | str, said: str) -> None:
    source = write("a.csv", text)
    assert refusal(source).startswith(f"{source.path}:1: ")
    assert said in refusal(source)


def test_tab_separated_values_are_read_like_csv(write: Any) -> None:
    assert places(write("a.tsv", 'a\tb\nx, y\t"two\nlines"\n')) == [(2, {"a": "x, y", "b": "two\nlines"})]


# ---- text -----------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_record_as_it_is(write: Any) -> None:
    assert places(write("a.txt", "\ufeff\r\n Once\r\nupon \n")) == [(1, {"text": "\r\n Once\r\nupon \n"})]


def test_a_text_file_that_is_no_text_is_refused_at_the_byte(write: Any) -> None:
    [bad] = rejects(write("a.txt", b"one\ntwo \xe9"))
    assert (bad.origin.line, bad.origin.offset, bad.reason) == (2, 8, "not UTF-8: byte 0xe9 at column 5")


# ---- Parquet --------------------------------------------------------------------------------------------------------


def test_parquet_rows_count_from_one_over_all_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"t{n}" for n in range(3000)]}), path, row_group_size=700)
    records = list(read(Source(path=str(path))))
    assert [record.fields["text"] for record in records] == [f"t{n}" for n in range(3000)]
    assert str(records[2999].origin) == f"{path}:record 3000"


def test_parquet_leaves_out_what_a_struct_does_not_have(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": [turns], "label": pyarrow.array([None], pyarrow.string())}), path)
    [record] = read(Source(path=str(path)))
    assert record.fields == {
        "messages": [turns[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}],
        "label": None,
    }


def test_a_file_that_is_not_parquet_is_refused(write: Any) -> None:
    source = write("a.parquet", b"PAR1 and then nothing")
    assert refusal(source).startswith(f"{source.path}: cannot be read as Parquet: ")


def test_a_broken_row_group_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text number {n} " * 20 for n in range(300)]})
    parquet.write_table(table, path, row_group_size=100, compression=None, use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    place = content.index(b"text number 150 ")
    content[place] ^= 1
    path.write_bytes(content)
    found = list(read(Source(path=str(path))))
    [bad] = [item for item in found if isinstance(item, Reject)]
    assert bad.origin.line == 101 and bad.loses_more
    assert bad.reason.startswith("records 101 to 200 cannot be read as Parquet: ")
    good = [item for item in found if isinstance(item, RawRecord)]
    assert [item.origin.line for item in good] == [*range(1, 101), *range(201, 301)]
    assert [item.fields for item in good] == [row for n, row in enumerate(table.to_pylist(), 1) if not 101 <= n <= 200]


def test_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    binary = pyarrow.array([b"good", b"b\xe4d", b"good too"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": text}), path)
    first, bad, last = read(Source(path=str(path)))
    assert (first.fields["text"], last.fields) == ("good", {"n": 3, "text": "good too"})
    assert bad.origin.line == 2
    assert "the column 'text' (string) holds a value that cannot be read" in bad.reason


def test_values_that_json_lacks_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    row = {
        "raw": b"\x00\xff",
        "day": datetime.date(2024, 2, 29),
        "time": datetime.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "price": decimal.Decimal("1.10"),
        "lasted": datetime.timedelta(days=1, microseconds=7),
        "at": datetime.time(1, 2, 3),
        "nan": float("inf"),
        "turns": [{"role": "user", "n": 2**63 - 1, "ok": True}],
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    source = Source(path=str(path))
    assert [item.fields for item in read(source)] == [row, row]
    first, second = [block.payload for block in blocks(source, block_bytes=1)]
    assert first == second, "the payload does not say where the record stands"


def test_a_value_of_an_unknown_type_keeps_its_name() -> None:
    class Image:
        pass

    record = RawRecord(Origin("a", 1, unit="record"), {"text": "t", "image": Image()})
    payload = b"[" + rows.encode(record, 1, None) + b"]"
    [found] = records(Block("a", 1, None, payload, "rows", False, 0))
    assert found.fields["text"] == "t"
    assert sources.kind_of(found.fields["image"]) == "a Image"


def test_a_parquet_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    parquet.write_table(table, path)
    assert refusal(Source(path=str(path))) == f"{path}: names the column 'text' twice"


# ---- all kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", ""), ("a.json", " [ ]\n"), ("a.csv", ""), ("a.csv", "a,b\n")],
)
def test_a_file_without_records_is_refused(write: Any, name: str, content: str) -> None:
    source = write(name, content)
    assert refusal(source) == f"{source.path}: holds no records"


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert refusal(Source(path=str(path))) == f"{path}: holds no records"


@pytest.mark.parametrize("name", ["a.yaml", "a.jsonl.zip", "a.gz", "a.parquet.gz", ".jsonl", "a"])
def test_an_unknown_kind_lists_the_kinds(write: Any, name: str) -> None:
    assert "allowed: .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, and " in refusal(write(name, "x"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal(Source(path=str(tmp_path / "gone.jsonl"))).endswith("gone.jsonl: no such file")
    assert refusal(Source(path=str(tmp_path / "folder.jsonl"))).endswith("folder.jsonl: is not a file")


def test_origins_are_written_as_editors_read_them() -> None:
    assert str(Origin("a.jsonl", 3)) == "a.jsonl:3"
    assert str(Origin("a.parquet", 3, unit="record")) == "a.parquet:record 3"


def test_the_digest_follows_the_bytes_the_kind_and_the_limit(write: Any) -> None:
    first = digest(write("a.jsonl", '{"a": 1}'))
    assert digest(write("b.jsonl", '{"a": 1}')) == first, "the name does not matter"
    others = {
        digest(write("c.jsonl", '{"a": 2}')),
        digest(write("a.json", '{"a": 1}')),
        digest(write("a.jsonl", '{"a": 1}', limit=1)),
        digest(write("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0))),
    }
    assert len(others | {first}) == 5


def test_the_digest_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        digest(Source(path=str(tmp_path / "gone.jsonl")))


def test_a_file_that_may_not_be_read_is_named(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("a.jsonl", '{"a": 1}')

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(source) == f"{source.path}: cannot be read: Permission denied"
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        digest(source)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_file_in_a_wide_encoding_is_one_problem(write: Any, name: str, codec: str) -> None:
    source = write(name, ('{"prompt": "x"}\n' * 1000).encode(codec))
    assert refusal(source) == f"{source.path}: is {codec[:6].upper()} text; text files are read as UTF-8"


# ---- compression ----------------------------------------------------------------------------------------------------


def _zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": _zstd,
}


@pytest.fixture(params=COMPRESSIONS)
def compression(request: pytest.FixtureRequest) -> str:
    return request.param


def _many(count: int) -> list[dict[str, str]]:
    noise = random.Random(0)
    return [{"a": str(number), "b": noise.randbytes(60).hex()} for number in range(count)]


def test_compressed_files_are_read_as_what_was_compressed(write: Any, compression: str) -> None:
    rows = _many(3000)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compress = COMPRESSIONS[compression]
    for members in ([lines], [lines[:1234], lines[1234:]], [lines, b""]):
        source = write(f"a.jsonl{compression}", b"".join(map(compress, members)))
        assert places(source) == list(enumerate(rows, start=1))
        plain = [block.payload for block in blocks(write("a.jsonl", lines), block_bytes=10_000)]
        found = list(blocks(source, block_bytes=10_000))
        assert [block.payload for block in found] == plain, "blocks follow from the content alone"
        assert not any(block.seekable for block in found)
        done = [block.source_bytes for block in found]
        assert done == sorted(done) and done[-1] == size(source)
    assert places(write(f"a.json{compression}", compress(json.dumps(rows).encode()))) == [(1, row) for row in rows]
    table = "a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in rows)
    assert places(write(f"a.csv{compression}", compress(table.encode()))) == list(enumerate(rows, start=2))
    assert places(write(f"a.txt{compression}", compress(b"once"))) == [(1, {"text": "once"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_break_in_compressed_data_is_refused_where_it_is(write: Any, compression: str, name: str) -> None:
    rows = _many(12_000)
    content = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "a.json": "[" + ",\n".join(json.dumps(row) for row in rows) + "]",
        "a.csv": "a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in rows),
    }[name].encode()
    whole = COMPRESSIONS[compression](content)
    for cut in (len(whole) * 2 // 3, len(whole) - 3):
        *good, bad = read(write(name + compression, whole[:cut]))
        assert [item.fields for item in good] == rows[: len(good)]
        assert len(good) > 6_000 or compression in (".bz2", ".xz"), "those are decompressed in blocks of a megabyte or so"
        assert bad.loses_more and "data break here" in bad.reason and bad.reason.endswith("the rest of the file was not read")
        assert content[: bad.origin.offset].count(b"\n") + 1 == bad.origin.line
        # The place is where the next record begins; after the last one of an array, where the array goes on.
        expected = json.dumps(rows[len(good)]).encode() if len(good) < len(rows) else b"]"
        if name == "a.csv":
            expected = f"{rows[len(good)]['a']},".encode() if len(good) < len(rows) else b""
        if len(good) == len(rows) and not content[bad.origin.offset :]:
            expected = b""
        assert content[bad.origin.offset :].lstrip(b",\n").startswith(expected)


def test_a_wrong_checksum_is_seen(write: Any) -> None:
    whole = bytearray(gzip.compress(b'{"a": 1}\n'))
    whole[-6] ^= 1
    with pytest.raises(DataError, match="cannot be decompressed"):  # so little that nothing came out before
        list(read(write("a.jsonl.gz", bytes(whole))))
    content = b'{"a": 1}\n' * 100_000
    whole = bytearray(gzip.compress(content))
    whole[-6] ^= 1
    [bad] = rejects(write("a.jsonl.gz", bytes(whole)))
    assert bad.loses_more and "incorrect data check" in bad.reason


@pytest.mark.parametrize("block_bytes", [64, 10_000, 300_000, 1 << 20])
def test_a_line_longer_than_a_block_counts_if_it_ends_before_the_break(write: Any, block_bytes: int) -> None:
    rows = [{"a": "x" * 300_000}, {"a": "short"}, {"a": random.Random(0).randbytes(5000).hex()}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    source = write("a.jsonl.gz", gzip.compress(content)[:-100])
    *good, bad = [item for block in blocks(source, block_bytes=block_bytes) for item in records(block)]
    assert [item.fields for item in good] == rows[:2]
    assert (bad.origin.line, bad.origin.offset) == (3, content.index(b"\n", 300_020) + 1)


@pytest.mark.parametrize("rest", [b"rubbish", b"\0\0\0\0rubbish"])
def test_what_follows_compressed_data_is_not_ignored(write: Any, compression: str, rest: bytes) -> None:
    content = b'{"a": 1}\n' * 30_000
    found = list(read(write(f"a.jsonl{compression}", COMPRESSIONS[compression](content) + rest)))
    assert len(found) > 20_000
    assert isinstance(found[-1], Reject) and found[-1].loses_more


def test_zeros_that_fill_up_a_block_are_ignored(write: Any, compression: str) -> None:
    whole = COMPRESSIONS[compression](b'{"a": 1}\n') + b"\0" * 512
    if compression != ".zst":
        assert places(write(f"a.jsonl{compression}", whole)) == [(1, {"a": 1})]


@pytest.mark.parametrize("content", [b'{"a": 1}\n', b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"(\xb5/\xfd"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(write: Any, compression: str, content: bytes) -> None:
    assert "cannot be decompressed: not " in refusal(write(f"a.jsonl{compression}", content))


def test_what_little_compressed_data_become_is_not_held(write: Any, compression: str) -> None:
    line = b'{"a": "' + b"x" * 1000 + b'"}\n'
    whole = COMPRESSIONS[compression](line * 40_000)
    assert len(whole) < 100_000
    source = write(f"a.jsonl{compression}", whole)
    tracemalloc.start()
    count = sum(1 for block in blocks(source, block_bytes=1 << 18) for _ in records(block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 16 << 20, "an xz dictionary is 8 MB"


# ---- several files --------------------------------------------------------------------------------------------------


def test_a_pattern_names_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"n": name}) + "\n\n" + json.dumps({"n": name}))
    source = Source(path=str(tmp_path / "**/*.jsonl"), limit=5)
    found = list(read(source))
    assert [item.fields["n"] for item in found] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2 + ["c/d.jsonl"]
    assert [str(item.origin) for item in found[2:4]] == [f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:3"]
    assert sources.files(source) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c/d.jsonl")]
    done = [block.source_bytes for block in blocks(source.model_copy(update={"limit": None}))]
    assert done[-1] == size(source) and len(done) == 3
    first = digest(source)
    (tmp_path / "c/d.jsonl").write_text('{"n": 1}')
    assert digest(source) != first


def test_an_empty_file_among_others_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"n": 1}')
    assert places(Source(path=str(tmp_path / "*.jsonl"))) == [(1, {"n": 1})]


def test_a_pattern_that_matches_nothing_or_too_much_is_refused(tmp_path: Path) -> None:
    assert refusal(Source(path=f"{tmp_path}/*.jsonl")) == f"{tmp_path}/*.jsonl: no file matches"
    (tmp_path / "a.jsonl").write_text('{"n": 1}')
    (tmp_path / "README.md").write_text("x")
    assert "README.md: '.md' files are not known" in refusal(Source(path=f"{tmp_path}/*"))


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"n": 1}')
    (tmp_path / "a1.jsonl").write_text('{"n": 2}')
    assert places(Source(path=str(tmp_path / "a[1].jsonl"))) == [(1, {"n": 1})]


def test_a_recipe_names_patterns_relative_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    (folder / "data").mkdir(parents=True)
    (folder / "data/a.jsonl").write_text('{"n": 1}')
    recipe = folder / "recipe.yaml"
    recipe.write_text("name: a\nmodel: {source: m}\ndata: {train: data/*.jsonl}\n")
    [source] = loading.load(recipe).recipe.data.train
    assert sources.files(source) == [str(folder / "data/a.jsonl")]
    recipe.write_text("name: a\nmodel: {source: m}\ndata: {train: data/*.csv}\n")
    with pytest.raises(DataError, match=r"recipe.yaml:3: data.train: file not found: data/\*.csv"):
        loading.load(recipe)


# ---- hub ------------------------------------------------------------------------------------------------------------


class _Split(list[dict[str, Any]]):
    _fingerprint = "f00d"


def _breaking() -> Iterator[dict[str, Any]]:
    yield {"text": "t0"}
    raise ConnectionError("the network is down")


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, str]:
    """The commits that the hub names for a revision; to be changed."""
    known: dict[str | None, str] = {None: "a" * 40, "v1": "b" * 40}

    def dataset_info(self: Any, repo_id: str, *, revision: str | None = None) -> Any:
        if revision not in known:
            raise ConnectionError("no such revision")
        return types.SimpleNamespace(sha=known[revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return known


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None, bool]]:
    """A stand-in for the `datasets` package; the list of what was asked of it."""
    asked: list[tuple[str, str, str | None, bool]] = []
    package: Any = types.ModuleType("datasets")
    package.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(
        name: str, config: str | None = None, *, split: str, revision: str | None, streaming: bool
    ) -> Iterable[dict[str, Any]]:
        asked.append((name, split, revision, streaming))
        if split == "missing":
            raise ValueError("Unknown split \"missing\".\nShould be one of ['train'].")
        if split == "broken":
            return _breaking()
        return _Split({"text": f"t{n}", "m": [{"role": "user", "name": None}]} for n in range(5))

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_hub_datasets_honour_split_and_limit(hub: list[tuple[str, str, str | None, bool]]) -> None:
    source = Source(hub="org/set", split="test", limit=2, revision="v1")
    found = list(read(source))
    assert hub == [("org/set", "test", "v1", False)]
    assert [str(record.origin) for record in found] == ["org/set[test]:record 1", "org/set[test]:record 2"]
    assert found[1].fields == {"text": "t1", "m": [{"role": "user"}]}
    assert found[1].origin.offset is None
    assert size(source) is None and sources.files(source) == []


def test_a_hub_split_that_cannot_be_loaded_is_refused(hub: list[tuple[str, str, str | None, bool]]) -> None:
    assert "org/set, split missing: cannot be loaded: Unknown split" in refusal(Source(hub="org/set", split="missing"))


def test_the_digest_of_a_hub_dataset_follows_its_fingerprint(
    hub: list[tuple[str, str, str | None, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(Source(hub="org/set"))
    assert digest(Source(hub="org/set")) == first
    assert digest(Source(hub="org/set", split="test")) != first
    assert digest(Source(hub="org/set", limit=2)) != first
    monkeypatch.setattr(_Split, "_fingerprint", "beef")
    assert digest(Source(hub="org/set")) != first


def test_a_hub_dataset_without_the_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'fullrank\[hub\]'"):
        list(read(Source(hub="org/set")))


def test_a_streamed_dataset_is_read_at_the_commit_its_digest_names(
    hub: list[tuple[str, str, str | None, bool]], commits: dict[str | None, str]
) -> None:
    source = Source(hub="org/set", streaming=True, limit=3)
    first = digest(source)
    assert hub == [], "nothing is loaded for it"
    assert [item.fields["text"] for item in read(source)] == ["t0", "t1", "t2"]
    assert hub == [("org/set", "train", "a" * 40, True)]
    same = pinned(source)
    assert same.revision == "a" * 40
    commits[None] = "c" * 40
    assert digest(same) == first
    assert digest(source) != first
    assert digest(Source(hub="org/set", streaming=True, limit=3, revision="v1")) != first


def test_streaming_without_the_hub_is_refused(commits: dict[str | None, str], hub: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its commit cannot be asked for: no such revision"):
        digest(Source(hub="org/set", streaming=True, revision="gone"))
    with pytest.raises(DataError, match="is a local folder, which cannot be streamed"):
        digest(Source(hub=str(tmp_path), streaming=True))


def test_a_network_that_fails_says_how_far_it_came(hub: Any, commits: Any) -> None:
    found = read(Source(hub="org/set", split="broken", streaming=True))
    with pytest.raises(DataError, match="split broken: cannot be read beyond record 1: the network is down"):
        list(found)


def test_streaming_belongs_to_hub_datasets() -> None:
    for options in ({"streaming": True}, {"revision": "v1"}):
        with pytest.raises(ValueError, match="belong to a hub dataset"):
            Source(path="a.jsonl", **options)
