"""Examples -> micro-batches: flat rows of several examples, without padding, under a token budget.

Each example in a row attends to itself only and its positions restart at 0; what examples begin with alike stands in their row
once (`fullrank.sequences.forest`). Layout decides how a step is computed, never which examples it holds: every example given
comes out exactly once, and every supervised token of it counts once, whatever the budget.

Shape legend: T tokens of the row, S distinct predictions of the row that carry loss, P supervised tokens of its examples (P >= S:
a prediction that several examples share is made once and counts for each).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fullrank.sequences.forest import LEAST_SHARED, Segment, grow, in_order, shared_prefix
from fullrank.sequences.store import Example, TokenStore

_Group = tuple[list[int], int]
"""Examples that stay together, or that make a row, by their number; and their tokens, what they share counted once."""

#: What a row more costs, in tokens: gradients of every weight are read and written once more.
_ROW_COST_TOKENS = 32


Stretch = tuple[int, int]
"""Tokens of a row from the first number up to, without, the second."""


@dataclass(frozen=True)
class Part:
    """Which tokens of a row a rank has, and what attention needs to know of the others' (`fullrank.sequences.parts`)."""

    rank: int
    """Within the group of ranks that share the row."""
    stretches: tuple[tuple[Stretch, ...], ...]
    """Of the row, by rank: its tokens in order."""
    below_W: torch.Tensor
    """For each token of the row: where the tokens end that continue it."""
    positions_W: torch.Tensor
    """Depth of each token of the row."""
    numbers_S: torch.Tensor
    """Which of the row's predictions are here, in order."""
    predictions: int
    """Of the row."""

    def tokens_of(self, rank: int) -> int:
        """How many tokens of the row a rank has."""
        return sum(end - start for start, end in self.stretches[rank])


@dataclass(frozen=True)
class MicroBatch:
    """One flat row, ready for a causal model; or what one of several ranks has of it."""

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    segments: tuple[Segment, ...]
    """What attends to what."""
    predicting_S: torch.Tensor
    """Row positions whose next-token prediction carries loss; one that examples continue differently stands here repeatedly."""
    targets_S: torch.Tensor
    """The token each of them must predict."""
    times_S: torch.Tensor
    """How many examples' supervised tokens each of them is."""
    entry_P: torch.Tensor
    """Number, within S, of the prediction that each supervised token is."""
    owner_P: torch.Tensor
    """Number, within `examples`, of the example that each supervised token belongs to."""
    examples: tuple[int, ...]
    """Positions of the examples in their store."""
    separate_tokens: int
    """Tokens the examples would take without sharing."""
    part: Part | None = None
    """Where only some tokens of the row are here; segments, examples and `separate_tokens` are then those of the whole row."""
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a model works out once for a row."""

    @property
    def tokens(self) -> int:
        return self.input_ids_1T.numel()

    @property
    def supervised_tokens(self) -> int:
        return self.owner_P.numel()

    def idle(self) -> MicroBatch:
        """The same row, which counts for nothing: its loss and its gradients are zeros. For a rank that has fewer rows than
        another, since ranks compute in step."""
        nothing = self.owner_P.new_empty(0)
        return replace(
            self,
            times_S=torch.zeros_like(self.times_S),
            entry_P=nothing,
            owner_P=nothing,
            examples=(),
            separate_tokens=0,
            memo={},
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same row on a device."""
        if device == self.input_ids_1T.device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, memo={}, **moved)


def needed_tokens(example: Example) -> int:
    """Tokens that a causal model must be given: those before the last supervised one, which is only predicted.

    0 where nothing is supervised that has a token before it.
    """
    supervised = np.flatnonzero(example.supervised)
    return int(supervised[-1]) if len(supervised) else 0


def micro_batches(
    store: TokenStore | Sequence[Example],
    examples: Sequence[int] | np.ndarray,
    budget_tokens: int,
    *,
    packed: bool,
    shared: bool = True,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Lays examples out into rows of at most `budget_tokens` (an example longer than that has a row of its own).

    Examples that begin alike come into one row as far as they fit, at the cuts that save most; what is left is spread by
    decreasing length over as few rows as first-fit decreasing needs (Johnson 1973: at most 11/9 of the fewest, plus one), evenly.
    Ties keep the given order, so the layout is a function of its arguments alone.

    Args:
        store: where the examples are.
        examples: positions in the store.
        budget_tokens: most tokens of a row.
        packed: False puts every example into a row of its own, for models that cannot keep packed examples apart.
        shared: False lays every token of every example out, for models that cannot share them.
        ranks: that the rows will be dealt to (`dealt`): as many rows for each, about equally long, as far as the examples allow.
    """
    whole = [(int(e), store[int(e)]) for e in examples]
    if not packed:
        return [row_of([one], shared=False) for one in whole]
    inputs = [example.ids[: needed_tokens(example)] for _, example in whole]

    def spread(budget: int) -> list[_Group]:
        groups = _alike(inputs, budget) if shared else [([n], len(ids)) for n, ids in enumerate(inputs)]
        return _spread(groups, budget, ranks)

    rows = spread(budget_tokens)
    if ranks > 1 and rows:
        longest, total = max(map(len, inputs)), sum(tokens for _, tokens in rows)
        # Even parts; and even parts of what comes after a beginning that all share, which each rank then has.
        smaller = {max(longest, -(-total // ranks)), longest + -(-(total - longest) // ranks)}
        tried = [spread(budget) for budget in sorted(smaller, reverse=True) if budget < budget_tokens]
        rows = min(rows, *tried, key=lambda some: _longest_hand(some, ranks)) if tried else rows
    return [row_of([whole[n] for n in members], shared=shared) for members, _ in rows]


def _longest_hand(rows: Sequence[_Group], ranks: int) -> int:
    """Tokens that the ranks take their time for, and what rows cost: of each round the longest row."""
    lengths = sorted((tokens + _ROW_COST_TOKENS for _, tokens in rows), reverse=True)
    return sum(lengths[::ranks])


def dealt(rows: Sequence[MicroBatch], ranks: int) -> list[list[MicroBatch]]:
    """The rows of each rank, as many for one as for another: rows of about equal length are computed at the same time.

    Rows are taken by decreasing length, `ranks` of them at a time, the longest for the rank that has least so far. Where rows run
    out, a rank gets the shortest one once more, idle (`MicroBatch.idle`).
    """
    rows = [row for row in rows if len(row.targets_S)]
    if ranks == 1:
        return [rows]
    by_length = sorted(rows, key=lambda row: -row.tokens)
    hands: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for start in range(0, len(by_length), ranks):
        takers = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for number, rank in enumerate(takers):
            row = by_length[start + number] if start + number < len(by_length) else by_length[-1].idle()
            hands[rank].append(row)
            load[rank] += row.tokens
    return hands


def _alike(inputs: Sequence[np.ndarray], budget_tokens: int) -> list[_Group]:
    """Groups of examples to be kept together, and the tokens of each group."""
    order = in_order(inputs)
    alike = [shared_prefix(inputs[a], inputs[b]) for a, b in itertools.pairwise(order)]
    alike = [length if length >= LEAST_SHARED else 0 for length in alike]
    groups: list[_Group] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or not alike[end - 1]:
            lengths = [len(inputs[n]) for n in order[start:end]]
            more = [lengths[0], *(length - same for length, same in zip(lengths[1:], alike[start : end - 1], strict=True))]
            for low, high in _cuts(lengths, more, budget_tokens):
                groups.append((order[start + low : start + high], lengths[low] + sum(more[low + 1 : high])))
            start = end
    return groups


def _cuts(lengths: Sequence[int], more: Sequence[int], budget_tokens: int) -> list[tuple[int, int]]:
    """Where a run of examples that share beginnings is cut into rows: least tokens in all, rows about equally long.

    Args:
        lengths: tokens of each example alone.
        more: tokens of each beyond what it shares with the one before.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # (cost of everything before, where its last row begins)
    for end in range(1, len(lengths) + 1):
        found = (float("inf"), 0)
        behind = 0
        for start in range(end - 1, -1, -1):
            tokens = lengths[start] + behind
            if tokens > budget_tokens and start < end - 1:
                break
            # Of two layouts alike in tokens, the more even one has the smaller sum of squares.
            cost = best[start][0] + tokens + _ROW_COST_TOKENS + tokens * tokens / (8 * budget_tokens)
            found = min(found, (cost, start))
            behind += more[start]
        best.append(found)
    cuts = []
    end = len(lengths)
    while end:
        start = best[end][1]
        cuts.append((start, end))
        end = start
    return cuts[::-1]


def _spread(groups: Sequence[_Group], budget_tokens: int, ranks: int) -> list[_Group]:
    """Groups -> rows: as few as first-fit decreasing needs, and then so many that each rank has one more or none; filled evenly
    where they then keep to the budget."""
    by_size = sorted(groups, key=lambda group: (-group[1], group[0]))
    fitted: list[list[int]] = []
    fitted_load: list[int] = []
    for members, tokens in by_size:
        row = next((n for n, load in enumerate(fitted_load) if load + tokens <= budget_tokens), None)
        if row is None:
            fitted.append(list(members))
            fitted_load.append(tokens)
        else:
            fitted[row] += members
            fitted_load[row] += tokens
    count = min(-(-len(fitted) // ranks) * ranks, len(groups))
    even: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for members, tokens in by_size:
        row = min(range(len(load)), key=load.__getitem__)
        even[row] += members
        load[row] += tokens
    longest = max((tokens for _, tokens in by_size), default=0)
    is_even = max(load, default=0) <= max(budget_tokens, longest)
    return list(zip(even, load, strict=True) if is_even else zip(fitted, fitted_load, strict=True))


def row_of(members: Sequence[tuple[int, Example]], *, shared: bool) -> MicroBatch:
    """Examples, with their positions in the store, as one row."""
    inputs = [example.ids[: needed_tokens(example)] for _, example in members]
    forest = grow(inputs, least_shared=LEAST_SHARED if shared else len(max(inputs, key=len, default=())) + 1)
    predicting, targets, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, ((_, example), path_T) in enumerate(zip(members, forest.paths, strict=True)):
        where = np.flatnonzero(example.supervised[1:])  # the token at where + 1 is predicted at where
        predicting.append(path_T[where])
        targets.append(example.ids[where + 1].astype(np.int64))
        owners.append(np.full(len(where), number))
    predictions_P2 = np.stack([np.concatenate(predicting), np.concatenate(targets)], axis=1)
    distinct_S2, entry_P, times_S = np.unique(predictions_P2, axis=0, return_inverse=True, return_counts=True)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64))

    return MicroBatch(
        input_ids_1T=tensor(forest.ids_T)[None],
        position_ids_1T=tensor(forest.positions_T)[None],
        segments=forest.segments,
        predicting_S=tensor(distinct_S2[:, 0]),
        targets_S=tensor(distinct_S2[:, 1]),
        times_S=tensor(times_S),
        entry_P=tensor(entry_P.reshape(-1)),
        owner_P=tensor(np.concatenate(owners)),
        examples=tuple(name for name, _ in members),
        separate_tokens=sum(map(len, inputs)),
    )
