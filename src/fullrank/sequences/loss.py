"""The loss law, in its one implementation.

    loss(step) = sum of token losses over the step's examples / number of supervised tokens in the step

Token losses are cross-entropies in fp32 whatever the compute type. Logits are made at supervised positions only, by the
model's own head (softcaps, biases and ties included), so what is summed does not depend on how examples share rows.
"""

from __future__ import annotations

import torch
from torch import nn

from fullrank.sequences.layout import MicroBatch


def token_losses(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy of every supervised token of a row: losses_S, nats, fp32.

    Args:
        model: a transformers causal language model; with no 2-D mask and no cache it keeps apart examples whose positions
            restart, sliding windows included.
        batch: a row on the model's device.
    """
    if batch.supervised_tokens == 0:
        return batch.targets_S.new_zeros(0, dtype=torch.float32)
    output = model(
        input_ids=batch.input_ids_1T,
        position_ids=batch.position_ids_1T,
        use_cache=False,
        logits_to_keep=batch.predicting_S,
    )
    logits_SV = output.logits[0]
    if logits_SV.shape[0] != batch.supervised_tokens:  # a model that has no logits_to_keep
        logits_SV = logits_SV[batch.predicting_S]
    return nn.functional.cross_entropy(logits_SV.float(), batch.targets_S, reduction="none")


def row_loss(model: nn.Module, batch: MicroBatch, supervised_tokens_of_step: int) -> torch.Tensor:
    """A row's share of the step's loss: the rows of a step add up to the loss law, and so do their gradients."""
    return token_losses(model, batch).sum() / supervised_tokens_of_step
