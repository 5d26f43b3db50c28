"""The loss law, in its one implementation.

    loss(step) = sum of token losses over the step's examples / number of supervised tokens in the step

Token losses are cross-entropies in fp32 whatever the compute type. A prediction that several examples share is made once and
counts once for each of them, so that what is summed does not depend on how examples share rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fullrank.sequences import head
from fullrank.sequences.head import Head
from fullrank.sequences.layout import MicroBatch

Watch = Callable[[str], contextlib.AbstractContextManager[object]]
"""Is entered around a part of a step, by the part's name: forward, head, backward or optimizer."""


def unwatched(_: str) -> contextlib.AbstractContextManager[object]:
    """The watch of a step that nobody times."""
    return contextlib.nullcontext()


class Predictor(Protocol):
    """A causal language model that takes rows of segments (`fullrank.models.rows.RowModel`)."""

    def predictions(self, batch: MicroBatch) -> tuple[torch.Tensor, Head | None]:
        """hidden_SH at the positions that predict, and the head; or logits_SV and None, where the head is no plain product."""


def token_losses(model: Predictor, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy of every distinct prediction of a row: losses_S, nats, fp32, without gradients.

    `batch.times_S` says how often each counts, `batch.entry_P` which one each supervised token is.
    """
    if not len(batch.targets_S):
        return batch.targets_S.new_zeros(0, dtype=torch.float32)
    with torch.no_grad():
        found, own_head = model.predictions(batch)
        if own_head is not None:
            return head.token_losses(own_head, found, batch.targets_S)
        return nn.functional.cross_entropy(found.float(), batch.targets_S, reduction="none")


def row_loss(model: Predictor, batch: MicroBatch, supervised_tokens_of_step: int) -> torch.Tensor:
    """A row's share of the step's loss: the rows of a step add up to the loss law, and so do their gradients."""
    found, own_head = model.predictions(batch)
    return _row_loss(found, own_head, batch, supervised_tokens_of_step)


def _row_loss(found: torch.Tensor, own_head: Head | None, batch: MicroBatch, supervised_tokens_of_step: int) -> torch.Tensor:
    shares_S = batch.times_S / supervised_tokens_of_step
    if own_head is not None:
        if own_head.summed is not None and batch.supervised_tokens == len(batch.targets_S):  # each counts once
            return head.summed_loss(own_head, found, batch.targets_S) / supervised_tokens_of_step
        return head.weighted_loss(own_head, found, batch.targets_S, shares_S)
    return (nn.functional.cross_entropy(found.float(), batch.targets_S, reduction="none") * shares_S).sum()


def add_gradients(model: Predictor, batch: MicroBatch, supervised_tokens_of_step: int, watch: Watch = unwatched) -> torch.Tensor:
    """`row_loss`, whose gradients are added to the parameters'."""
    with watch("forward"):
        found, own_head = model.predictions(batch)
    if own_head is None or own_head.summed is not None or torch.is_autocast_enabled(found.device.type):
        with watch("head"):
            loss = _row_loss(found, own_head, batch, supervised_tokens_of_step)
        with watch("backward"), torch.autocast(found.device.type, enabled=False):
            loss.backward()
        return loss.detach()
    with watch("head"):
        loss, grad_SH = head.add_gradients(own_head, found, batch.targets_S, batch.times_S / supervised_tokens_of_step)
    if found.requires_grad:  # not where the head alone is trained
        with watch("backward"):
            found.backward(grad_SH)
    return loss
