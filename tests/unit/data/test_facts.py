"""Facts about records, gathered from many shards: each belongs to its record, whose place and text are found again."""

from __future__ import annotations

import datetime
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fullrank.data import sources
from fullrank.data.audit.observe import Observer
from fullrank.data.examples import Limit
from fullrank.data.facts import Facts, PreparedSource
from fullrank.data.prepare import Prepare, Settings
from fullrank.errors import DataError
from fullrank.recipe import Source
from fullrank.sequences.chat import ChatFormat
from fullrank.sequences.store import ShardPlace

KEY = "AKIAIOSFODNN7EXAMPLX"


def pair(name: str, n: int) -> dict[str, str]:
    """No two alike; every seventh has a secret."""
    return {"prompt": f"{name} {n}" + f" {KEY}" * (n % 7 == 3), "completion": f"it is {n * 3}" + " so" * (n % 5)}


class Prepared:
    """Files of every kind, prepared, and what must be known of them: (file, line, prompt) of every good record, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: list[tuple[str, int, str]] = []
        self.sources: list[PreparedSource] = []
        chat = ChatFormat.of(tiny.tokenizer(), datetime.date(2026, 1, 1), "tiny")
        limit = Limit(256, "limit", "error", 0.1)
        self.task = Prepare(Settings(chat, "assistant", limit, False, ("near_duplicate",), (), "1", "tokenizers"))
        self.observer = Observer([token.text for token in chat.control_tokens], frozenset())
        lines = [pair("a", n) for n in range(11)]
        raw = [json.dumps(row) for row in lines]
        raw[4:4] = ["", '{"prompt": "who"']  # a blank line, and a bad record
        (folder / "a.jsonl").write_text("\n".join(raw) + "\n", encoding="utf-8")
        self._add("a.jsonl", [(n + 1 + 2 * (n >= 4), row["prompt"]) for n, row in enumerate(lines)])
        lines = [pair("b", n) for n in range(8)]
        (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in lines).encode()))
        self._add("b.jsonl.gz", [(n + 1, row["prompt"]) for n, row in enumerate(lines)])
        lines = [pair("c\nand", n) for n in range(6)]
        text = "prompt,completion\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\n' for row in lines)
        (folder / "c.csv").write_text(text, encoding="utf-8")
        self._add("c.csv", [(2 + 2 * n, row["prompt"]) for n, row in enumerate(lines)])
        lines = [pair("d", n) for n in range(9)]
        (folder / "d.json").write_text(json.dumps(lines), encoding="utf-8")  # all of them on one line
        self._add("d.json", [(1, row["prompt"]) for row in lines])

    def _add(self, name: str, known: list[tuple[int, str]]) -> None:
        source = Source(path=str(self.folder / name))
        shards = []
        for block in sources.blocks(source, block_bytes=150):
            path = self.folder / f"{len(self.known)}-{len(shards)}.safetensors"
            self.task.run(block, path)
            shards.append((ShardPlace(path.name, block.path, block.first, block.offset, "line"), path))
        assert len(shards) > 1
        self.sources.append(PreparedSource(source, shards))
        self.known += [(str(self.folder / name), line, prompt) for line, prompt in known]

    def facts(self, chosen: Any = None, masked: tuple[str, ...] = ()) -> Facts:
        return Facts("train", is_test=False, prepared=self.sources, chosen=chosen, observer=self.observer, masked=masked)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("facts"))


CHOICES = st.sets(st.integers(0, 33)).map(lambda found: np.array(sorted(found), np.int64))
_anyhow = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_all_records_are_there(prepared: Prepared) -> None:
    facts = prepared.facts()
    assert len(facts) == len(prepared.known) == 34 and len(prepared.sources[0]) == 11
    assert facts.forms() == {"prompt_completion": 34} and facts.used() == [11, 8, 6, 9]
    assert facts.has("tokens") and not facts.has("anything")


@_anyhow
@given(CHOICES)
def test_the_facts_of_some_are_those_of_all_at_their_places(prepared: Prepared, chosen: np.ndarray) -> None:
    everything, some = prepared.facts(), prepared.facts(chosen)
    assert len(some) == len(chosen)
    for name in ("tokens", "prompt", "cut"):
        assert some.column(name).tolist() == everything.column(name)[chosen].tolist()
    ends = np.cumsum([0, 11, 8, 6, 9])
    assert some.used() == [int(((chosen >= low) & (chosen < high)).sum()) for low, high in itertools.pairwise(ends)]


def test_each_fact_belongs_to_its_record(prepared: Prepared) -> None:
    """Records that differ in length alone: the tokens of each against its own rendering."""
    tokenizer = tiny.tokenizer()
    counted = prepared.facts().column("tokens").tolist()
    for n, subject in enumerate(prepared.facts().subjects(range(34))):
        turns = [{"role": "user", "content": subject.prompt}, {"role": "assistant", "content": subject.answer}]
        assert counted[n] == len(tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]), n


@_anyhow
@given(CHOICES, st.data())
def test_places_and_texts_are_found_again(prepared: Prepared, chosen: np.ndarray, data: st.DataObject) -> None:
    facts = prepared.facts(chosen)
    wanted = sorted(data.draw(st.sets(st.sampled_from(range(len(chosen)))))) if len(chosen) else []
    for record, raw, subject in zip(wanted, facts.raw(wanted), facts.subjects(wanted), strict=True):
        path, line, prompt = prepared.known[chosen[record]]
        place = facts.place(record)
        assert (place.path, place.line, place.split) == (path, line, "train")
        assert (raw.origin.path, raw.origin.line) == (path, line)
        assert raw.fields["prompt"] == subject.prompt == prompt


def test_records_are_found_in_any_order(prepared: Prepared) -> None:
    wanted = [33, 0, 20, 12, 12, 27, 3, 25]
    found = [raw.fields["prompt"] for raw in prepared.facts().raw(wanted)]
    assert found == [prepared.known[n][2] for n in wanted]


@_anyhow
@given(CHOICES)
def test_shards_know_the_numbers_of_their_records(prepared: Prepared, chosen: np.ndarray) -> None:
    facts = prepared.facts(chosen)
    numbers = np.concatenate([found for _, shard, found in facts.numbers()])
    assert len(numbers) == 34
    assert np.flatnonzero(numbers >= 0).tolist() == chosen.tolist()
    assert numbers[chosen].tolist() == list(range(len(chosen)))


def test_what_is_masked_is_seen_masked(prepared: Prepared) -> None:
    open_, masked = prepared.facts(), prepared.facts(masked=("secret",))
    with_keys = [n for n, (_, _, prompt) in enumerate(prepared.known) if KEY in prompt]
    assert len(with_keys) == 5
    for record, (seen, hidden) in enumerate(zip(open_.subjects(range(34)), masked.subjects(range(34)), strict=True)):
        assert (KEY in seen.prompt) == (record in with_keys)
        assert hidden.prompt == seen.prompt.replace(KEY, "[AWS_ACCESS_KEY]")


@pytest.mark.parametrize("name", ["a.jsonl", "c.csv"])
def test_a_record_that_is_gone_is_named(tmp_path: Path, name: str) -> None:
    fresh = Prepared(tmp_path)
    number = next(n for n, (path, _, _) in enumerate(fresh.known) if path.endswith(name)) + 3
    path, line, _ = fresh.known[number]
    Path(path).write_text("prompt,completion\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}:{line}.*(no longer there|no record here any more)"):
        list(fresh.facts().raw([number]))


def test_no_records_have_empty_columns(prepared: Prepared) -> None:
    none = prepared.facts(np.empty(0, np.int64))
    assert len(none) == 0 and none.column("tokens").tolist() == [] and none.forms() == {} and none.used() == [0, 0, 0, 0]
    empty = Facts("validation", is_test=False, prepared=[], chosen=None, observer=prepared.observer, masked=())
    assert len(empty) == 0 and empty.column("tokens").tolist() == [] and list(empty.numbers()) == [] and empty.forms() == {}


def test_memory_is_a_few_shards(prepared: Prepared) -> None:
    """Columns come from shards that are opened as they are asked for, not held."""
    opened: Iterator[Any] = prepared.sources[0].opened()
    place, shard = next(opened)
    assert place.path.endswith("a.jsonl") and isinstance(shard["ids"], np.memmap)
