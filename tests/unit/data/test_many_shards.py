"""A file of thousands of blocks is prepared with few files open at a time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from staging import staged, write_case
from tiny import chat_rows, write_jsonl

from fullrank.data import sources
from fullrank.sequences.store import TokenStore


def test_more_shards_than_files_that_may_be_open(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = write_case(tmp_path, tiny_model_folder("llama"))
    write_jsonl(tmp_path / "train.jsonl", chat_rows(400))
    whole = sources.blocks
    monkeypatch.setattr(sources, "blocks", lambda source: whole(source, block_bytes=200))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (350, hard))
    try:
        run = staged(case)
        run.data()
        store = TokenStore(run.run.data / "train")
        assert len(store.places) > 350
        assert sum(len(store[n].ids) for n in range(len(store))) == int(store.lengths.sum())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
