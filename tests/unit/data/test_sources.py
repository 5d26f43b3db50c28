"""Reading records: what each kind of file yields, where each record stands, and how bad files are refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fullrank.data.sources import Origin, digest, read
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
    return [(record.origin.line, record.fields) for record in read(source)]


def refusal(source: Source) -> str:
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
    ],
)
def test_a_bad_json_line_is_named_with_what_was_found(write: Any, line: bytes, said: str) -> None:
    source = write("a.jsonl", b'{"a": 0}\n\n' + line + b"\n")
    message = refusal(source)
    assert message.startswith(f"{source.path}:3: ")
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_whole_surrogate_pair_is_a_character(write: Any) -> None:
    assert places(write("a.jsonl", r'{"a": "\ud83d\ude00"}')) == [(1, {"a": "\N{GRINNING FACE}"})]


def test_all_bad_lines_are_listed_at_once(write: Any) -> None:
    message = refusal(write("a.jsonl", '{"a": 1}\n{bad\n{"a": 2}\n[]\n'))
    assert [line.split(":")[1] for line in message.splitlines()] == ["2", "4"]


def test_the_list_of_bad_lines_ends_at_ten_and_says_so(write: Any) -> None:
    lines = refusal(write("a.jsonl", "{bad\n" * 25)).splitlines()
    assert len(lines) == 11
    assert lines[9].split(":")[1] == "10"
    assert "not read beyond these 10 problems" in lines[10]


def test_no_record_is_handed_out_after_a_problem(write: Any) -> None:
    records = read(write("a.jsonl", '{"a": 1}\n{bad\n{"a": 2}\n'))
    assert next(records).fields == {"a": 1}
    with pytest.raises(DataError):
        next(records)


def test_the_limit_is_kept_and_nothing_is_read_beyond_it(write: Any) -> None:
    source = write("a.jsonl", '{"a": 1}\n\n{"a": 2}\n{bad\n', limit=2)
    assert places(source) == [(1, {"a": 1}), (3, {"a": 2})]


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
        ('{"data": []}', 1, "expected an array of objects"),
        ('{"a": 1}\n{"a": 2}\n', 1, "expected an array of objects"),
        ('[{"a": 1},\n{"a": 2}', 2, "found 'the end of the file'"),
        ('[{"a": 1}\n{"a": 2}]', 2, "expected ',' or ']' after a record, found '{'"),
        ('[{"a": 1},\n]', 2, "expecting value"),
        ('[{"a": 1},\n{"a":\nNaN}]', 2, "NaN is not a JSON number"),
        ('[{"a": 1},\n{"a":\n?}]', 3, "near '?}]'"),
        ('[{"a": 1},\n\n2]', 3, "expected a JSON object, found a number"),
        ('[{"a": 1}]\n[]', 2, "more text after the array"),
        ("[", 1, "expecting value"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', 2, "not UTF-8: byte 0xe9 at column 8"),
    ],
)
def test_a_bad_json_file_is_refused_with_its_line(write: Any, text: bytes | str, line: int, said: str) -> None:
    source = write("a.json", text)
    message = refusal(source)
    assert message.startswith(f"{source.path}:{line}: ")
    assert said in message


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
        ("a,a\n1,2\n", [1], "names the column 'a' twice"),
        ('a,b\n1,2\n"x" y,2\n', [3], "not valid CSV"),
        ('a,b\n1,2\n"never closed,2\n\n', [3], "not valid CSV"),
        (b"a,b\n1,2\n3,\xff\n", [3], "not UTF-8: byte 0xff at column 3"),
    ],
)
def test_a_bad_csv_row_is_refused_with_its_line(write: Any, text: bytes | str, lines: list[int], said: str) -> None:
    source = write("a.csv", text)
    message = refusal(source)
    assert [line.removeprefix(source.path).split(":")[1] for line in message.splitlines()] == [str(n) for n in lines]
    assert said in message


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
    assert refusal(source).startswith(f"{source.path}: cannot be read as Parquet after 0 records")


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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a"])
def test_an_unknown_kind_lists_the_kinds(write: Any, name: str) -> None:
    assert "allowed: .jsonl, .ndjson, .json, .csv, .parquet" in refusal(write(name, "x"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal(Source(path=str(tmp_path / "gone.jsonl"))).endswith("gone.jsonl: no such file")
    assert refusal(Source(path=str(tmp_path / "folder.jsonl"))).endswith("folder.jsonl: is not a file")


def test_origins_are_written_as_editors_read_them() -> None:
    assert str(Origin("a.jsonl", 3)) == "a.jsonl:3"
    assert str(Origin("a.parquet", 3, "record")) == "a.parquet:record 3"


def test_the_digest_follows_the_bytes_the_kind_and_the_limit(write: Any) -> None:
    first = digest(write("a.jsonl", '{"a": 1}'))
    assert digest(write("b.jsonl", '{"a": 1}')) == first, "the name does not matter"
    others = {
        digest(write("c.jsonl", '{"a": 2}')),
        digest(write("a.json", '{"a": 1}')),
        digest(write("a.jsonl", '{"a": 1}', limit=1)),
    }
    assert len(others | {first}) == 4


def test_the_digest_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        digest(Source(path=str(tmp_path / "gone.jsonl")))


# ---- hub ------------------------------------------------------------------------------------------------------------


class _Split(list[dict[str, Any]]):
    _fingerprint = "f00d"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """A stand-in for the `datasets` package; the list of what was asked of it."""
    asked: list[tuple[str, str, bool]] = []
    package: Any = types.ModuleType("datasets")
    package.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))

    def load_dataset(name: str, config: str | None = None, *, split: str, streaming: bool) -> _Split:
        asked.append((name, split, streaming))
        if split == "missing":
            raise ValueError("Unknown split \"missing\".\nShould be one of ['train'].")
        return _Split({"text": f"t{n}", "m": [{"role": "user", "name": None}]} for n in range(5))

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_hub_datasets_honour_split_and_limit(hub: list[tuple[str, str, bool]]) -> None:
    records = list(read(Source(hub="org/set", split="test", limit=2)))
    assert hub == [("org/set", "test", False)]
    assert [str(record.origin) for record in records] == ["org/set[test]:record 1", "org/set[test]:record 2"]
    assert records[1].fields == {"text": "t1", "m": [{"role": "user"}]}


def test_a_hub_split_that_cannot_be_loaded_is_refused(hub: list[tuple[str, str, bool]]) -> None:
    assert "org/set, split missing: cannot be loaded: Unknown split" in refusal(Source(hub="org/set", split="missing"))


def test_the_digest_of_a_hub_dataset_follows_its_fingerprint(
    hub: list[tuple[str, str, bool]], monkeypatch: pytest.MonkeyPatch
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
