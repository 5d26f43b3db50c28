"""Bootstrap intervals of scores, and of the difference between two models on the same items.

The percentile bootstrap (Efron & Tibshirani 1993, chapter 13): draw N of the N items with replacement, compute the
score of the draw, do so many times; the interval runs between the quantiles of those scores. It says how much the score
owes to which items are in the test set; the seeds of training and of answers are held fixed and not covered. On a few
dozen items percentile intervals are somewhat too short (Hesterberg 2015, The American Statistician 69(4)).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fullrank.evaluate.metrics import Array, Items
from fullrank.records import Score

#: Most draws of single items held at once, which bounds the memory to some tens of megabytes.
_DRAWS_AT_ONCE = 2**20


def interval(items: Items, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Score:
    """The score over all items with its percentile bootstrap interval.

    Args:
        items: N items, at least one.
        resamples: draws; 2,000 puts the quantiles of a 95 % interval on the 50 outermost draws of either side.
        seed: of the draws; equal seeds and numbers of items draw the same items.
        level: the share of draws that the interval spans, in (0, 1).

    Raises:
        ValueError: no items.
    """
    scores = [items.reduce(counts @ items.stats_NK) for counts in _draws(len(items.stats_NK), resamples, seed)]
    return _score(items.value, np.concatenate(scores), level)


def paired_difference(tuned: Items, base: Items, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Score:
    """tuned - base with its percentile bootstrap interval; every draw takes the same items of both.

    Args:
        tuned, base: the same N items, in the same order, under two models.
        resamples, seed, level: as in `interval`.

    Raises:
        ValueError: no items, or two different numbers of items.
    """
    if len(tuned.stats_NK) != len(base.stats_NK):
        raise ValueError(f"{len(tuned.stats_NK)} tuned and {len(base.stats_NK)} base items cannot be paired")
    differences = [
        tuned.reduce(counts @ tuned.stats_NK) - base.reduce(counts @ base.stats_NK)
        for counts in _draws(len(tuned.stats_NK), resamples, seed)
    ]
    return _score(tuned.value - base.value, np.concatenate(differences), level)


def _draws(items: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each item is in each draw, a few draws at a time: [draws, items]; every row sums to `items`."""
    if items < 1:
        raise ValueError("an interval needs at least one item")
    random = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // items)
    for first in range(0, resamples, at_once):
        draws = min(at_once, resamples - first)
        drawn: NDArray[np.int64] = random.integers(items, size=(draws, items))
        drawn += np.arange(draws)[:, None] * items  # each draw counts into its own stretch
        yield np.bincount(drawn.ravel(), minlength=draws * items).reshape(draws, items).astype(np.float64)


def _score(value: float, resampled: Array, level: float) -> Score:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Score(value=value, low=float(low), high=float(high))
