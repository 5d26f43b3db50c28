"""A row divided among the ranks of a context group: each computes some of its tokens, and the predictions that stand there.

A causal token sees what is before it, so that later tokens cost attention more. The row is cut into two stretches a rank, and
rank r of R has the r-th from the beginning and the r-th from the end: of one long example every rank then computes as many scores
as every other. Parts say which tokens are where; attention across them is `fullrank.parallel.ring`.

The loss law is as it was: every prediction of a row is in exactly one part, and counts there what it counted in the row.

Shape legend: W tokens of the whole row, T tokens of a part, S distinct predictions, P supervised tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fullrank.sequences.layout import MicroBatch, Part, Stretch


def stretches(tokens: int, ranks: int) -> tuple[tuple[Stretch, ...], ...]:
    """The stretches of a row that each rank has, by rank; none is empty where there are two tokens a rank."""
    cuts = [tokens * number // (2 * ranks) for number in range(2 * ranks + 1)]
    return tuple(((cuts[rank], cuts[rank + 1]), (cuts[2 * ranks - 1 - rank], cuts[2 * ranks - rank])) for rank in range(ranks))


def part_of(row: MicroBatch, ranks: int, rank: int) -> MicroBatch:
    """What one rank of a group computes of a row, in its own numbering.

    A row of fewer than two tokens a rank is filled up with tokens that nothing attends to and that count for nothing. A part
    without predictions makes one that counts for nothing, since all ranks of a group take every pass together.

    Args:
        row: whole, in memory of the CPU.
        ranks: of the group.
        rank: within it.
    """
    tokens = row.tokens
    filled = max(tokens, 2 * ranks) - tokens
    ids_W = torch.cat([row.input_ids_1T[0], row.input_ids_1T[0, :1].expand(filled)])
    positions_W = torch.cat([row.position_ids_1T[0], row.position_ids_1T.new_zeros(filled)])
    below_W = torch.arange(1, tokens + filled + 1)
    for segment in row.segments:
        below_W[segment.start : segment.end] = segment.below
    of_ranks = stretches(tokens + filled, ranks)
    own_T = torch.cat([torch.arange(*stretch) for stretch in of_ranks[rank]])
    place_W = torch.full_like(below_W, -1)
    place_W[own_T] = torch.arange(len(own_T))
    place_S = place_W[row.predicting_S]
    numbers_S = torch.nonzero(place_S >= 0)[:, 0]
    entry_S = torch.full_like(row.predicting_S, -1)
    entry_S[numbers_S] = torch.arange(len(numbers_S))
    entry_P = entry_S[row.entry_P]
    predicting_S, targets_S, times_S = place_S[numbers_S], row.targets_S[numbers_S], row.times_S[numbers_S]
    if not len(numbers_S):
        predicting_S, targets_S, times_S = torch.zeros(1, dtype=torch.int64), ids_W[own_T[:1]], torch.zeros(1, dtype=torch.int64)
    return replace(
        row,
        input_ids_1T=ids_W[own_T][None],
        position_ids_1T=positions_W[own_T][None],
        predicting_S=predicting_S,
        targets_S=targets_S,
        times_S=times_S,
        entry_P=entry_P[entry_P >= 0],
        owner_P=row.owner_P[entry_P >= 0],
        memo={},
        part=Part(rank, of_ranks, below_W, positions_W, numbers_S, len(row.predicting_S)),
    )
