"""Floating-point operations of the matrix products that a row needs: what a step's time is measured against.

A product of (m, k) by (k, n) is 2 m k n operations; a linear module's forward pass is one, its backward pass two of that size:

    linear      6 x weights x tokens                (in the last block those that predict something, but for keys and values)
    head        6 x vocabulary x width x positions that predict
    attention   12 x pairs x heads x head size      (scores and their sum over values, 4; backward twice that), a layer

with pairs the (query, key) pairs that attend: depth + 1 for each token, at most the window. Recomputation, masked scores, padding
and anything elementwise do not count: they are what the ratio is to show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fullrank.models.attention import windows_of
from fullrank.sequences.layout import MicroBatch

#: How configurations name the experts that a token visits.
_VISITED = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")


@dataclass(frozen=True)
class Products:
    """The matrix products of a model: the weights that tokens meet. A model without numbers (of the device `meta`) will do."""

    met_by_all: int
    """Weights of the blocks that every token is multiplied with; of experts, as many as a token visits."""
    met_by_predicting: int
    """Weights of the last block that only tokens which predict something are multiplied with."""
    head: int
    """Weights of the head, likewise."""
    attention_width: int
    """Heads x head size."""
    windows: tuple[int | None, ...]
    """Of each layer: see `fullrank.models.attention.windows_of`."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Products:
        """Counts them."""
        config = model.config.get_text_config()
        last = f".{config.num_hidden_layers - 1}."
        by_all = by_predicting = 0
        for name, module in model.base_model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                reads_all = name.endswith(("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"))
                weights, is_last = int(module.weight.numel()), last in f".{name}"
                by_predicting += weights if is_last and not reads_all else 0
                by_all += 0 if is_last and not reads_all else weights
        visited = next((n for n in (getattr(config, name, None) for name in _VISITED) if isinstance(n, int)), None)
        for name, parameter in model.base_model.named_parameters():
            if visited and parameter.ndim == 3 and parameter.shape[1] > 1:  # experts; a convolution by channel has 1
                weights, is_last = parameter.numel() * visited // parameter.shape[0], last in f".{name}"
                by_predicting += weights if is_last else 0
                by_all += 0 if is_last else weights
        heads = int(config.num_attention_heads)
        return cls(
            met_by_all=by_all,
            met_by_predicting=by_predicting,
            head=int(model.get_output_embeddings().weight.numel()),
            attention_width=heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            windows=tuple(windows_of(model.config)),
        )

    def in_blocks(self, batch: MicroBatch) -> int:
        """Operations of a row's forward and backward pass, the head's left out: what recomputation repeats a third of."""
        kept = int(torch.unique(batch.predicting_S).numel())
        pairs = {window: _pairs(batch, window) for window in set(self.windows)}
        attention = 12 * self.attention_width * sum(pairs[window] for window in self.windows)
        return 6 * (self.met_by_all * batch.tokens + self.met_by_predicting * kept) + attention

    def needed(self, batch: MicroBatch) -> int:
        """Operations of a row's forward and backward pass."""
        return self.in_blocks(batch) + 6 * self.head * int(torch.unique(batch.predicting_S).numel())


def _pairs(batch: MicroBatch, window: int | None) -> int:
    seen_T = batch.position_ids_1T[0] + 1
    return int((seen_T if window is None else seen_T.clamp(max=window)).sum())
