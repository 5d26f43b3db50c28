"""Examples -> micro-batches: flat rows of several examples, without padding, under a token budget.

Each example in a row attends to itself only and its positions restart at 0. Layout decides how a step is computed, never
which examples it holds: every example given comes out exactly once, whatever the budget.

Shape legend: T tokens of the row, S supervised tokens of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fullrank.sequences.store import Example, TokenStore


@dataclass(frozen=True)
class MicroBatch:
    """One flat row, ready for a causal model."""

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    predicting_S: torch.Tensor
    """Row positions whose next-token prediction carries loss."""
    targets_S: torch.Tensor
    """The token each of them must predict."""
    owner_S: torch.Tensor
    """Number, within `examples`, of the example that each supervised token belongs to."""
    examples: tuple[int, ...]
    """Positions of the examples in their store."""

    @property
    def tokens(self) -> int:
        return self.input_ids_1T.numel()

    @property
    def supervised_tokens(self) -> int:
        return self.targets_S.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same row on a device."""
        if device == self.input_ids_1T.device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def micro_batches(
    store: TokenStore, examples: Sequence[int] | np.ndarray, budget_tokens: int, *, packed: bool
) -> list[MicroBatch]:
    """Lays examples out into rows of at most `budget_tokens` (an example longer than that has a row of its own).

    First-fit decreasing (Johnson 1973: at most 11/9 of the fewest rows, plus one); ties keep the given order, so the layout is
    a function of its arguments alone.

    Args:
        store: where the examples are.
        examples: positions in the store.
        budget_tokens: most tokens of a row.
        packed: False puts every example into a row of its own, for models that cannot keep packed examples apart.
    """
    # Tokens after the last supervised one influence no loss of a causal model, so they are not computed.
    cut = {int(e): _needed(store[int(e)]) for e in examples}
    if not packed:
        return [_row([(int(e), cut[int(e)])]) for e in examples]
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted((int(e) for e in examples), key=lambda e: -len(cut[e].ids)):
        length = len(cut[example].ids)
        row = next((n for n, left in enumerate(room) if left >= length), None)
        if row is None:
            rows.append([example])
            room.append(budget_tokens - length)
        else:
            rows[row].append(example)
            room[row] -= length
    return [_row([(example, cut[example]) for example in row]) for row in rows]


def _needed(example: Example) -> Example:
    supervised = np.flatnonzero(example.supervised)
    end = int(supervised[-1]) + 1 if len(supervised) else len(example.ids)
    return Example(example.ids[:end], example.supervised[:end])


def _row(members: Iterable[tuple[int, Example]]) -> MicroBatch:
    ids, positions, predicting, targets, owners, names = [], [], [], [], [], []
    start = 0
    for number, (name, example) in enumerate(members):
        length = len(example.ids)
        where = np.flatnonzero(example.supervised[1:])  # the token at where + 1 is predicted at where
        ids.append(example.ids)
        positions.append(np.arange(length))
        predicting.append(where + start)
        targets.append(example.ids[where + 1])
        owners.append(np.full(len(where), number))
        names.append(name)
        start += length

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return MicroBatch(
        input_ids_1T=tensor(ids)[None],
        position_ids_1T=tensor(positions)[None],
        predicting_S=tensor(predicting),
        targets_S=tensor(targets),
        owner_S=tensor(owners),
        examples=tuple(names),
    )
