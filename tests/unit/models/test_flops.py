"""The operations a row needs, against torch's own count of what a plain model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from fullrank.models.flops import Products
from fullrank.sequences.layout import row_of
from fullrank.sequences.store import Example

T = 21
WIDTH = 4 * 8
"""Heads x head size of the tiny models."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "phi"])
def test_products_are_those_that_torch_counts(tmp_path: Path, family: str) -> None:
    model = tiny.model(family)
    model.set_attn_implementation("eager")
    ids = np.arange(T + 1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.from_numpy(ids[None, :-1])).logits.sum().backward()
    # torch counts every score of T x T; a causal model, its window aside, needs those of the lower triangle.
    counted = counter.get_total_flops() - 2 * 12 * WIDTH * T * T
    # Some versions of transformers make the rotary angles by a product of matrices, others by one of elements.
    counted -= sum(sum(of.values()) for name, of in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    batch = row_of([(0, Example(ids, np.ones(T + 1, np.bool_)))], shared=True)
    windows = {"gemma3": (tiny.WINDOW, T)}.get(family, (T, T))
    pairs = sum(min(n + 1, window) for window in windows for n in range(T))
    assert Products.of(model).needed(batch) == counted + 12 * WIDTH * pairs


def test_what_is_shared_or_predicts_nothing_is_not_counted() -> None:
    model = tiny.model("llama")
    products = Products.of(model)
    prompt = np.arange(12)
    examples = [Example(np.concatenate([prompt, [20 + n, 30]]), np.arange(14) == 13) for n in range(2)]
    apart = products.needed(row_of(list(enumerate(examples)), shared=False))
    together = products.needed(row_of(list(enumerate(examples)), shared=True))
    block = sum(p.numel() for name, p in model.model.layers[0].named_parameters() if p.ndim == 2)
    keys_and_values = 2 * 16 * 32
    saved = 6 * 12 * (block + keys_and_values) + 12 * WIDTH * 2 * sum(range(1, 13))  # of the first block, and of the last
    assert apart - together == saved
