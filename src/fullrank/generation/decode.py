"""Greedy decoding in batches: prompts sorted by length, padded on the left, ended by any stop token.

Padding is masked by position. Answers come back in the order of the prompts, and say whether they ended by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answer:
    """What the model wrote after one prompt."""

    prompt: int
    """Number of the prompt."""
    ids: list[int]
    """Without the stop token."""
    stopped: bool
    """A stop token came before the limit."""


def greedy_arguments(stop_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """What makes transformers' `generate` greedy, whatever the model's own generation configuration says."""
    return {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_ids),
        "pad_token_id": stop_ids[0],
    }


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 32,
) -> Iterator[Answer]:
    """Answers to prompts, batch by batch (longest prompts first, so that memory trouble shows at once).

    Args:
        model: in any mode; it is used in evaluation mode.
        prompts: prompt ids, at least one each.
        stop_ids: ids that end an answer.
        max_new_tokens: longest answer.
        batch_size: prompts decoded together.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    try:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            width = max(len(prompts[n]) for n in numbers)
            ids_BT = torch.full((len(numbers), width), stop_ids[0])
            mask_BT = torch.zeros_like(ids_BT)
            for row, n in enumerate(numbers):
                ids_BT[row, width - len(prompts[n]) :] = torch.tensor(prompts[n])
                mask_BT[row, width - len(prompts[n]) :] = 1
            written_BN = model.generate(
                input_ids=ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                **greedy_arguments(stop_ids, max_new_tokens),
            )[:, width:]
            for n, row in zip(numbers, written_BN.tolist(), strict=True):
                end = next((position for position, token in enumerate(row) if token in stop_ids), None)
                yield Answer(n, row[:end], stopped=end is not None)
    finally:
        model.train(was_training)
