"""Head and cross-entropy in chunks: loss and every gradient are those of torch on all logits at once, in float64."""

from __future__ import annotations

import pytest
import torch

from fullrank.sequences import head as heads
from fullrank.sequences.head import Head

S, H, V = 23, 12, 40


def made(
    *, bias: bool, scale: float, cap: float | None, dtype: torch.dtype
) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(V, H, generator=generator, dtype=dtype))
    bias_V = torch.nn.Parameter(torch.randn(V, generator=generator, dtype=dtype)) if bias else None
    hidden = torch.randn(S, H, generator=generator, dtype=dtype, requires_grad=True)
    shares = torch.rand(S, generator=generator, dtype=dtype)
    return Head(weight, bias_V, scale, cap), hidden, torch.randint(V, (S,), generator=generator), shares


def reference(head: Head, hidden: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and gradients of hidden states, weight and bias, by autograd in float64."""
    inputs = [some.detach().double().requires_grad_() for some in (hidden, head.weight_VH, head.bias_V) if some is not None]
    logits = torch.nn.functional.linear(*inputs) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * shares.double()).sum()
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("chunk", [1, 7, S, 1000])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 1.0, None), (False, 0.25, None), (True, 3.0, 2.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_loss_and_gradients(
    chunk: int, bias: bool, scale: float, cap: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    head, hidden, targets, shares = made(bias=bias, scale=scale, cap=cap, dtype=dtype)
    wanted = reference(head, hidden, targets, shares)
    parameters = [hidden, *(p for p in (head.weight_VH, head.bias_V) if p is not None)]

    loss = heads.weighted_loss(head, hidden, targets, shares, chunk)
    (3 * loss).backward()
    _close([loss, *(p.grad / 3 for p in parameters if p.grad is not None)], wanted, tolerance)

    for parameter in parameters:
        parameter.grad = None
    for times in (1, 2):  # gradients are added to what is there
        loss, grad = heads.add_gradients(head, hidden, targets, shares, chunk)
        _close([loss, grad, *(p.grad / times for p in parameters[1:] if p.grad is not None)], wanted, tolerance)

    losses = heads.token_losses(head, hidden.detach(), targets, chunk)
    assert float((losses * shares).sum()) == pytest.approx(float(wanted[0]), rel=1e-6)


def _close(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one.detach().double() - other).norm()) <= tolerance * float(other.norm())


def test_a_frozen_head_gets_no_gradient() -> None:
    head, hidden, targets, shares = made(bias=True, scale=1.0, cap=None, dtype=torch.float32)
    head.weight_VH.requires_grad_(False)
    heads.add_gradients(head, hidden, targets, shares)
    assert head.weight_VH.grad is None and head.bias_V is not None and head.bias_V.grad is not None


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made_logits = heads._logits

    def noting(hidden: torch.Tensor, *others: object) -> torch.Tensor:
        sizes.append(len(hidden))
        return made_logits(hidden, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(heads, "_logits", noting)
    monkeypatch.setattr(heads, "_CHUNK_BYTES", 16 * 4 * V)
    head, hidden, targets, shares = made(bias=False, scale=1.0, cap=None, dtype=torch.float32)
    heads.weighted_loss(head, hidden, targets, shares).backward()
    assert sizes == [16, 7]
