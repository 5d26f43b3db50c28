"""The rules against torch's own classes, bit by bit, and against loops written from the papers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fullrank import recipe
from fullrank.optim.rules import Rule, rule_for

SHAPES = [(48, 80), (7, 5), (33,), (1,), (3, 12, 20)]
DECAY, RATE = 0.1, 0.01


def gradients(shape: Sequence[int], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 1)


def ours(rule: Rule, start: Tensor, steps: int, weight_decay: float = DECAY) -> Tensor:
    weight = start.clone()
    slots = {name: torch.zeros(shape) for name, shape in rule.slots(start.shape).items()}
    for step in range(1, steps + 1):
        rule.update_(weight, gradients(start.shape, step), slots, step=step, learning_rate=RATE / step, weight_decay=weight_decay)
    return weight


def torchs(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], start: Tensor, steps: int) -> Tensor:
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    for step in range(1, steps + 1):
        p.grad = gradients(start.shape, step)
        optimizer.param_groups[0]["lr"] = RATE / step
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_is_torchs_fused_kernel(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    rule = rule_for(recipe.AdamW(betas=(0.8, 0.97), eps=1e-6), shape, hidden=False)
    expected = torchs(lambda p: torch.optim.AdamW(p, betas=(0.8, 0.97), eps=1e-6, weight_decay=DECAY, fused=True), start, steps=6)
    assert torch.equal(ours(rule, start, steps=6), expected)


def test_two_updates_of_adamw_by_hand() -> None:
    rate, decay, (b1, b2), eps = 0.1, 0.5, (0.9, 0.95), 1e-3
    rule = rule_for(recipe.AdamW(betas=(b1, b2), eps=eps), (1,), hidden=False)
    weight, slots = torch.tensor([2.0]), {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    # Loshchilov & Hutter 2019, algorithm 2: decay apart from the gradient, moments corrected for their start at zero.
    w, m, v = 2.0, 0.0, 0.0
    for step, g in enumerate((3.0, -1.0), start=1):
        rule.update_(weight, torch.tensor([g]), slots, step=step, learning_rate=rate, weight_decay=decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w * (1 - rate * decay) - rate * (m / (1 - b1**step)) / (math.sqrt(v / (1 - b2**step)) + eps)
    # fp32: two updates of numbers near 2 round at about 2e-7 each
    assert weight.item() == pytest.approx(w, abs=1e-6)


def test_adamw_on_stretches_is_adamw_on_the_whole() -> None:
    rule = rule_for(recipe.AdamW(), (1000,), hidden=False)
    start, grad = torch.randn(1000), torch.randn(1000)
    whole, apart = start.clone(), start.clone()
    rule.update_(whole, grad, {s: torch.zeros(1000) for s in rule.slots((1000,))}, step=3, learning_rate=RATE, weight_decay=DECAY)
    for part in (slice(0, 64), slice(64, 512), slice(512, 1000)):
        slots = {s: torch.zeros_like(apart[part]) for s in rule.slots((1000,))}
        rule.update_(apart[part], grad[part], slots, step=3, learning_rate=RATE, weight_decay=DECAY)
    assert rule.elementwise
    assert torch.equal(whole, apart)


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_torchs(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    rule = rule_for(recipe.Adafactor(name="adafactor"), shape, hidden=False)
    expected = torchs(lambda p: torch.optim.Adafactor(p, weight_decay=DECAY), start, steps=6)
    assert torch.equal(ours(rule, start, steps=6), expected)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (7, 5)])
def test_muon_is_torchs_with_adamws_rates(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape)
    rule = rule_for(recipe.Muon(name="muon", momentum=0.9), shape, hidden=True)
    expected = torchs(
        lambda p: torch.optim.Muon(p, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"), start, steps=4
    )
    assert torch.equal(ours(rule, start, steps=4), expected)


def test_muon_takes_a_stack_matrix_by_matrix() -> None:
    rule = rule_for(recipe.Muon(name="muon"), (3, 12, 20), hidden=True)
    start, grad = torch.randn(3, 12, 20), torch.randn(3, 12, 20)
    stack = start.clone()
    rule.update_(stack, grad, {"momentum": torch.zeros(3, 12, 20)}, step=1, learning_rate=RATE, weight_decay=DECAY)
    for before, g, after in zip(start, grad, stack, strict=True):
        rule.update_(before, g, {"momentum": torch.zeros(12, 20)}, step=1, learning_rate=RATE, weight_decay=DECAY)
        assert torch.equal(before, after)


@pytest.mark.parametrize(("shape", "hidden"), [((8, 8), False), ((8,), True)])
def test_muon_leaves_embeddings_and_vectors_to_adamw(shape: tuple[int, ...], hidden: bool) -> None:
    muon = rule_for(recipe.Muon(name="muon", betas=(0.8, 0.9), eps=1e-5), shape, hidden=hidden)
    assert muon == rule_for(recipe.AdamW(betas=(0.8, 0.9), eps=1e-5), shape, hidden=False)


def test_lomo_by_hand() -> None:
    start, weight = torch.randn(5, 4), torch.empty(0)
    rule = rule_for(recipe.Lomo(name="lomo"), (5, 4), hidden=True)
    weight, expected = ours(rule, start, steps=3), start.double()
    for step in (1, 2, 3):
        expected = expected * (1 - RATE / step * DECAY) - RATE / step * gradients((5, 4), step).double()
    assert rule.slots((5, 4)) == {}
    assert torch.allclose(weight.double(), expected, rtol=1e-6, atol=1e-7)  # fp32: three updates of numbers near 1


@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["weights", "small weights, the rate's floor"])
@pytest.mark.parametrize("shape", [(6, 4), (5,)])
def test_adalomo_as_in_the_paper(shape: tuple[int, ...], scale: float) -> None:
    start = torch.randn(shape) * scale
    w = start.tolist()
    row, column, v = [0.0] * shape[0], [0.0] * shape[-1], [0.0] * shape[0]
    rms = lambda numbers: math.sqrt(sum(x * x for x in numbers) / len(numbers))  # noqa: E731
    for t in range(1, 5):  # Lv et al. 2024, algorithm 1, in float64 numbers, one at a time
        g, beta2, rate = gradients(shape, t).tolist(), 1 - t**-0.8, RATE / t
        if len(shape) == 1:
            v = [beta2 * old + (1 - beta2) * (x * x + 1e-30) for old, x in zip(v, g, strict=True)]
            u = [x / math.sqrt(y) for x, y in zip(g, v, strict=True)]
            bound, rate = max(1.0, rms(u)), rate * max(1e-3, rms(w))
            w = [x * (1 - rate * DECAY) - rate * y / bound for x, y in zip(w, u, strict=True)]
            continue
        squares = [[x * x + 1e-30 for x in line] for line in g]
        row = [beta2 * old + (1 - beta2) * sum(line) / shape[1] for old, line in zip(row, squares, strict=True)]
        column = [
            beta2 * old + (1 - beta2) * sum(c) / shape[0] for old, c in zip(column, zip(*squares, strict=True), strict=True)
        ]
        mean = sum(row) / shape[0]
        flat = [g[i][j] / math.sqrt(row[i] / mean * column[j]) for i in range(shape[0]) for j in range(shape[1])]
        bound, rate = max(1.0, rms(flat)), rate * max(1e-3, rms([x for line in w for x in line]))
        w = [
            [w[i][j] * (1 - rate * DECAY) - rate * flat[i * shape[1] + j] / bound for j in range(shape[1])]
            for i in range(shape[0])
        ]
    rule = rule_for(recipe.AdaLomo(name="adalomo"), shape, hidden=True)
    moved = (ours(rule, start, steps=4) - start).double()
    expected = torch.tensor(w, dtype=torch.float64) - start.double()
    # fp32: sums of a few numbers, and weights that round at 6e-8 of themselves in each of four updates
    assert torch.allclose(moved, expected, rtol=2e-5, atol=4e-7 * scale)


def test_adalomo_takes_an_experts_gradient_of_zeros() -> None:
    rule = rule_for(recipe.AdaLomo(name="adalomo"), (4, 3), hidden=True)
    weight = torch.ones(4, 3)
    slots = {name: torch.zeros(shape) for name, shape in rule.slots((4, 3)).items()}
    rule.update_(weight, torch.zeros(4, 3), slots, step=1, learning_rate=RATE, weight_decay=0.0)
    assert torch.equal(weight, torch.ones(4, 3))
