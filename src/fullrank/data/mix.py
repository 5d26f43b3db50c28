"""Which examples of which source an epoch holds: all of them, or a mix in given shares.

A mix is as large as its scarcest source allows: no example stands in it more than `repeat` times, and the shares hold to the
example (or, by tokens, to the last example). What is left out of a larger source, and what comes once more of a smaller one, is
chosen by the seed. Nothing is drawn at random while training: the mix is written down before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

#: Keeps the draws of a mix apart from those of the validation split and of the epochs (`fullrank.sequences.order`).
_STREAM = 2**62


def mix(
    lengths: Sequence[np.ndarray],
    weights: Sequence[float | None],
    repeats: Sequence[int],
    by: Literal["examples", "tokens"],
    seed: int,
) -> list[np.ndarray]:
    """Positions of the examples taken from each source, ascending, one more time for each repetition.

    Args:
        lengths: tokens of every example of each source.
        weights: relative shares, for all sources or for none.
        repeats: most times an example of each source may be taken.
        by: what the shares are counted in.
        seed: chooses what is left out or repeated.
    """
    if any(weight is None for weight in weights):
        return [np.arange(len(source)) for source in lengths]
    shares = np.asarray([float(weight or 0) for weight in weights])
    shares /= shares.sum()
    amounts = [int(source.sum()) if by == "tokens" else len(source) for source in lengths]
    # A source of which nothing could be used has no share to hold; the card shows it.
    size = min(
        (repeat * amount / share for repeat, amount, share in zip(repeats, amounts, shares, strict=True) if amount), default=0
    )
    return [
        _take(source, round(size * share), amount, by, seed, number)
        for number, (source, share, amount) in enumerate(zip(lengths, shares, amounts, strict=True))
    ]


def _take(lengths: np.ndarray, wanted: int, amount: int, by: str, seed: int, number: int) -> np.ndarray:
    """Whole passes over a source, and a random part of it for the rest."""
    if not amount:
        return np.arange(0)
    passes, rest = divmod(wanted, amount)
    draws = np.random.Philox(key=[seed, _STREAM + number]).random_raw(len(lengths))
    order = np.argsort(draws, kind="stable")
    if by == "tokens":
        reached = np.cumsum(lengths[order])
        # Up to the example that comes nearest to the share.
        count = int(np.searchsorted(reached, rest))
        before = int(reached[count - 1]) if count else 0
        rest = count + (count < len(order) and abs(int(reached[count]) - rest) < abs(rest - before))
    return np.sort(np.concatenate([np.tile(np.arange(len(lengths)), passes), order[:rest]]))
