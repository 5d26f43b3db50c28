"""JSON answers against counts made by hand, and JSON Schemas against what their keywords mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fullrank.errors import DataError, UsageError
from fullrank.evaluate.metrics import score
from fullrank.evaluate.structured import NotJson, is_equal, leaves, parse
from fullrank.recipe import Task

VALID, FIELDS = Task(metric="json_valid"), Task(metric="json_fields")


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "NaN", '{"a": Infinity}', "{} {}", "```json\n{}\n```", "[" * 100_000])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(NotJson):
        parse(text)
    assert score(VALID, ["{}"], [text])["json_valid"].value == 0.0


def test_the_share_of_valid_answers() -> None:
    answers = ['{"a": [1, 2.5e3, null]}', "3", '"text"', "{"]
    assert score(VALID, ["{}"] * 4, answers)["json_valid"].per_item == [1.0, 1.0, 1.0, 0.0]


def test_the_pattern_says_where_the_json_is() -> None:
    fenced = Task(metric="json_valid", pattern=r"(?s)```json\s*(.*?)```")
    reference = "```json\n{}\n```"
    answers = ['Here:\n```json\n{"a": 1}\n```', '{"a": 1}', "```json\n{a: 1}\n```"]
    assert score(fenced, [reference] * 3, answers)["json_valid"].per_item == [1.0, 0.0, 0.0]


def test_valid_against_a_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema (extra json) is not installed")
    schema = tmp_path / "schema.json"
    limits = {"type": "object", "required": ["ratio"], "properties": {"ratio": {"type": "number", "minimum": 0}}}
    schema.write_text(json.dumps(limits), encoding="utf-8")
    task = Task(metric="json_valid", json_schema=str(schema))
    answers = ['{"ratio": 0.1}', '{"ratio": "0.1"}', '{"ratio": -1}', "{}", "[]", "no"]
    assert score(task, ['{"ratio": 1}'] * 6, answers)["json_valid"].per_item == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(DataError, match=r"^test record 2: .*not valid against .*schema\.json: 'ratio' is a required property"):
        score(task, ['{"ratio": 1}', "{}"], ["{}", "{}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("3", "a JSON Schema is an object, found a int"),
        ('{"type": "float"}', "not a valid JSON Schema: type: 'float' is not valid"),
        ('{"$ref": "https://example.org/other.json"}', "a reference leads nowhere"),
    ],
)
def test_what_is_no_schema_is_said(tmp_path: Path, text: str, said: str) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema (extra json) is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        score(Task(metric="json_valid", json_schema=str(schema)), ["{}"], ["{}"])


def test_a_schema_without_the_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jsonschema", "jsonschema.validators", "jsonschema_specifications"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="jsonschema") as raised:
        score(Task(metric="json_valid", json_schema="schema.json"), ["{}"], ["{}"])
    assert "pip install 'fullrank[json]'" in str(raised.value)


def test_leaves_are_named_by_keys_and_places() -> None:
    value = {"a": {"b": [1, {"c": None}]}, "d": [], "e": {}}
    assert dict(leaves(value)) == {("a", "b", 0): 1, ("a", "b", 1, "c"): None, ("d",): [], ("e",): {}}
    assert dict(leaves(3)) == {(): 3}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1", "1.0", True),
        ("1e2", "100", True),
        ("1", "true", False),
        ("0", "false", False),
        ("1", '"1"', False),
        ("null", "0", False),
        ('{"a": 1, "b": 2}', '{"b": 2.0, "a": 1}', True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": [true]}', '{"a": [1]}', False),
        ("[]", "{}", False),
    ],
)
def test_when_values_are_equal(one: str, other: str, equal: bool) -> None:
    assert is_equal(json.loads(one), json.loads(other)) is equal


def test_fields_are_counted_over_all_items() -> None:
    references = ['{"bank": "A", "ratios": [0.1, 0.2], "ok": {"all": true}}', '{"bank": "B"}', '{"n": 1}']
    answers = [
        '{"bank": "A", "ratios": [0.1, 0.3, 0.2], "ok": {"all": 1}}',  # bank and the first ratio: 2 of 4
        '{"bank": "B", "more": 1}',  # 1 of 1, and something else
        "nothing",  # 0 of 1
    ]
    scores = score(FIELDS, references, answers)
    assert list(scores) == ["json_fields", "json_fields_whole"]
    assert scores["json_fields"].per_item == [0.5, 1.0, 0.0]
    assert scores["json_fields"].value == pytest.approx(3 / 6)
    assert scores["json_fields_whole"].per_item == [0.0, 0.0, 0.0]
    assert score(FIELDS, references, references)["json_fields_whole"].value == 1.0


@pytest.mark.parametrize("task", [VALID, FIELDS], ids=lambda task: task.metric)
def test_a_reference_that_is_no_json_is_an_error(task: Task) -> None:
    with pytest.raises(DataError, match=r"^t\.jsonl:8: task .*the reference 'see above' is not JSON"):
        score(task, ["{}", "see above"], ["{}", "{}"], places=["t.jsonl:7", "t.jsonl:8"])
