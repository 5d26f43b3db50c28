"""Examples -> rows: nothing lost, nothing doubled, no row above its budget, positions that restart."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fullrank.sequences.chat import Tokens
from fullrank.sequences.forest import Segment, grow
from fullrank.sequences.layout import MicroBatch, dealt, micro_batches


def path_to(row: MicroBatch, position: int) -> list[int]:
    """Row positions of everything a token stands behind, and its own."""
    number = next(n for n, segment in enumerate(row.segments) if segment.start <= position < segment.end)
    found = list(range(row.segments[number].start, position + 1))
    while (number := row.segments[number].parent) >= 0:
        found = [*range(row.segments[number].start, row.segments[number].end), *found]
    return found


def read_back(row: MicroBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Example -> (ids, positions predicting within it, targets), walked up from each prediction."""
    ids, positions = row.input_ids_1T[0].tolist(), row.position_ids_1T[0].tolist()
    found: dict[int, tuple[list[int], list[int], list[int]]] = {}
    for number, name in enumerate(row.examples):
        entries = row.entry_P[row.owner_P == number]
        predicting = row.predicting_S[entries].tolist()
        path = path_to(row, max(predicting, key=lambda position: positions[position]))
        assert [positions[position] for position in path] == list(range(len(path))), "positions are depths"
        where = [path.index(position) for position in predicting]
        found[name] = ([ids[position] for position in path], where, row.targets_S[entries].tolist())
    return found


def alike(chance: random.Random, count: int) -> list[Tokens]:
    """Examples of which many begin alike, some are the whole beginning of others, and some are there twice."""
    beginnings = [[chance.randrange(9) for _ in range(chance.randrange(1, 30))] for _ in range(4)]
    made: list[Tokens] = []
    while len(made) < count:
        ids = [*chance.choice(beginnings), *(chance.randrange(9) for _ in range(chance.randrange(1, 20)))]
        ids = chance.choice(made).ids + ids[:5] if made and chance.random() < 0.3 else ids
        supervised = [chance.random() < 0.5 for _ in ids]
        if any(supervised[1:]):
            made.append(Tokens(ids, supervised))
        if made and chance.random() < 0.15:
            made.append(made[-1])
    return made[:count]


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 1000])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_every_example_comes_out_once_with_its_tokens_and_targets(
    tmp_path: Path, budget: int, packed: bool, shared: bool
) -> None:
    examples = [*tiny.random_tokens(10), *alike(random.Random(7), 20)]
    store = tiny.write_store(tmp_path, examples)
    chosen = [n for n in range(30) if n % 3 != 0]
    rows = micro_batches(store, chosen, budget, packed=packed, shared=shared)
    found: dict[int, tuple[list[int], list[int], list[int]]] = {}
    for row in rows:
        parts = read_back(row)
        assert not parts.keys() & found.keys()
        found |= parts
        assert packed or len(parts) == 1
        assert row.tokens <= budget or len(parts) == 1, "only an example longer than the budget exceeds it, alone"
        assert row.supervised_tokens == sum(len(targets) for _, _, targets in parts.values()) == int(row.times_S.sum())
        assert row.separate_tokens == sum(len(ids) for ids, _, _ in parts.values()) >= row.tokens
        assert row.separate_tokens == row.tokens or shared
    assert sorted(found) == chosen
    for name, (ids, predicting, targets) in found.items():
        tokens = examples[name]
        last = max(n for n, inside in enumerate(tokens.supervised) if inside)
        assert ids == tokens.ids[:last], "the last supervised token is predicted and need not be read, nor what follows it"
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
    # Longest first, laid out in the order of their ids; a token that only has to be predicted is not there.
    assert row.examples == (0, 2, 1)
    assert row.input_ids_1T.tolist() == [[10, 11, 12, 20, 30]]
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 0, 0]]
    assert row.predicting_S.tolist() == [1, 2, 3, 4]
    assert row.targets_S.tolist() == [12, 13, 21, 31]
    assert row.owner_P.tolist() == [0, 0, 1, 2]
    assert row.entry_P.tolist() == [0, 1, 3, 2]
    assert row.tokens == row.separate_tokens == 5
    assert row.supervised_tokens == 4


def test_a_tree_by_hand(tmp_path: Path) -> None:
    prompt = [1, 2, 3, 4, 5]
    answers = [[6, 7], [6, 8, 9], [], [10]]
    store = tiny.write_store(
        tmp_path, [Tokens([*prompt, *answer, 11], [False] * 5 + [True] * (len(answer) + 1)) for answer in answers]
    )
    (row,) = micro_batches(store, range(4), 100, packed=True)
    assert row.input_ids_1T.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 6, 7, 5]]
    assert [tuple(segment) for segment in row.segments] == [
        (0, 5, 10, 0, -1),  # the prompt
        (5, 6, 9, 5, 0),  # 6, with which two answers begin
        (6, 7, 7, 6, 1),
        (7, 9, 9, 6, 1),
        (9, 10, 10, 5, 0),
    ]
    made = list(zip(row.predicting_S.tolist(), row.targets_S.tolist(), row.times_S.tolist(), strict=True))
    # 6 follows the prompt in two examples and is predicted once for both.
    assert made == [(4, 6, 2), (4, 10, 1), (4, 11, 1), (5, 7, 1), (5, 8, 1), (6, 11, 1), (7, 9, 1), (8, 11, 1), (9, 11, 1)]
    assert row.separate_tokens == 5 * 4 + 2 + 3 + 0 + 1
    assert row.supervised_tokens == 3 + 4 + 1 + 2


@pytest.mark.parametrize("seed", range(20))
def test_a_forest_holds_every_beginning_once(seed: int) -> None:
    ids = [np.asarray(tokens.ids) for tokens in alike(random.Random(seed), 12)]
    forest = grow(ids, least_shared=1)
    assert len(forest.ids_T) == len({tuple(some[:n]) for some in ids for n in range(1, len(some) + 1)})
    for some, path_T in zip(ids, forest.paths, strict=True):
        assert forest.ids_T[path_T].tolist() == some.tolist()
        assert forest.positions_T[path_T].tolist() == list(range(len(some)))
    for number, segment in enumerate(forest.segments):
        below = [other for n, other in enumerate(forest.segments) if number in ancestors(forest.segments, n)]
        assert sum(other.end - other.start for other in below) == segment.below - segment.start
        assert all(segment.start <= other.start and other.end <= segment.below for other in below)


def ancestors(segments: tuple[Segment, ...], number: int) -> set[int]:
    found = {number}
    while (number := segments[number].parent) >= 0:
        found.add(number)
    return found


@pytest.mark.parametrize("seed", range(10))
def test_examples_that_begin_alike_come_into_one_row(tmp_path: Path, seed: int) -> None:
    """Two long prompts and a budget for each with its answers: cut anywhere else, a prompt would be there twice."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(50) for _ in range(40)] for _ in range(2)]
    examples = [
        Tokens([*prompts[n % 2], *(chance.randrange(50) for _ in range(6)), 1], [False] * 40 + [True] * 7) for n in range(10)
    ]
    chance.shuffle(examples)
    rows = micro_batches(tiny.write_store(tmp_path, examples), range(10), 75, packed=True)
    assert len(rows) == 2 and sum(row.tokens for row in rows) <= 2 * (40 + 5 * 6)


def test_rows_are_filled_evenly(tmp_path: Path) -> None:
    lengths = [40, 30, 20, 20, 10, 8]
    store = tiny.write_store(tmp_path, [Tokens([n] * length, [True] * length) for n, length in enumerate(lengths)])
    rows = micro_batches(store, range(6), 70, packed=True)
    assert sorted(row.tokens for row in rows) == [58, 64]


def test_rows_are_first_fit_decreasing(tmp_path: Path) -> None:
    lengths = [5, 9, 2, 5, 3, 2]  # a token less is computed
    store = tiny.write_store(tmp_path, [Tokens([n] * length, [True] * length) for n, length in enumerate(lengths)])
    rows = micro_batches(store, range(6), 10, packed=True)
    assert [[lengths[e] for e in row.examples] for row in rows] == [[9, 3], [5, 5, 2, 2]]


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
    assert moved.owner_P.device.type == "meta"


# ---- several ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("examples", [1, 5, 24])
def test_rows_are_dealt_evenly_and_every_example_once(ranks: int, examples: int, tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_tokens(24, seed=3))
    rows = micro_batches(store, range(examples), 64, packed=True, ranks=ranks)
    hands = dealt(rows, ranks)
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(example for hand in hands for row in hand for example in row.examples) == list(range(examples))
    assert sum(row.supervised_tokens for hand in hands for row in hand) == sum(row.supervised_tokens for row in rows)
    assert all(row.tokens <= 64 for row in rows)
    if examples == 24 and ranks > 1:
        loads = [sum(row.tokens for row in hand) for hand in hands]
        assert max(loads) <= 1.5 * min(loads)
        for together in zip(*hands, strict=True):  # what is computed at the same time is about equally long
            assert max(row.tokens for row in together) - min(row.tokens for row in together) <= 40


def test_a_row_that_idles_counts_for_nothing(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_tokens(3))
    (row,) = micro_batches(store, [0], 64, packed=True)
    assert len(row.targets_S) and not row.idle().times_S.any()
    assert (row.idle().supervised_tokens, row.idle().examples, row.idle().separate_tokens) == (0, (), 0)
    hands = dealt([row], 3)
    assert [hand[0].supervised_tokens for hand in hands] == [row.supervised_tokens, 0, 0]


def test_examples_that_begin_alike_are_parted_only_as_far_as_ranks_need(tmp_path: Path) -> None:
    alike = [Tokens([*range(40), 100 + n, 7], [False] * 40 + [True] * 2) for n in range(8)]
    store = tiny.write_store(tmp_path, alike)
    tokens = {ranks: sum(row.tokens for row in micro_batches(store, range(8), 512, packed=True, ranks=ranks)) for ranks in (1, 2)}
    assert tokens[1] == 40 + 8 and tokens[2] == 2 * (40 + 4)
