"""A normalised record -> the examples that are trained on, none longer than allowed.

Long raw text is cut by a sliding window: each chunk begins with the end of the chunk before it as context, without loss, so that
every token is learned once and none but the first without something before it. Two records never share a chunk. Conversations and
pairs are not cut into pieces: what follows an answer's beginning cannot be learned without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.errors import DataError
from fullrank.sequences.chat import Tokens


@dataclass(frozen=True)
class Limit:
    """How long an example may be, and what happens to a longer one."""

    tokens: int
    reason: str
    """Where the limit comes from, for messages: `data.max_length is 2048`."""
    too_long: Literal["error", "drop", "truncate", "chunk"]
    overlap_ratio: float
    """Share of a chunk that repeats the chunk before it."""


@dataclass(frozen=True)
class Fitted:
    """What became of a record's examples."""

    examples: list[Tokens]
    truncated: int
    """Examples whose end was cut off."""
    dropped: int
    """Examples left out because they are too long."""
    chunked: bool


def fit(examples: Sequence[Tokens], limit: Limit, *, is_document: bool) -> Fitted:
    """The examples within the limit.

    Raises:
        DataError: an example is too long and the recipe says that this is an error, or nothing supervised is left of it.
    """
    kept: list[Tokens] = []
    truncated = dropped = 0
    chunked = False
    for tokens in examples:
        length = len(tokens.ids)
        if length <= limit.tokens:
            kept.append(_supervised(tokens, None))
        elif limit.too_long == "drop":
            dropped += 1
        elif limit.too_long == "truncate":
            truncated += 1
            kept.append(_supervised(Tokens(tokens.ids[: limit.tokens], tokens.supervised[: limit.tokens]), limit.tokens))
        elif limit.too_long == "chunk" and is_document:
            chunked = True
            kept += chunks(tokens, limit.tokens, limit.overlap_ratio)
        else:
            reason = "only raw text can be chunked" if limit.too_long == "chunk" else "data.too_long is error"
            raise DataError(f"{length} tokens, {limit.reason} and {reason}")
    return Fitted(kept, truncated, dropped, chunked)


def _supervised(tokens: Tokens, cut_after: int | None) -> Tokens:
    if tokens.supervised_targets() == 0:
        cut = f": the answer begins after token {cut_after}" if cut_after else ""
        raise DataError(f"no supervised token is left{cut}")
    return tokens


def chunks(tokens: Tokens, most: int, overlap_ratio: float) -> list[Tokens]:
    """A long text in chunks of at most `most` tokens, each token supervised in one of them.

    Args:
        overlap_ratio: share of a chunk that repeats the chunk before it; at least one token, from which the first new one is
            predicted.
    """
    overlap = min(max(1, int(overlap_ratio * most)), most - 1)
    pieces = [Tokens(tokens.ids[:most], tokens.supervised[:most])]
    start = most - overlap
    while start + overlap < len(tokens.ids):
        end = start + most
        supervised = [False] * overlap + tokens.supervised[start + overlap : end]
        pieces.append(Tokens(tokens.ids[start:end], supervised))
        start = end - overlap
    return pieces
