"""Rows in parts: every token and every prediction in exactly one of them, and as many scores for one rank as for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fullrank.sequences.layout import MicroBatch, micro_batches, row_of
from fullrank.sequences.parts import part_of, stretches
from fullrank.sequences.store import Example


def rows(folder: Path) -> list[MicroBatch]:
    """Some that share beginnings, one of one token."""
    store = tiny.write_store(folder, tiny.random_tokens(20, vocabulary=300))
    tokens = np.arange(40) % 7
    alike = [(n, Example(np.append(tokens[: 20 + n], 8 + n), np.arange(21 + n) > 3)) for n in range(5)]
    one = Example(np.array([3, 4]), np.array([False, True]))
    return [*micro_batches(store, range(20), 100, packed=True), row_of(alike, shared=True), row_of([(0, one)], shared=True)]


def fields(row: MicroBatch) -> list[tuple[int, ...]]:
    """(id, position, target, times) of every prediction that counts."""
    at = row.predicting_S
    numbers = zip(row.input_ids_1T[0, at], row.position_ids_1T[0, at], row.targets_S, row.times_S, strict=True)
    return sorted(tuple(int(number) for number in each) for each in numbers if each[3])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_and_every_prediction_is_in_one_part(ranks: int, tmp_path: Path) -> None:
    for row in rows(tmp_path):
        parts = [part_of(row, ranks, rank) for rank in range(ranks)]
        assert sum(part.tokens for part in parts) == max(row.tokens, 2 * ranks)
        assert all(part.tokens >= 2 and len(part.targets_S) >= 1 for part in parts)
        assert sorted(each for part in parts for each in fields(part)) == fields(row)
        assert sum(part.supervised_tokens for part in parts) == row.supervised_tokens
        numbers_S = torch.cat([part.part.numbers_S for part in parts if part.part])
        assert sorted(numbers_S.tolist()) == list(range(len(row.targets_S)))
        for part in parts:
            counted = torch.bincount(part.entry_P, minlength=len(part.targets_S))
            assert counted.tolist() == part.times_S.tolist()


def test_an_idle_row_counts_for_nothing_in_parts_either(tmp_path: Path) -> None:
    for row in rows(tmp_path):
        for rank in range(2):
            part = part_of(row.idle(), 2, rank)
            assert not part.times_S.any() and not part.supervised_tokens and len(part.targets_S)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_of_one_example_every_rank_computes_as_many_scores(ranks: int) -> None:
    tokens = 600
    scores = [sum(position + 1 for low, high in own for position in range(low, high)) for own in stretches(tokens, ranks)]
    assert max(scores) - min(scores) <= tokens and sum(scores) == tokens * (tokens + 1) // 2
