"""AdamW as the recipe says: one update by hand, decay on matrices only."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn

from fullrank.optim.adamw import adamw
from fullrank.recipe import Optimizer


def test_two_updates_by_hand() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([[2.0]]))
    model.b = nn.Parameter(torch.tensor([2.0]))
    rate, decay, (b1, b2), eps = 0.1, 0.5, (0.9, 0.95), 1e-3
    optimizer = adamw(model, Optimizer(learning_rate=rate, weight_decay=decay, betas=(b1, b2), eps=eps))
    # Loshchilov & Hutter 2019, algorithm 2: decay apart from the gradient, moments corrected for their start at zero.
    w, b, m, v = 2.0, 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), start=1):
        model.w.grad, model.b.grad = torch.tensor([[gradient]]), torch.tensor([gradient])
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        move = rate * (m / (1 - b1**step)) / (math.sqrt(v / (1 - b2**step)) + eps)
        w, b = w * (1 - rate * decay) - move, b - move
    # fp32: two updates of numbers near 2 round at about 2e-7 each
    assert model.w.item() == pytest.approx(w, abs=1e-6)
    assert model.b.item() == pytest.approx(b, abs=1e-6)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = tiny.model("gpt2")
    groups = adamw(model, Optimizer(weight_decay=0.1)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    kept = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert kept == {id(p) for p in model.parameters() if p.ndim < 2}
    assert decayed and kept


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    assert [p.shape for group in adamw(model, Optimizer()).param_groups for p in group["params"]] == [(3, 3)]
