"""How far one model's predictions are from another's on the same texts: forward KL, token by token.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        nats (Kullback & Leibler 1951)

p is the first model's distribution of the next token, q the second's, at the same place of the same text. The models need not be
in memory together: of the first one its last hidden states at the places that count are kept and its head, which are its
distributions exactly, in a few thousand numbers a place where the distributions themselves would take as many as the vocabulary.
A second model with further tokens may put weight on these; p has none there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fullrank.errors import ModelError
from fullrank.models.rows import RowModel
from fullrank.sequences.head import Head, chunk_size
from fullrank.sequences.layout import MicroBatch, micro_batches
from fullrank.sequences.store import Examples


@dataclass(frozen=True)
class Moved:
    """An example under both models; sums over its supervised tokens."""

    example: int
    tokens: int
    kl: float
    """Of the first model's distributions from the second's, nats."""
    loss_before: float
    """Of the first model, nats."""
    loss_after: float


class Remembered:
    """A model's predictions on a store, kept while another model takes its place in memory.

    Args:
        model: in any mode; it is used in evaluation mode.
        store: the texts; what counts of them is their supervised tokens.
        budget_tokens: most tokens of a row.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, store: Examples, budget_tokens: int) -> None:
        self._store, self._budget = store, budget_tokens
        self._states: dict[int, torch.Tensor] = {}
        """By example: hidden states [P, H] of the P places that predict a supervised token, or logits [P, V] without a head."""
        self._head: Head | None = None
        for row, found_SX, head in _predictions(model, store, budget_tokens):
            if head is not None and self._head is None:
                bias_V = None if head.bias_V is None else nn.Parameter(head.bias_V.detach().cpu().clone(), requires_grad=False)
                weight_VH = nn.Parameter(head.weight_VH.detach().cpu().clone(), requires_grad=False)
                self._head = head._replace(weight_VH=weight_VH, bias_V=bias_V, summed=None)
            found_PX = found_SX.cpu()[row.entry_P.cpu()]
            for place, example in enumerate(row.examples):
                self._states[example] = found_PX[row.owner_P.cpu() == place].clone()

    @torch.no_grad()
    def against(self, model: PreTrainedModel) -> Iterator[Moved]:
        """Every example of the store under the model remembered and under this one, as rows have them.

        Raises:
            ModelError: this model knows fewer tokens.
        """
        for row, found_SX, head in _predictions(model, self._store, self._budget):
            entry_P, owner_P = row.entry_P.cpu(), row.owner_P.cpu()
            found_PX, targets_P = found_SX[entry_P.to(found_SX.device)], row.targets_S.cpu()[entry_P]
            for place, example in enumerate(row.examples):
                own = owner_P == place
                yield self._moved(example, found_PX[own.to(found_PX.device)], head, targets_P[own])

    def _moved(self, example: int, after_PX: torch.Tensor, head: Head | None, targets_P: torch.Tensor) -> Moved:
        before_PX = self._states[example].to(after_PX.device)
        own_head = self._head if self._head is None else _on(self._head, after_PX.device)
        vocabulary = len(own_head.weight_VH) if own_head is not None else before_PX.shape[1]
        sums = torch.zeros(3, dtype=torch.float64)
        step = chunk_size(2 * vocabulary)
        for low in range(0, len(targets_P), step):
            p_CV = _log_probabilities(before_PX[low : low + step], own_head)
            q_CV = _log_probabilities(after_PX[low : low + step], head)
            if q_CV.shape[1] < p_CV.shape[1]:
                raise ModelError(
                    f"this model knows {q_CV.shape[1]:,} tokens, and the one it is compared with {p_CV.shape[1]:,}: its "
                    "distributions have no divergence from the other's"
                )
            q_CV = q_CV[:, : p_CV.shape[1]]
            targets_C1 = targets_P[low : low + step, None].to(p_CV.device)
            kl_C = (p_CV.exp() * (p_CV - q_CV)).sum(1)
            losses = (-p_CV.gather(1, targets_C1), -q_CV.gather(1, targets_C1))
            sums += torch.stack([some.double().sum() for some in (kl_C, *losses)]).cpu()
        kl, before, after = sums.tolist()
        return Moved(example, len(targets_P), kl, before, after)


def _predictions(
    model: PreTrainedModel, store: Examples, budget_tokens: int
) -> Iterator[tuple[MicroBatch, torch.Tensor, Head | None]]:
    """(row, hidden states or logits of its distinct predictions, the head)."""
    rows = RowModel(model)
    was_training = model.training
    model.eval()
    try:
        for row in micro_batches(store, np.arange(len(store)), budget_tokens, packed=rows.packs, shared=rows.shares):
            if not len(row.targets_S):
                continue
            with rows.ready():
                found, head = rows.predictions(row.to(model.device))
            yield row, found, head
    finally:
        model.train(was_training)


def _on(head: Head, device: torch.device) -> Head:
    if head.weight_VH.device == device:
        return head
    bias_V = None if head.bias_V is None else nn.Parameter(head.bias_V.to(device), requires_grad=False)
    return head._replace(weight_VH=nn.Parameter(head.weight_VH.to(device), requires_grad=False), bias_V=bias_V)


def _log_probabilities(found_CX: torch.Tensor, head: Head | None) -> torch.Tensor:
    """log p_CV, fp32 or float64."""
    logits_CV = found_CX if head is None else head.logits(found_CX)
    return (logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()).log_softmax(1)
