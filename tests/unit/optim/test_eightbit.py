"""Moments in 8 bits: the error that is promised, zeros, blocks apart from one another, and learning as with fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fullrank.optim.eightbit import BLOCK, CODES, Code, blocks
from fullrank.optim.update import Updater
from fullrank.recipe import AdamW


def there_and_back(code: Code, values: Tensor) -> Tensor:
    codes, scales = torch.empty(len(values), dtype=code.dtype), torch.empty(blocks(len(values)))
    code.encode(values.clone(), codes, scales)
    return code.decode(codes, scales)


def spread(elements: int) -> Tensor:
    """Numbers above zero over ten decades."""
    return 10.0 ** (torch.rand(elements) * 10 - 12)


def shares(values: Tensor) -> Tensor:
    """Of the block's largest magnitude."""
    largest = torch.cat([block.abs().amax().expand(len(block)) for block in values.split(BLOCK)])
    return values.abs() / largest


@pytest.mark.parametrize("elements", [BLOCK * 40, BLOCK * 40 + 17, 100])
def test_errors_are_within_what_is_said(elements: int) -> None:
    first = spread(elements) * torch.where(torch.rand(elements) < 0.5, -1.0, 1.0)
    s = shares(first)
    error = (there_and_back(CODES["exp_avg"], first) - first).abs() / (first.abs() / s)
    assert (error <= (s.sqrt() / 127 + 1 / 254**2) * 1.0001).all()
    second = spread(elements)
    s = shares(second)
    root_error = (there_and_back(CODES["exp_avg_sq"], second).sqrt() / second.sqrt() - 1).abs()
    told = 1 / (255 * s**0.25) + 1 / 510**2 / s.sqrt()
    assert (root_error <= told * 1.0001)[s > 255.0**-4].all()
    assert told.min() < 0.004 and root_error.max() > 0.1  # the bound is tight at the top, and something is far below it


def test_the_largest_is_kept_and_signs_too() -> None:
    values = torch.tensor([0.5, -3.0, 1e-3] + [0.0] * 253)
    back = there_and_back(CODES["exp_avg"], values)
    assert back[1].item() == pytest.approx(-3.0, rel=1e-6)
    assert back[0] > 0 and back[2] > 0


@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
def test_zero_stays_zero_and_blocks_do_not_meet(code: Code) -> None:
    values = torch.zeros(3 * BLOCK)
    assert torch.equal(there_and_back(code, values), values)
    values[BLOCK : 2 * BLOCK] = 1e6
    values[2 * BLOCK :: 2] = 1e-6
    back = there_and_back(code, values)
    assert torch.equal(back == 0, values == 0)
    assert torch.allclose(back, values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("small", [1e-20, 1e-13, 1e-44])
def test_a_second_moment_above_zero_is_never_zero(small: float) -> None:
    values = torch.full((BLOCK,), small)
    values[0] = 1.0
    back = there_and_back(CODES["exp_avg_sq"], values)
    assert (back[1:] > 0).all()
    assert back[1].item() == pytest.approx(255.0**-4, rel=1e-5)


def regression(moments: str) -> tuple[float, float]:
    """First loss and loss after 60 updates of a net of one hidden layer."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs, hidden, out = draw(512, 64), draw(64, 64) / 8, draw(64, 64) / 8
    targets = torch.tanh(inputs @ hidden) @ out
    weights = {"hidden": nn.Parameter(draw(64, 128) / 8), "out": nn.Parameter(draw(128, 64) / 11)}
    updater = Updater(weights, AdamW(moments=moments), rounding="none")
    losses = []
    for step in range(60):
        loss = (torch.tanh(inputs @ weights["hidden"]) @ weights["out"] - targets).square().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(weights.values()))
        updater.update(dict(zip(weights, gradients, strict=True)), learning_rate=3e-3, key=step)
    assert updater.tensors()["exp_avg"]["hidden"].dtype == (torch.int8 if moments == "int8" else torch.float32)
    return losses[0], losses[-1]


def test_it_learns_as_with_fp32() -> None:
    (first, full), (_, coded) = regression("fp32"), regression("int8")
    assert full < first / 10  # it has learned at all
    assert coded == pytest.approx(full, rel=0.03)
