"""Whether two models differ on the same items, by a permutation test, and Holm's correction for several such questions.

The test asks how often a difference as large would arise if it were chance which of the two models gave which of an item's
two answers (Fisher 1935, The Design of Experiments, section 21; for scores that are no means, Yeh 2000, COLING, "approximate
randomization"). It needs no assumption on the scores, and holds its level for any score that is a function of the items' sums.
It tests that the models are exchangeable item by item, not only that their scores are equal; the seeds of training are held
fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fullrank.evaluate.metrics import Array, Items

#: Most swaps of single items held at once, which bounds the memory to some tens of megabytes.
_SWAPS_AT_ONCE = 2**21

#: What rounding may take from a difference that equals the observed one, relative to it.
_ROUNDING = 1e-9


def p_value(tuned: Items, base: Items, draws: int = 9_999, seed: int = 0) -> float:
    """The two-sided p-value of tuned - base.

    Draws swap the two models' rows of every item with probability 1/2; p = (1 + draws with a difference as large) / (1 + draws)
    (Phipson & Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9(1)), which is never 0. Where the items
    that differ can be swapped in no more than 1 + draws ways, all ways are counted instead, and p is exact. Models that differ
    on no item have p = 1.

    Args:
        tuned, base: the same N items, in the same order, under two models.
        draws: 9,999 give p = 0.05 with a standard error of 0.002.
        seed: of the draws.

    Raises:
        ValueError: no items, or two different numbers of items.
    """
    if len(tuned.stats_NK) != len(base.stats_NK):
        raise ValueError(f"{len(tuned.stats_NK)} tuned and {len(base.stats_NK)} base items cannot be paired")
    if not len(tuned.stats_NK):
        raise ValueError("a test needs at least one item")
    differ_N = (tuned.stats_NK != base.stats_NK).any(axis=1)
    change_MK = (base.stats_NK - tuned.stats_NK)[differ_N]
    sum_tuned, sum_base = tuned.stats_NK.sum(axis=0), base.stats_NK.sum(axis=0)
    observed = abs(float(tuned.reduce(sum_tuned) - base.reduce(sum_base)))
    at_least = observed - _ROUNDING * max(1.0, observed)
    count = len(change_MK)
    exact = 2**count <= draws + 1
    ways = 2**count if exact else draws
    random = np.random.default_rng(seed)
    at_once = max(1, _SWAPS_AT_ONCE // max(count, 1))
    as_large = 0
    for first in range(0, ways, at_once):
        rows = min(at_once, ways - first)
        swaps = _every_swap(first, rows, count) if exact else _random_swaps(random, rows, count)
        moved = swaps @ change_MK
        differences = tuned.reduce(sum_tuned + moved) - base.reduce(sum_base - moved)
        as_large += int((np.abs(differences) >= at_least).sum())
    return as_large / ways if exact else (1 + as_large) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for having asked several questions, in the order given.

    Holm 1979 (Scandinavian Journal of Statistics 6(2)): each of the m values, from the smallest on, is multiplied by
    m, m - 1, ..., 1 and raised to the one before it. Calling those of at most 0.05 significant is wrong about any true null
    hypothesis with a probability of at most 0.05, however the tests depend on one another.

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(p_values, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1]: {list(p_values)}")
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return [float(value) for value in corrected]


def _every_swap(first: int, rows: int, count: int) -> Array:
    """The binary digits of the numbers from `first` on: [rows, count]."""
    return (np.arange(first, first + rows)[:, None] >> np.arange(count) & 1).astype(np.float64)


def _random_swaps(random: np.random.Generator, rows: int, count: int) -> Array:
    """Fair coins, [rows, count]. Every row takes whole words of 32 bits, so that how many are held at once does not matter."""
    width = 4 * ((count + 31) // 32)
    drawn = np.frombuffer(random.bytes(rows * width), np.uint8).reshape(rows, width)
    return np.unpackbits(drawn, axis=1, count=count).astype(np.float64)
