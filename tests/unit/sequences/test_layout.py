"""Examples -> rows: nothing lost, nothing doubled, no row above its budget, positions that restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from fullrank.sequences.chat import Tokens
from fullrank.sequences.layout import MicroBatch, micro_batches


def read_back(row: MicroBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Example -> (ids, positions predicting within it, targets), taken apart at the positions that restart."""
    starts = [n for n, position in enumerate(row.position_ids_1T[0].tolist()) if position == 0]
    ends = [*starts[1:], row.tokens]
    found = {}
    for number, (name, start, end) in enumerate(zip(row.examples, starts, ends, strict=True)):
        own = row.owner_S == number
        found[name] = (
            row.input_ids_1T[0, start:end].tolist(),
            (row.predicting_S[own] - start).tolist(),
            row.targets_S[own].tolist(),
        )
    return found


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_every_example_comes_out_once_with_its_tokens_and_targets(tmp_path: Path, budget: int, packed: bool) -> None:
    examples = tiny.random_tokens(30)
    store = tiny.write_store(tmp_path, examples)
    chosen = [n for n in range(30) if n % 3 != 0]
    rows = micro_batches(store, chosen, budget, packed=packed)
    found: dict[int, tuple[list[int], list[int], list[int]]] = {}
    for row in rows:
        parts = read_back(row)
        assert not parts.keys() & found.keys()
        found |= parts
        assert packed or len(parts) == 1
        assert row.tokens <= budget or len(parts) == 1, "only an example longer than the budget exceeds it, alone"
        assert row.supervised_tokens == len(row.targets_S)
    assert sorted(found) == chosen
    for name, (ids, predicting, targets) in found.items():
        tokens = examples[name]
        last = max(n for n, inside in enumerate(tokens.supervised) if inside)
        assert ids == tokens.ids[: last + 1], "what follows the last supervised token is not computed"
        assert predicting == [n - 1 for n, inside in enumerate(tokens.supervised) if inside and n > 0]
        assert targets == [tokens.ids[n + 1] for n in predicting]


def test_a_row_by_hand(tmp_path: Path) -> None:
    store = tiny.write_store(
        tmp_path,
        [
            Tokens([10, 11, 12, 13, 14], [False, False, True, True, False]),
            Tokens([20, 21], [False, True]),
            Tokens([30, 31, 32], [True, True, False]),  # the first token has nothing before it
        ],
    )
    (row,) = micro_batches(store, [2, 0, 1], 100, packed=True)
    # Longest first; example 0 is cut to 4 tokens, example 2 to 2, and ties keep the given order.
    assert row.examples == (0, 2, 1)
    assert row.input_ids_1T.tolist() == [[10, 11, 12, 13, 30, 31, 20, 21]]
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert row.predicting_S.tolist() == [1, 2, 4, 6]
    assert row.targets_S.tolist() == [12, 13, 31, 21]
    assert row.owner_S.tolist() == [0, 0, 1, 2]
    assert row.tokens == 8
    assert row.supervised_tokens == 4


def test_rows_are_first_fit_decreasing(tmp_path: Path) -> None:
    lengths = [4, 8, 1, 4, 2, 1]
    store = tiny.write_store(tmp_path, [Tokens([1] * n, [True] * n) for n in lengths])
    rows = micro_batches(store, range(6), 10, packed=True)
    assert [[lengths[e] for e in row.examples] for row in rows] == [[8, 2], [4, 4, 1, 1]]


def test_unpacked_rows_keep_the_given_order(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_tokens(6))
    assert [row.examples for row in micro_batches(store, [4, 1, 5], 9999, packed=False)] == [(4,), (1,), (5,)]


def test_the_layout_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_tokens(20))
    once, again = (micro_batches(store, range(20), 50, packed=True) for _ in range(2))
    assert [row.examples for row in once] == [row.examples for row in again]
    assert all(torch.equal(a.input_ids_1T, b.input_ids_1T) for a, b in zip(once, again, strict=True))


def test_moving_a_row_to_its_own_device_is_free(tmp_path: Path) -> None:
    (row,) = micro_batches(tiny.write_store(tmp_path, tiny.random_tokens(2)), range(2), 99, packed=True)
    assert row.to(torch.device("cpu")) is row
    moved = row.to(torch.device("meta"))
    assert moved.examples == row.examples
    assert moved.input_ids_1T.shape == row.input_ids_1T.shape
    assert moved.owner_S.device.type == "meta"
