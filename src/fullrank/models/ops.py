"""The arithmetic of a transformer block with less memory traffic: the same functions of the same numbers, fewer passes over them.

A library's module keeps its weights; what is replaced is how its output and gradient are computed, and only where a trial on
random numbers shows that both are the module's own (`fullrank.models.tuned`).

    linear      the gradient of a weight is added to what is there inside the matrix product (BLAS's beta = 1): no second array of
                the weight's size is made and no second pass adds it
    rms_norm    y = x r w with r = (mean(x^2) + eps)^-1/2; kept for the backward pass: x and r. With g = dy w and H the width,
                dx = r (g - x r^2 sum(x g) / H), dw = sum over tokens of dy x r     (Zhang & Sennrich 2019, eq. 4, differentiated)
    gated       y = act(a) b, keeping a and b only; act is SiLU or the tanh form of GELU

Shape legend: N tokens, I inputs, O outputs, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Linear(torch.autograd.Function):
    """x_NI -> x_NI weight_OI^T + bias_O; adds the weight's gradient to `weight.grad` itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter, whose gradient is written to
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_NO, weight = grad.flatten(0, -2), ctx.weight
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if weight.requires_grad:
            x_NI = x.flatten(0, -2)
            if weight.grad is None:
                weight.grad = grad_NO.t() @ x_NI
            else:
                weight.grad.addmm_(grad_NO.t(), x_NI)
        return grad_x, None, grad_NO.sum(0) if ctx.needs_input_grad[2] else None


class Embedding(torch.autograd.Function):
    """ids -> rows of the weight; adds to the rows of `weight.grad` that were read, and touches no others.

    The row of `padding_idx` learns nothing from being read, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: nn.Parameter, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return weight.detach()[ids]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        weight, ids_N, grad_NH = ctx.weight, ids.flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:
            grad_NH = grad_NH.masked_fill((ids_N == ctx.padding_idx)[:, None], 0.0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids_N, grad_NH)
        return None, None, None


class RMSNorm(torch.autograd.Function):
    """Over the last axis; `offset` is added to the weight (Gemma writes 1 + w)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        scale = weight + offset if offset else weight
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        out: torch.Tensor = (x * r).mul_(scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        scale = weight + ctx.offset if ctx.offset else weight
        normed = x * r
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g = grad * scale
        along = torch.linalg.vecdot(g, normed).unsqueeze_(-1).div_(-x.shape[-1])
        return g.addcmul_(normed, along).mul_(r), grad_weight, None, None


class Gated(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _act(act, gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_up = _act(ctx.act, gate).mul_(grad)
        return _act_grad(ctx.act, grad * up, gate), grad_up, None


def _act(name: str, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(x) if name == "silu" else nn.functional.gelu(x, approximate="tanh")


def _act_grad(name: str, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    aten = torch.ops.aten
    found: torch.Tensor = aten.silu_backward(grad, x) if name == "silu" else aten.gelu_backward(grad, x, approximate="tanh")
    return found
