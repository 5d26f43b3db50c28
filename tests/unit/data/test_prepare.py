"""A block becomes a shard: by its records and the settings alone, none of them lost."""

from __future__ import annotations

import datetime
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fullrank.data import prepare, sources
from fullrank.data.examples import Limit
from fullrank.data.prepare import Prepare, Settings
from fullrank.data.sources import Block
from fullrank.errors import DataError
from fullrank.recipe import Source
from fullrank.sequences.chat import ChatFormat, ChatRenderer
from fullrank.sequences.store import Shard

#: ChatML, but a turn that calls a tool ends otherwise than one that answers.
TWO_ENDS = tiny.CHATML.replace(
    "message['content'] + '<|im_end|>'", "message['content'] + ('<|endoftext|>' if message['tool_calls'] else '<|im_end|>')"
)


def made(tokenizer: Any, **changes: Any) -> Settings:
    found = Settings(
        chat=ChatFormat.of(tokenizer, datetime.date(2026, 1, 1), "tiny"),
        loss_on="assistant",
        limit=Limit(128, "data.max_length is 128", "error", 0.125),
        is_test=False,
        skip=(),
        mask=(),
        checks="1",
        encoder="tokenizers",
    )
    return replace(found, **changes)


@pytest.fixture(scope="module")
def task() -> Prepare:
    return Prepare(made(tiny.tokenizer()))


def lines(*rows: Any) -> bytes:
    """Rows as JSON Lines; text stands as it is."""
    return b"".join((row.encode() if isinstance(row, str) else json.dumps(row).encode()) + b"\n" for row in rows)


def block(payload: bytes, *, path: str = "rows.jsonl", first: int = 1, offset: int = 0) -> Block:
    return Block(path, first, offset, payload, "lines", True, offset + len(payload))


def shard(task: Prepare, made_from: Block, folder: Path, name: str = "shard.safetensors") -> Shard:
    task.run(made_from, folder / name)
    return Shard(folder / name)


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def decoded(task: Prepare, found: Shard) -> list[str]:
    offsets = found["offsets"]
    return [task._renderer.decode(found["ids"][a:b]) for a, b in itertools.pairwise(offsets)]


# ---- none is lost ---------------------------------------------------------------------------------------------------

#: Lines and what must be said of them; None for those that are used.
KINDS: list[tuple[Any, str | None]] = [
    (tiny.chat_rows(1)[0], None),
    (pair("what is it", "four"), None),
    ({"text": "the sky"}, None),
    ({"instruction": "name it", "input": "", "output": "blue"}, None),
    ({"conversations": [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "so"}]}, None),
    ({"prompt": "which", "chosen": "this", "rejected": "that"}, None),
    ('{"prompt": "who"', "not valid JSON"),
    ('{"prompt": "who", "completion": "\\ud800"}', "half a surrogate pair"),
    ('{"prompt": "who", "prompt": "two", "completion": "x"}', "written twice"),
    ('{"prompt": "who", "completion": NaN}', "NaN"),
    ("[" * 80 + "]" * 80, "nested too deeply"),
    ("[1]", "expected a JSON object"),
    ({"prompt": "who"}, "without an answer"),
    (pair("who", "  "), "without an answer"),
    ({"messages": "text"}, "must be a list of turns"),
    ({"text": "the sea " * 200}, "data.max_length is 128 and data.too_long is error"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}, "train: false"),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*range(len(KINDS)), -1]), min_size=1, max_size=20), st.integers(1, 5))
def test_every_record_is_used_or_rejected_at_its_place(
    task: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[int], batch: int
) -> None:
    monkeypatch.setattr(prepare, "_BATCH", batch)
    raw = [lines("" if kind < 0 else KINDS[kind][0]) for kind in kinds]  # -1: a blank line, which is no record
    starts = np.cumsum([0, *map(len, raw)]).tolist()
    found = shard(task, block(b"".join(raw), first=7, offset=1000), tmp_path)
    wanted = [(place, KINDS[kind]) for place, kind in enumerate(kinds) if kind >= 0]
    notes = found.notes
    assert notes["read"] == len(wanted) == found.records + len(notes["rejects"])
    assert list(zip(found["line"].tolist(), found["byte"].tolist(), strict=True)) == [
        (place, starts[place]) for place, (_, reason) in wanted if reason is None
    ]
    rejected = {(line, byte): reason for line, byte, reason, *_ in notes["rejects"]}
    assert sorted(rejected) == [(place, starts[place]) for place, (_, reason) in wanted if reason is not None]
    for place, (_, reason) in wanted:
        assert reason is None or reason in rejected[place, starts[place]]


def test_bytes_that_are_no_text_are_rejected_where_they_stand(task: Prepare, tmp_path: Path) -> None:
    good = lines(pair("a", "b"))
    payload = good + b'{"prompt": "\xff", "completion": "x"}\n' + good + b'{"prompt": "torn'
    found = shard(task, block(payload), tmp_path)
    assert found["line"].tolist() == [0, 2]
    ((line, byte, reason, *_), (last, *_)) = found.notes["rejects"]
    assert (line, byte) == (1, len(good)) and "not UTF-8: byte 0xff" in reason and last == 3


def test_the_reason_does_not_repeat_the_place(task: Prepare, tmp_path: Path) -> None:
    found = shard(task, block(lines({"prompt": "who"}), first=31), tmp_path)
    ((_, _, reason, *_),) = found.notes["rejects"]
    assert reason.startswith("record without an answer") and "rows.jsonl" not in reason


def test_one_record_that_cannot_be_encoded_takes_no_other_with_it(
    tmp_path: Path, task: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ChatRenderer.documents

    def refusing(self: ChatRenderer, texts: Sequence[str]) -> Any:
        if any("poison" in text for text in texts):
            raise DataError("the tokenizer cannot take it")
        return whole(self, texts)

    monkeypatch.setattr(ChatRenderer, "documents", refusing)
    rows = [{"text": "one"}, {"text": "poison"}, pair("a", "b"), {"text": "two"}]
    found = shard(task, block(lines(*rows)), tmp_path)
    assert found["line"].tolist() == [0, 2, 3]
    assert [reject[0] for reject in found.notes["rejects"]] == [1]
    ends = [text.removesuffix("<|im_end|>").removesuffix("<|im_end|>\n") for text in decoded(task, found)]
    assert [ends[0], ends[2]] == ["one", "two"] and ends[1].endswith("b")


def test_a_shard_is_whole_or_not_there(task: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space"):
        task.run(block(lines(pair("a", "b"))), tmp_path / "shard.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- what a shard depends on ----------------------------------------------------------------------------------------

ROWS = [*tiny.chat_rows(9), pair("what", "four"), {"prompt": "who"}, {"text": "the sea"}, *tiny.chat_rows(3)]


def test_the_place_of_the_records_is_not_in_it(task: Prepare, tmp_path: Path) -> None:
    payload = lines(*ROWS)
    task.run(block(payload), tmp_path / "a")
    task.run(block(payload, path="moved/other.jsonl", first=1234, offset=987654), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_how_many_are_encoded_together_does_not_show(
    task: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    task.run(block(lines(*ROWS)), tmp_path / "a")
    monkeypatch.setattr(prepare, "_BATCH", batch)
    task.run(block(lines(*ROWS)), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_was_prepared_before_does_not_show(tmp_path: Path) -> None:
    """A process makes many shards with one renderer; which ones came before is chance."""
    chosen = made(tiny.tokenizer(chat_template=TWO_ENDS))
    call = {"function": {"name": "look", "arguments": {}}}
    asked = {"role": "user", "content": "look"}
    calling = {"messages": [asked, {"role": "assistant", "content": "look", "tool_calls": [call]}]}
    plain = block(lines(pair("a", "b")))
    busy, fresh = Prepare(chosen), Prepare(chosen)
    before = shard(busy, block(lines(calling)), tmp_path, "before")
    assert before.notes["rejects"] == [] and len(before.notes["stop_ids"]) == 2
    busy.run(plain, tmp_path / "a")
    fresh.run(plain, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_task_travels_as_its_settings(task: Prepare, tmp_path: Path) -> None:
    there = pickle.loads(pickle.dumps(task))
    assert there.settings == task.settings and there.settings.fingerprint == task.settings.fingerprint
    task.run(block(lines(*ROWS)), tmp_path / "a")
    there.run(block(lines(*ROWS)), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


CHANGES: dict[str, Any] = {
    "loss_on": "all",
    "limit": Limit(127, "data.max_length is 127", "error", 0.125),
    "is_test": True,
    "skip": ("language",),
    "mask": ("secret",),
    "checks": "2",
}


@pytest.mark.parametrize("setting", CHANGES)
def test_every_setting_is_in_the_fingerprint(task: Prepare, setting: str) -> None:
    assert replace(task.settings, **{setting: CHANGES[setting]}).fingerprint != task.settings.fingerprint


def test_the_format_is_in_the_fingerprint(task: Prepare) -> None:
    chat = task.settings.chat
    changed = [
        replace(chat, template=tiny.CHATML + " "),
        replace(chat, template_with_tools=tiny.CHATML + " "),
        replace(chat, tokenizer_json=chat.tokenizer_json + " "),
        replace(chat, date=datetime.date(2026, 1, 2)),
        replace(chat, special_tokens={**chat.special_tokens, "eos_token": "<pad>"}),
        replace(chat, control_tokens=chat.control_tokens[1:]),
        replace(chat, eos_id=0),
    ]
    found = {replace(task.settings, chat=one).fingerprint for one in [chat, *changed]}
    assert len(found) == len(changed) + 1


def test_the_fingerprint_is_the_same_in_every_process(task: Prepare) -> None:
    code = (
        "import sys, pickle; sys.path.insert(0, sys.argv[1]); print(pickle.load(sys.stdin.buffer).settings.fingerprint, end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(tiny.__file__).parent)], input=pickle.dumps(task), capture_output=True, check=True
    )
    assert done.stdout.decode() == task.settings.fingerprint


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_facts_stand_beside_the_records(task: Prepare, tmp_path: Path) -> None:
    found = shard(task, block(lines(*ROWS)), tmp_path)
    assert found.records == len(ROWS) - 1
    for name, entry in found._entries.items():
        if name not in ("ids", "supervised", "offsets", "record"):
            assert entry["shape"][-1] == found.records, name
    lengths = np.diff(found["offsets"])
    assert [int(lengths[found["record"] == n].sum()) for n in range(found.records)] == found["tokens"].tolist()
    assert found.notes["tokens"] == lengths.sum() == len(found["ids"]) == len(found["supervised"])


def test_pieces_of_a_text_belong_to_one_record(tmp_path: Path) -> None:
    chosen = made(tiny.tokenizer(), limit=Limit(16, "data.max_length is 16", "chunk", 0.25))
    found = shard(Prepare(chosen), block(lines({"text": "a"}, {"text": "the bank holds less " * 20}, {"text": "b"})), tmp_path)
    owners = found["record"].tolist()
    assert owners == sorted(owners) and set(owners) == {0, 1, 2} and owners.count(1) > 2
    assert found.notes["chunked"] == 1 and found.records == 3


def test_dropped_records_were_asked_for(tmp_path: Path) -> None:
    chosen = made(tiny.tokenizer(), limit=Limit(32, "data.max_length is 32", "drop", 0.125))
    rows = [pair("a", "b"), pair("a", "the bank " * 40), {"prompt": "who"}]
    found = shard(Prepare(chosen), block(lines(*rows)), tmp_path)
    reasons = {line: (reason, asked) for line, _, reason, asked, *_ in found.notes["rejects"]}
    assert reasons[1] == ("longer than 32 tokens, and data.too_long is drop", True) and reasons[2][1] is False
    assert (found.notes["read"], found.records, found.notes["dropped"]) == (3, 1, 1)


def test_a_truncated_record_is_marked(tmp_path: Path) -> None:
    chosen = made(tiny.tokenizer(), limit=Limit(32, "data.max_length is 32", "truncate", 0.125))
    found = shard(Prepare(chosen), block(lines(pair("a", "b"), pair("a", "the bank " * 40))), tmp_path)
    assert found["cut"].tolist() == [0, 1] and found.notes["truncated"] == 1
    assert np.diff(found["offsets"])[1] == 32


# ---- masking --------------------------------------------------------------------------------------------------------

KEY = "AKIAIOSFODNN7EXAMPLX"


@pytest.mark.parametrize("is_test", [False, True])
def test_a_masked_secret_is_nowhere_in_the_shard(tmp_path: Path, is_test: bool) -> None:
    rows = [pair("what is it", "four"), pair(f"my key is {KEY}", f"so it is {KEY}, not mine")]
    for name, mask in (("open", ()), ("masked", ("secret",))):
        task = Prepare(made(tiny.tokenizer(), mask=mask, is_test=is_test))
        found = shard(task, block(lines(*rows)), tmp_path, name)
        texts = [json.dumps(found.notes["items"])] if is_test else decoded(task, found)
        assert (KEY in "".join(texts)) == (name == "open")
        assert name == "open" or KEY.encode() not in (tmp_path / name).read_bytes()  # nor in what is noted of it
        assert found.notes["masked"] == ({"secret": 2} if mask else {})
        assert [kind for _, kind, *_ in found.notes["sightings"]] == ([] if mask else ["secret", "secret"])
        assert "".join(texts).count("AWS_ACCESS_KEY") == (2 if mask else 0)


def test_masking_one_kind_leaves_the_other(tmp_path: Path) -> None:
    task = Prepare(made(tiny.tokenizer(), mask=("personal_data",)))
    found = shard(task, block(lines(pair(f"{KEY} or anna@example.org", "neither"))), tmp_path)
    (text,) = decoded(task, found)
    assert KEY in text and "anna@example.org" not in text
    assert [kind for _, kind, *_ in found.notes["sightings"]] == ["secret"]


# ---- test records ---------------------------------------------------------------------------------------------------


def test_test_records_are_kept_to_ask_with(tmp_path: Path) -> None:
    task = Prepare(made(tiny.tokenizer(), is_test=True, limit=Limit(4, "data.max_length is 4", "error", 0.0)))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [{**tiny.chat_rows(1)[0], "tools": tools}, {"text": "the sky"}, pair("a", "b")]
    found = shard(task, block(lines(*rows)), tmp_path)
    assert found.records == 2 and len(found["ids"]) == 0
    first, second = found.notes["items"]
    assert first["messages"] == rows[0]["messages"][:-1] and first["reference"] == rows[0]["messages"][-1]["content"]
    assert first["tools"] == tools and second["messages"] == [{"role": "user", "content": "a"}]
    ((line, _, reason, *_),) = found.notes["rejects"]
    assert line == 1 and "a test record needs a prompt and an answer" in reason


# ---- records that are not lines -------------------------------------------------------------------------------------


def test_rows_of_a_table_know_their_bytes(task: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    raw = b'prompt,completion\na,b\n"two\nlines",c\nd,\n"e",f\n'
    path.write_bytes(raw)
    (cut,) = sources.blocks(Source(path=str(path)))
    found = shard(task, cut, tmp_path)
    at = [cut.first + line for line in found["line"].tolist()], [cut.offset + byte for byte in found["byte"].tolist()]
    assert at == ([2, 3, 6], [raw.index(b"a,b"), raw.index(b'"two'), raw.index(b'"e"')])
    ((line, byte, reason, *_),) = found.notes["rejects"]
    assert (cut.first + line, cut.offset + byte) == (5, raw.index(b"d,\n")) and "without an answer" in reason
