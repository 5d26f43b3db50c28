"""A score as sums: each item has a row of statistics, and the score is a function of the rows' sum.

So the score of any resample of the items costs one weighted sum, and so does the score without one item, which is what makes
intervals (`fullrank.evaluate.statistics`) cheap; and an item's own score is the metric over it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Where a score lives: in [0, 1]; without bounds; above 0, with errors that multiply. Intervals are computed by it.
Scale = Literal["share", "linear", "log"]


@dataclass(frozen=True)
class Items:
    """One score's statistics over N items.

    Args:
        stats_NK: K sufficient statistics of each item.
        reduce: sums of statistics [..., K] -> scores [...].
        scale: where the score lives.
        signature: how a library says it computed the score; empty where none was used.
    """

    stats_NK: Array
    reduce: Callable[[Array], Array]
    scale: Scale = "linear"
    signature: str = ""

    @property
    def value(self) -> float:
        """The score over all items."""
        return float(self.reduce(self.stats_NK.sum(axis=0)))

    @property
    def per_item(self) -> list[float]:
        """The score of each item alone."""
        return [float(score) for score in self.reduce(self.stats_NK)]


def ratio(sums: Array) -> Array:
    """The first statistic over the second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean(scores: Sequence[float], scale: Scale = "share") -> Items:
    """The mean of one number an item, in [0, 1] unless the scale is another, as the ratio of two sums."""
    return Items(np.column_stack([np.asarray(scores, np.float64), np.ones(len(scores))]), ratio, scale)


def place(places: Sequence[str], number: int) -> str:
    """Where an item's record stands, for messages: its number where nothing better is known."""
    return places[number] if places else f"test record {number + 1}"


def shortened(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= 80 else text[:77] + "..."
