"""Mixes in given shares: held to the example or the last example, within every source's limit, the same for the same seed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.data.mix import mix


def wanted(amounts: list[int], weights: list[float], repeats: list[int]) -> list[Fraction]:
    """What each source gives to the largest mix there is: every source is tried as the one that is used up."""
    shares = [Fraction(weight) for weight in weights]
    for scarce, amount in enumerate(amounts):
        given_out = [Fraction(repeats[scarce] * amount) * share / shares[scarce] for share in shares]
        if all(out <= repeats[n] * amounts[n] for n, out in enumerate(given_out)):
            return given_out
    raise AssertionError("one of them is the scarcest")


def times(taken: np.ndarray, examples: int) -> np.ndarray:
    """How often each example was taken."""
    return np.bincount(taken, minlength=examples)


SOURCES = st.lists(
    st.tuples(
        st.integers(1, 60),  # examples
        st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0, 7.0]),  # weight
        st.integers(1, 4),  # repeat
    ),
    min_size=1,
    max_size=4,
)


# ---- by examples ----------------------------------------------------------------------------------------------------


@given(SOURCES, st.integers(0, 2**31 - 1))
def test_shares_of_examples_hold_to_the_example(sources: list[tuple[int, float, int]], seed: int) -> None:
    amounts, weights, repeats = ([source[n] for source in sources] for n in range(3))
    taken = mix([np.ones(amount, int) for amount in amounts], weights, repeats, "examples", seed)
    for mine, exact in zip(taken, wanted(amounts, weights, repeats), strict=True):
        assert abs(len(mine) - exact) <= Fraction(1, 2) + Fraction(1, 10**6)


@given(SOURCES, st.integers(0, 2**31 - 1), st.sampled_from(["examples", "tokens"]))
def test_no_example_is_taken_more_often_than_its_source_allows_nor_much_more_than_another(
    sources: list[tuple[int, float, int]], seed: int, by: str
) -> None:
    amounts, weights, repeats = ([source[n] for source in sources] for n in range(3))
    lengths = [np.random.default_rng(seed + n).integers(2, 50, amount) for n, amount in enumerate(amounts)]
    for mine, amount, repeat in zip(mix(lengths, weights, repeats, by, seed), amounts, repeats, strict=True):
        counts = times(mine, amount)
        assert len(counts) == amount and counts.max() <= repeat
        assert counts.max() - counts.min() <= 1  # all of them once before one of them twice
        assert np.all(np.diff(mine) >= 0)


def test_the_scarcest_source_is_used_up() -> None:
    taken = mix([np.ones(1000, int), np.ones(10, int)], [1.0, 1.0], [1, 3], "examples", 0)
    assert [len(mine) for mine in taken] == [30, 30]
    assert times(taken[1], 10).tolist() == [3] * 10
    assert len(set(taken[0])) == 30


# ---- by tokens ------------------------------------------------------------------------------------------------------


@given(SOURCES, st.integers(0, 2**31 - 1))
def test_shares_of_tokens_hold_to_the_last_example(sources: list[tuple[int, float, int]], seed: int) -> None:
    amounts, weights, repeats = ([source[n] for source in sources] for n in range(3))
    lengths = [np.random.default_rng(seed + n).integers(1, 90, amount) for n, amount in enumerate(amounts)]
    tokens = [int(source.sum()) for source in lengths]
    taken = mix(lengths, weights, repeats, "tokens", seed)
    for source, mine, exact in zip(lengths, taken, wanted(tokens, weights, repeats), strict=True):
        # One example more or less would be no nearer: the miss is at most half of an example, and the wish is a whole number.
        assert abs(int(source[mine].sum()) - exact) <= Fraction(int(source.max()), 2) + Fraction(1, 2) + Fraction(1, 10**6)


def test_long_and_short_examples_make_equal_shares_of_tokens() -> None:
    long, short = np.full(20, 100), np.full(1000, 10)
    by_tokens = mix([long, short], [1.0, 1.0], [1, 1], "tokens", 3)
    assert [len(mine) for mine in by_tokens] == [20, 200]
    by_examples = mix([long, short], [1.0, 1.0], [1, 1], "examples", 3)
    assert [len(mine) for mine in by_examples] == [20, 20]


# ---- chance ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 2**31 - 1), st.sampled_from(["examples", "tokens"]))
def test_nothing_is_chosen_without_weights(amounts: list[int], seed: int, by: str) -> None:
    lengths = [np.arange(1, amount + 1) for amount in amounts]
    taken = mix(lengths, [None] * len(amounts), [1] * len(amounts), by, seed)
    assert [mine.tolist() for mine in taken] == [list(range(amount)) for amount in amounts]


def chosen(seed: int, by: str = "examples") -> list[list[int]]:
    return [mine.tolist() for mine in mix([np.full(40, 5), np.full(10, 5), np.full(40, 5)], [1.0] * 3, [1] * 3, by, seed)]


@pytest.mark.parametrize("by", ["examples", "tokens"])
def test_the_seed_alone_decides(by: str) -> None:
    assert chosen(7, by) == chosen(7, by)
    assert chosen(7, by) != chosen(8, by)
    assert chosen(7, by)[0] != chosen(7, by)[2]  # sources of one size are drawn from apart


def test_every_example_has_the_same_chance() -> None:
    counts = np.zeros(40)
    for seed in range(800):
        counts += times(np.array(chosen(seed)[0]), 40)
    # 10 of 40, 800 times: 200 each, with a standard deviation of sqrt(800 * 0.25 * 0.75) = 12; five of them.
    assert np.abs(counts - 200).max() < 62
