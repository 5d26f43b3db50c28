"""Floating-point operations of the matrix products that a row needs: what a step's time is measured against.

A product of (m, k) by (k, n) is 2 m k n operations; a linear module's forward pass is one, its backward pass two of that size:

    linear      6 x weights x tokens                (in the last block those that predict something, but for keys and values)
    head        6 x vocabulary x width x positions that predict
    attention   12 x pairs x heads x head size      (scores and their sum over values, 4; backward twice that), a layer

with pairs the (query, key) pairs that attend: depth + 1 for each token, at most the window. Recomputation, masked scores, padding
and anything elementwise do not count: they are what the ratio is to show.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fullrank.models.attention import windows_of
from fullrank.models.rows import RowModel
from fullrank.sequences.layout import MicroBatch

#: How configurations name the experts that a token visits.
_VISITED = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")


def needed_flops(rows: RowModel, batch: MicroBatch) -> int:
    """Operations of a row's forward and backward pass."""
    model, config = rows.model, rows.model.config.get_text_config()
    kept = int(torch.unique(batch.predicting_S).numel())
    last = f"{config.num_hidden_layers - 1}."
    head = model.get_output_embeddings()
    total = 6 * int(head.weight.numel()) * kept
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weights, is_last = int(module.weight.numel()), f".{last}" in f".{name}"
            reads_all = name.endswith(("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"))
            total += 6 * weights * (kept if is_last and not reads_all else batch.tokens)
    visited = next((n for n in (getattr(config, name, None) for name in _VISITED) if isinstance(n, int)), None)
    for name, parameter in model.base_model.named_parameters():
        if visited and parameter.ndim == 3 and parameter.shape[1] > 1:  # experts; a convolution by channel has 1
            share = visited / parameter.shape[0]
            total += int(6 * parameter.numel() * share * (kept if f".{last}" in f".{name}" else batch.tokens))
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return total + 12 * width * sum(_pairs(batch, window) for window in windows_of(model.config))


def _pairs(batch: MicroBatch, window: int | None) -> int:
    seen_T = batch.position_ids_1T[0] + 1
    return int((seen_T if window is None else seen_T.clamp(max=window)).sum())
