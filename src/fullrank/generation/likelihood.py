"""Likelihood of stored examples: each example's summed token losses, for validation loss with intervals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from fullrank.models.rows import RowModel
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.loss import token_losses
from fullrank.sequences.store import Examples


@torch.no_grad()
def example_losses(model: PreTrainedModel, store: Examples, budget_tokens: int) -> Iterator[tuple[int, float, int]]:
    """(example, summed loss in nats, supervised tokens) of every example of a store, row by row.

    Args:
        model: in any mode; it is used in evaluation mode.
        store: the examples.
        budget_tokens: most tokens of a row.
    """
    rows = RowModel(model)
    was_training = model.training
    model.eval()
    try:
        for row in micro_batches(store, np.arange(len(store)), budget_tokens, packed=rows.packs, shared=rows.shares):
            with rows.ready():
                losses_S = token_losses(rows, row.to(model.device)).double().cpu()
            owners_P = row.owner_P.numpy()
            sums = np.bincount(owners_P, weights=losses_S[row.entry_P].numpy(), minlength=len(row.examples))
            counts = np.bincount(owners_P, minlength=len(row.examples))
            yield from zip(row.examples, sums.tolist(), counts.tolist(), strict=True)
    finally:
        model.train(was_training)
