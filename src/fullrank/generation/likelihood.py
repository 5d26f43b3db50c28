"""Likelihood of examples, stored or made up: summed token losses of each, for validation loss and for choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from fullrank.errors import DataError
from fullrank.models.rows import RowModel
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.loss import token_losses
from fullrank.sequences.store import Example, Examples


def answer_losses(
    model: PreTrainedModel, asked: Sequence[tuple[Sequence[int], Sequence[int]]], budget_tokens: int
) -> list[tuple[float, int]]:
    """(summed loss of the answer's tokens in nats, how many they are) of each (prompt ids, answer ids), in their order.

    What prompts and answers begin with alike is computed once, as in training.

    Args:
        model: in any mode; it is used in evaluation mode.
        asked: at least one id each.
        budget_tokens: most tokens of a row.

    Raises:
        DataError: a prompt and its answer are longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) + len(answer) for prompt, answer in asked), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a prompt and an answer to be compared take {longest} tokens, and the model's context is {context}",
            hint="shorten the prompt (or evaluate.base_instructions)",
        )
    examples = [
        Example(np.asarray([*prompt, *answer], np.int32), np.asarray([False] * len(prompt) + [True] * len(answer)))
        for prompt, answer in asked
    ]
    losses = sorted(example_losses(model, examples, budget_tokens))
    return [(loss, tokens) for _, loss, tokens in losses]


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
