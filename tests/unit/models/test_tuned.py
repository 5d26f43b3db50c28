"""Tuned modules: the same outputs and gradients as the library's, added to what is there; what is another module stays."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fullrank.models.tuned import Tuned

IDS = torch.tensor([[5, 9, 12, 5, 319, 40, 7]])


def gradients(model: Any, tuned: Tuned | None, passes: int) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    for _ in range(passes):
        with contextlib.nullcontext() if tuned is None else tuned():
            logits = model(input_ids=IDS).logits
            (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_the_librarys(family: str, passes: int) -> None:
    model = tiny.model(family)
    exact = copy.deepcopy(model)
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # grouped products have no float64
    wanted = gradients(exact.double(), None, passes)
    found = gradients(model, Tuned(model), passes)
    assert found.keys() == wanted.keys()
    everything = float(torch.stack([grad.norm() for grad in wanted.values()]).norm())
    for name, grad in wanted.items():
        distance = float((found[name].double() - grad).norm())
        assert distance <= 1e-5 * max(float(grad.norm()), 1e-3 * everything), name  # as in the laws


def test_what_is_replaced() -> None:
    assert Tuned(tiny.model("llama")).replaced == {"embedding": 1, "linear": 15, "norm": 5, "gated": 2}
    assert Tuned(tiny.model("gemma3")).replaced["norm"] == 13, "1 + w is found by trial"
    assert "gated" not in Tuned(tiny.model("gpt2")).replaced


def test_outside_the_modules_are_what_they_were() -> None:
    model = tiny.model("llama")
    tuned = Tuned(model)
    with tuned():
        assert all("forward" in module.__dict__ for module in model.modules() if isinstance(module, nn.Linear))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_module_that_only_looks_like_one_stays() -> None:
    class SquaredRMSNorm(nn.Module):
        """Named like the others, and something else."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) ** 2

    class Mixed(nn.Module):
        """A gated block with its halves exchanged."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]

    assert Tuned(nn.Sequential(SquaredRMSNorm(), Mixed())).replaced == {"linear": 3}


def test_frozen_parameters_get_no_gradient() -> None:
    model = tiny.model("llama")
    frozen = [model.model.embed_tokens.weight, model.model.layers[0].mlp.up_proj.weight, model.model.norm.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    gradients(model, Tuned(model), 1)
    assert all(parameter.grad is None for parameter in frozen)
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None
