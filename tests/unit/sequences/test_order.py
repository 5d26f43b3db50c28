"""Which examples make up a step: a pure function, every epoch a permutation."""

from __future__ import annotations

import numpy as np
import pytest

from fullrank.sequences.order import Order, held_out


def epoch(order: Order, number: int) -> list[int]:
    first = number * order.steps_per_epoch + 1
    return [int(e) for step in range(first, first + order.steps_per_epoch) for e in order.step(step)]


@pytest.mark.parametrize(("examples", "batch"), [(1, 1), (10, 3), (12, 4), (5, 8), (257, 16)])
def test_every_epoch_is_a_permutation_of_its_own(examples: int, batch: int) -> None:
    order = Order(examples, batch, epochs=3, seed=0)
    epochs = [epoch(order, number) for number in range(3)]
    assert all(sorted(seen) == list(range(examples)) for seen in epochs)
    if examples > 5:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != sorted(epochs[0])


def test_the_last_step_of_an_epoch_holds_what_is_left() -> None:
    order = Order(10, 4, epochs=2, seed=1)
    assert [len(order.step(step)) for step in range(1, order.steps + 1)] == [4, 4, 2, 4, 4, 2]


def test_a_step_is_a_pure_function_of_seed_examples_batch_and_step() -> None:
    forwards = {step: Order(50, 8, 3, seed=7).step(step).tolist() for step in range(1, 22)}
    order = Order(50, 8, 3, seed=7)
    assert {step: order.step(step).tolist() for step in reversed(range(1, 22))} == forwards
    assert Order(50, 8, 99, seed=7).step(5).tolist() == forwards[5], "the length of the run is no matter"
    assert Order(50, 8, 3, seed=8).step(5).tolist() != forwards[5]


def test_the_batch_size_cuts_the_same_permutation() -> None:
    assert epoch(Order(20, 3, 1, seed=2), 0) == epoch(Order(20, 7, 1, seed=2), 0)


def test_the_order_is_the_same_on_every_machine() -> None:
    # Philox4x64-10 is specified bit by bit (Salmon et al. 2011); these are the ranks of its first raw draws for key (3, 1).
    draws = np.random.Philox(key=[3, 1]).random_raw(6)
    by_hand = sorted(range(6), key=lambda n: int(draws[n]))
    assert epoch(Order(6, 6, 2, seed=3), 1) == by_hand
    # Random123's known answer for counter 0, key 0 holds numpy to the specification (numpy counts from 1: its first draw
    # is the block of counter 1, so the counter is set back by one).
    zero = np.random.Philox(key=0, counter=(1 << 256) - 1).random_raw(4)
    assert [hex(int(word)) for word in zero] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


def test_what_is_handed_out_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Order(10, 4, 1, seed=0).step(1)[0] = 3


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [
        (10, 4, 1, 3),
        (10, 4, 2, 6),
        (10, 4, 0.5, 2),  # 5 examples, 4 a step
        (10, 4, 0.4, 1),  # exactly one step
        (10, 4, 1.5, 5),
        (10, 5, 0.1, 1),
        (3, 8, 0.01, 1),  # at least one
        (100, 10, 0.3, 3),  # 0.3 * 100 is 30.000000000000004 in floating point
        (100, 10, 2.7, 27),
    ],
)
def test_steps_of_a_run(examples: int, batch: int, epochs: float, steps: int) -> None:
    assert Order(examples, batch, epochs, seed=0).steps == steps


def test_the_epoch_after_a_step_counts_examples() -> None:
    order = Order(10, 4, 2, seed=0)
    assert [order.epoch_after(step) for step in range(1, 7)] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])


def chosen(records: int, ratio: float, seed: int) -> set[int]:
    """Positions held out of records that have nothing in common."""
    return set(np.flatnonzero(held_out(np.arange(records), ratio, seed)).tolist())


def test_held_out_records_are_the_same_for_a_seed_and_never_all_of_them() -> None:
    assert len(chosen(100, 0.1, seed=0)) == 10
    assert chosen(100, 0.1, seed=0) == chosen(100, 0.1, seed=0) != chosen(100, 0.1, seed=1)
    assert len(chosen(5, 0.001, seed=0)) == 1
    assert len(chosen(2, 0.999, seed=0)) == 1
    assert chosen(100, 0.1, seed=0) <= chosen(100, 0.2, seed=0), "a larger share keeps what a smaller one chose"


@pytest.mark.parametrize("seed", range(5))
def test_records_of_one_group_are_held_out_together(seed: int) -> None:
    groups = np.array([n // 3 for n in range(60)] + [99] * 30)
    held = held_out(groups, 0.2, seed)
    assert all(len(set(held[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    assert 15 <= held.sum() <= 18 and not held[groups == 99].any(), "a group larger than the share stays in training"


def test_one_group_alone_is_divided() -> None:
    assert held_out(np.zeros(10, int), 0.3, seed=0).sum() == 3


def test_held_out_records_are_drawn_apart_from_the_order_of_epochs() -> None:
    assert chosen(100, 0.1, seed=0) != set(epoch(Order(100, 10, 1, seed=0), 0)[:10])
