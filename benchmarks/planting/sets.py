"""The real data sets that defects are planted into, and how to reach the texts of their records.

Every set has three files: train, validation, test. Where the publisher has no validation split, every second test record serves
as one; the chats, published as one file, are dealt out by line number. Lines are kept as the bytes that were published, except
for `documents`, which is made here: abstracts of PubMedQA as raw text, for passages of the other sets' tests to hide in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"
NAMES = ("banking77", "gsm8k", "wikisql", "chats", "instructions", "documents")


class Slot(NamedTuple):
    """A text within a record that may be edited."""

    path: tuple[str | int, ...]
    role: str
    """`asked`, `given` (material that the question is about) or `answered`."""
    start: int
    """First character that may be edited; what stands before is the data set's own scaffolding."""
    end: int


@dataclass(frozen=True)
class DataSet:
    """A data set as lines of JSON, by file."""

    name: str
    files: dict[str, list[str]]
    """Lines without their ends: `train`, `validation` and one or more test files."""
    slots: Callable[[dict[str, Any]], list[Slot]]
    answers_are_labels: bool = False

    @property
    def tests(self) -> list[str]:
        return [name for name in self.files if name not in ("train", "validation")]


def read(record: dict[str, Any], slot: Slot) -> str:
    """The slot's text."""
    return _value(record, slot.path)[slot.start : slot.end]


def write(record: dict[str, Any], slot: Slot, text: str) -> dict[str, Any]:
    """A copy of the record with another text in the slot."""
    changed = copy.deepcopy(record)
    below: Any = changed
    for key in slot.path[:-1]:
        below = below[key]
    whole = below[slot.path[-1]]
    below[slot.path[-1]] = whole[: slot.start] + text + whole[slot.end :]
    return changed


def line_of(record: dict[str, Any]) -> str:
    """The record as its publisher writes it: UTF-8, nothing escaped that need not be."""
    return json.dumps(record, ensure_ascii=False)


def _value(record: Any, path: tuple[str | int, ...]) -> str:
    for key in path:
        record = record[key]
    assert isinstance(record, str)
    return record


def _whole(record: dict[str, Any], path: tuple[str | int, ...], role: str) -> Slot:
    return Slot(path, role, 0, len(_value(record, path)))


# ---- the forms ------------------------------------------------------------------------------------------------------


def _messages(record: dict[str, Any]) -> list[Slot]:
    roles = {"user": "asked", "assistant": "answered"}
    return [_whole(record, ("messages", n, "content"), roles[turn["role"]]) for n, turn in enumerate(record["messages"])]


def _shares(record: dict[str, Any]) -> list[Slot]:
    roles = {"human": "asked", "gpt": "answered"}
    return [_whole(record, ("conversations", n, "value"), roles[turn["from"]]) for n, turn in enumerate(record["conversations"])]


def _pair(record: dict[str, Any]) -> list[Slot]:
    return [_whole(record, ("prompt",), "asked"), _whole(record, ("completion",), "answered")]


def _table_question(record: dict[str, Any]) -> list[Slot]:
    """The question alone, between `Q: ` and `A:`; table and columns are scaffolding."""
    prompt = record["prompt"]
    return [
        Slot(("prompt",), "asked", prompt.index("\nQ: ") + 4, prompt.rindex("\nA:")),
        _whole(record, ("completion",), "answered"),
    ]


def _instruction(record: dict[str, Any]) -> list[Slot]:
    given = [_whole(record, ("input",), "given")] if record["input"] else []
    return [_whole(record, ("instruction",), "asked"), *given, _whole(record, ("output",), "answered")]


def _document(record: dict[str, Any]) -> list[Slot]:
    return [_whole(record, ("text",), "answered")]


# ---- the sets -------------------------------------------------------------------------------------------------------


def load(name: str) -> DataSet:
    """One of `NAMES`."""
    if name == "banking77":
        return DataSet(name, _three("banking77"), _pair, answers_are_labels=True)
    if name == "gsm8k":
        return DataSet(name, _three("gsm8k"), _messages)
    if name == "wikisql":
        folder = "wikisql_text2sql"
        return DataSet(name, {split: _lines(folder, split) for split in ("train", "validation", "test")}, _table_question)
    if name == "chats":
        lines = _lines("fastchat_multiturn", "conversations")
        held = {8: "validation", 9: "test"}
        files: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for number, line in enumerate(lines):
            files[held.get(number % 10, "train")].append(line)
        return DataSet(name, files, _shares)
    if name == "instructions":
        lines = _lines("rasbt_instruction", "alpaca")  # the book's own splits
        return DataSet(name, {"train": lines[:935], "validation": lines[1045:], "test": lines[935:1045]}, _instruction)
    assert name == "documents", name
    abstracts = [_abstract(line) for split in ("train", "test") for line in _lines("pubmedqa", split)]
    files = {"train": abstracts[:600], "validation": abstracts[600:660]}
    files |= {f"test-{other}": load(other).files["test"] for other in ("gsm8k", "banking77", "wikisql")}
    return DataSet(name, files, _document)


def _lines(folder: str, name: str) -> list[str]:
    """Lines end at the byte \\n alone: other line separators stand inside strings."""
    return (DATA / folder / f"{name}.jsonl").read_bytes().decode().removesuffix("\n").split("\n")


def _three(folder: str) -> dict[str, list[str]]:
    test = _lines(folder, "test")
    return {"train": _lines(folder, "train"), "validation": test[::2], "test": test[1::2]}


def _abstract(line: str) -> str:
    text = json.loads(line)["messages"][0]["content"]
    return line_of({"text": text.removeprefix("Abstract:\n").partition("\nQuestion:")[0].rstrip()})
