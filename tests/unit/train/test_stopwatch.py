"""Seconds of modules: each its own, forward and backward, whatever they hold inside."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fullrank.parallel.recompute import recompute_blocks
from fullrank.train import stopwatch
from fullrank.train.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Work(torch.autograd.Function):
    """Takes known times."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Clock, forward: float, backward: float) -> torch.Tensor:
        clock.now += forward
        ctx.clock, ctx.backward_seconds = clock, backward
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        ctx.clock.now += ctx.backward_seconds
        return grad, None, None, None


class Leaf(nn.Module):
    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.told = (clock, forward, backward)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Work.apply(hidden_states, *self.told)
        return found


class Block(nn.Module):
    """Two leaves, one given its input by name, and work of its own between them; the input is added again."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first, self.second, self.own = Leaf(clock, 1, 2), Leaf(clock, 3, 5), (clock, 10, 20)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        between = Work.apply(self.first(hidden_states), *self.own)
        return hidden_states + self.second(hidden_states=between), None


class Model(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Block(clock) for _ in range(3)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.layers:
            hidden, _ = block(hidden)
        return hidden


def test_every_module_has_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    watch, model = Stopwatch(CPU), Model(clock)
    with watch.watching(model):
        with watch.phase("forward"):
            out = model(torch.tensor([1, 2]))
        with watch.phase("backward"):
            out.sum().backward()
    assert watch.phases == {"forward": 3 * (1 + 3 + 10), "backward": 3 * (2 + 5 + 20)}
    assert watch.forward == {"embed": 0, "layers.*.first": 3 * 1, "layers.*.second": 3 * 3, "layers.*": 3 * 10}
    assert {name: seconds for name, seconds in watch.backward.items() if seconds} == {
        "layers.*.first": 3 * 2,
        "layers.*.second": 3 * 5,
        "layers.*": 3 * 20,
    }
    assert watch.calls == {"embed": 1, "layers.*": 3, "layers.*.first": 3, "layers.*.second": 3}


def test_values_and_gradients_stay_what_they_are() -> None:
    watch, model = Stopwatch(CPU), nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with watch.watching(model), watch.phase("forward"):
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert watch.products == {"0": 6 * 5 * 12, "2": 6 * 5 * 8}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_whose_input_needs_no_gradient_ends_with_the_phase() -> None:
    watch, model = Stopwatch(CPU), nn.Embedding(5, 4)
    holder = nn.ModuleDict({"embed": model})
    with watch.watching(holder):
        with watch.phase("forward"):
            out = model(torch.tensor([1]))
        with watch.phase("backward"):
            out.sum().backward()
            time.sleep(0.01)
    assert watch.backward["embed"] >= 0.01


class InPlace(nn.Module):
    """Goes on to change what a module inside gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inside(x)
        out += x
        return out


def test_a_model_may_change_outputs_in_place() -> None:
    watch, model = Stopwatch(CPU), InPlace()
    x = torch.randn(5, 3)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with watch.watching(model), watch.phase("forward"):
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("how", "products"), [("none", 3), ("selective", 3), ("block", 4)])
def test_products_are_those_that_are_computed(how: str, products: int) -> None:
    model = tiny.model("llama").train()
    recompute_blocks(model, how)
    watch = Stopwatch(CPU, repeats_products=how != "selective")
    with watch.watching(model.base_model):
        with watch.phase("forward"):
            out = model.base_model(input_ids=torch.arange(10)[None], use_cache=False).last_hidden_state
        with watch.phase("backward"):
            out.sum().backward()
    weights = model.base_model.layers[0].mlp.up_proj.weight.numel()
    assert watch.products["layers.*.mlp.up_proj"] == 2 * products * 2 * 10 * weights  # two blocks
