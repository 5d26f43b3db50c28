"""The token store: what is written is what is read, with the place each example came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny

from fullrank.sequences.chat import Tokens
from fullrank.sequences.store import StoreWriter, TokenStore


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
    writer = StoreWriter(tmp_path)
    for origin in ("data/a.jsonl:12", "data/2024:3", "data/a.jsonl:7"):
        writer.append(Tokens([1, 2], [False, True]), origin)
    writer.close()
    store = TokenStore(tmp_path)
    assert [store.origin(n) for n in range(3)] == ["data/a.jsonl:12", "data/2024:3", "data/a.jsonl:7"]


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
