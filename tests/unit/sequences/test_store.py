"""The token store: what is written is what is read, with the place each example came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from fullrank.sequences.chat import Tokens
from fullrank.sequences.store import Shard, ShardPlace, TokenStore, write_index, write_shard


def test_examples_come_back_as_they_went_in(tmp_path: Path) -> None:
    examples = tiny.random_tokens(20)
    store = tiny.write_store(tmp_path, examples)
    assert len(store) == 20
    for number, tokens in enumerate(examples):
        found = store[number]
        assert found.ids.tolist() == tokens.ids
        assert found.supervised.tolist() == tokens.supervised
        assert found.supervised.dtype == bool
        assert found.supervised_targets == tokens.supervised_targets()
    assert store.lengths.tolist() == [len(tokens.ids) for tokens in examples]


def test_ids_beyond_sixteen_bits_survive(tmp_path: Path) -> None:
    assert tiny.write_store(tmp_path, [Tokens([0, 262143, 7], [True] * 3)])[0].ids.tolist() == [0, 262143, 7]


def test_an_example_remembers_file_and_line(tmp_path: Path) -> None:
    split, shards = tmp_path / "train", tmp_path / "shards"
    split.mkdir()
    shards.mkdir()
    tokens = Tokens([1, 2], [False, True])
    write_shard(shards / "a.safetensors", [tokens] * 3, [0, 0, 1], [(0, 0), (5, 90)])  # two examples of the first record
    write_shard(shards / "b.safetensors", [tokens], [0], [(2, -1)])
    places = [
        ShardPlace("a.safetensors", "data/a.jsonl", 7, 100, "line"),
        ShardPlace("b.safetensors", "data/2024.parquet", 10, None, "record"),
    ]
    write_index(split, places, np.array([[1, 0], [0, 2], [0, 1], [0, 2]]))
    store = TokenStore(split)
    wanted = ["data/2024.parquet:record 12", "data/a.jsonl:12", "data/a.jsonl:7", "data/a.jsonl:12"]
    assert [store.origin(n) for n in range(4)] == wanted


def test_facts_and_notes_of_the_records_lie_beside_the_tokens(tmp_path: Path) -> None:
    facts = {"bands": np.arange(6, dtype=np.uint32).reshape(3, 2), "answer": np.array([2**63, 1], np.uint64)}
    examples = [Tokens([1], [True]), Tokens([2], [True])]
    write_shard(tmp_path / "s", examples, [0, 1], [(0, -1), (1, -1)], facts, {"words": ["größer", None]})
    shard = Shard(tmp_path / "s")
    assert shard.notes == {"words": ["größer", None]} and shard.records == 2
    assert all(np.array_equal(shard[name], fact) and shard[name].dtype == fact.dtype for name, fact in facts.items())
    assert "bands" in shard and "other" not in shard


def test_the_first_token_is_no_target(tmp_path: Path) -> None:
    assert tiny.write_store(tmp_path, [Tokens([1, 2, 3], [True, False, True])])[0].supervised_targets == 1


def test_an_empty_store_opens(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, [])
    assert len(store) == 0
    assert store.lengths.tolist() == []


def test_reading_maps_the_files_and_cannot_write_to_them(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_tokens(3))
    assert isinstance(store[0].ids.base, np.memmap) or isinstance(store[0].ids, np.memmap)
    assert not store[0].ids.flags.writeable
