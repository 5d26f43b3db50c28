"""Language-model head and cross-entropy in one: logits exist for a chunk of supervised positions at a time, never for all.

A chunk's logits are made, turned into its losses and, where gradients are wanted, at once into the gradients of hidden states and
weight; nothing of size (S, V) is kept, and no product is done twice. With p = softmax(z) and c the cap,

    z = scale (h W^T + b),    z~ = c tanh(z / c),    loss = sum_s share_s (log sum_v exp z~_sv - z~_s,target)
    d loss / d z_sv = share_s (p_sv - [v = target]) (1 - (z~_sv / c)^2)

Cross-entropies are computed in fp32 whatever the compute type.

Shape legend: S predictions, H width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

#: Bytes of the logits that exist at once.
_CHUNK_BYTES = 64 << 20


SummedLoss = Callable[..., torch.Tensor]
"""(hidden_SH, targets_S, weight_VH, bias_V where there is one) -> sum of the cross-entropies, with gradients."""


class Head(NamedTuple):
    """What turns hidden states into logits."""

    weight_VH: nn.Parameter
    bias_V: nn.Parameter | None
    scale: float
    """Factor on the logits (Cohere, Granite)."""
    cap: float | None
    """Soft cap on the logits (Gemma 2)."""
    summed: SummedLoss | None = None
    """A library's sum of the losses, where one is faster (`fullrank.sequences.fused`)."""

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """logits_SV, fp32."""
        return _logits(hidden_SH, self.weight_VH, self.bias_V, self.scale, self.cap)


def _logits(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, scale: float, cap: float | None
) -> torch.Tensor:
    logits_SV = nn.functional.linear(hidden_SH, weight_VH, bias_V)
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    if scale != 1.0:
        logits_SV = logits_SV * scale
    return logits_SV if cap is None else torch.tanh(logits_SV / cap).mul_(cap)


def chunk_size(vocabulary: int) -> int:
    """Predictions whose logits are made at once."""
    return max(16, _CHUNK_BYTES // (4 * vocabulary))


def token_losses(head: Head, hidden_SH: torch.Tensor, targets_S: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """losses_S, nats, without gradients."""
    chunk = chunk or chunk_size(len(head.weight_VH))
    parts = [hidden_SH.new_zeros(0, dtype=torch.float32)]
    with torch.no_grad():
        for low in range(0, len(targets_S), chunk):
            logits_CV = head.logits(hidden_SH[low : low + chunk])
            parts.append(nn.functional.cross_entropy(logits_CV, targets_S[low : low + chunk], reduction="none"))
    return torch.cat(parts)


def weighted_loss(
    head: Head, hidden_SH: torch.Tensor, targets_S: torch.Tensor, shares_S: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """sum_s share_s loss_s, a number in fp32 with gradients.

    Args:
        head: of the model.
        hidden_SH: after the last norm.
        targets_S: the token each must predict.
        shares_S: weight of each loss.
        chunk: predictions whose logits are made at once; by default what fits into 64 MB.
    """
    loss: torch.Tensor = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_SH, head.weight_VH, head.bias_V, targets_S, shares_S, head, chunk
    )
    return loss


def summed_loss(head: Head, hidden_SH: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Sum of the losses by the head's library."""
    assert head.summed is not None
    kind = hidden_SH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_SH.dtype
    parameters = [p.to(dtype) for p in (head.weight_VH, head.bias_V) if p is not None]
    with torch.autocast(kind, enabled=False):
        return head.summed(hidden_SH.to(dtype), targets_S, *parameters).float()


def add_gradients(
    head: Head, hidden_SH: torch.Tensor, targets_S: torch.Tensor, shares_S: torch.Tensor, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weighted_loss` and its gradient with respect to the hidden states; the head's own are added to its parameters'.

    Nothing of the weight's size is made for it.
    """
    wanted = [p for p in (head.weight_VH, head.bias_V) if p is not None and p.requires_grad]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad if p is not None and p.requires_grad else None for p in (head.weight_VH, head.bias_V)]
    grad_hidden = torch.empty_like(hidden_SH)
    with torch.no_grad():
        loss = _chunks(head, hidden_SH.detach(), targets_S, shares_S, chunk, grad_hidden, grads[0], grads[1])
    return loss, grad_hidden


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        shares_S: torch.Tensor,
        head: Head,
        chunk: int | None,
    ) -> torch.Tensor:
        kind = hidden_SH.device.type
        given = hidden_SH.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden_SH
        wanted = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(given) if wanted[0] else None
        grad_weight = torch.zeros_like(weight_VH) if wanted[1] else None
        grad_bias = torch.zeros_like(bias_V) if wanted[2] and bias_V is not None else None
        with torch.autocast(kind, enabled=False):
            loss = _chunks(head, given, targets_S, shares_S, chunk, grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden_SH.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (None if some is None else some.mul_(grad.to(some.dtype)) for some in ctx.saved_tensors)
        return None if hidden is None else hidden.to(ctx.dtype), weight, bias, None, None, None, None


def _chunks(
    head: Head,
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    shares_S: torch.Tensor,
    chunk: int | None,
    grad_hidden_SH: torch.Tensor | None,
    grad_weight_VH: torch.Tensor | None,
    grad_bias_V: torch.Tensor | None,
) -> torch.Tensor:
    """The loss; the gradient of the hidden states is written, those of weight and bias are added."""
    chunk = chunk or chunk_size(len(head.weight_VH))
    full = torch.float64 if hidden_SH.dtype == torch.float64 else torch.float32
    wanted = any(some is not None for some in (grad_hidden_SH, grad_weight_VH, grad_bias_V))
    weight = head.weight_VH.to(hidden_SH.dtype)
    bias = None if head.bias_V is None else head.bias_V.to(hidden_SH.dtype)
    shares_S = shares_S.to(full)
    loss = torch.zeros((), dtype=full, device=hidden_SH.device)
    for low in range(0, len(targets_S), chunk):
        hidden_CH = hidden_SH[low : low + chunk]
        targets_C1, shares_C1 = (some[low : low + chunk, None] for some in (targets_S, shares_S))
        logits_CV = _logits(hidden_CH, weight, bias, head.scale, head.cap)
        slope = None if head.cap is None or not wanted else 1 - (logits_CV / head.cap).square_()
        lse_C1 = logits_CV.logsumexp(1, keepdim=True)
        loss += ((lse_C1 - logits_CV.gather(1, targets_C1)) * shares_C1).sum()
        if not wanted:
            continue
        grad_CV = logits_CV.sub_(lse_C1).exp_()
        grad_CV.scatter_add_(1, targets_C1, -torch.ones_like(lse_C1))
        grad_CV.mul_(shares_C1 * head.scale)
        if slope is not None:
            grad_CV.mul_(slope)
        grad_CV = grad_CV.to(hidden_SH.dtype)
        if grad_hidden_SH is not None:
            torch.mm(grad_CV, weight, out=grad_hidden_SH[low : low + chunk])
        if grad_weight_VH is not None:
            _add_product(grad_weight_VH, grad_CV.t(), hidden_CH)
        if grad_bias_V is not None:
            grad_bias_V += grad_CV.sum(0)
    return loss


def _add_product(total_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    if total_VH.dtype == left_VC.dtype:
        total_VH.addmm_(left_VC, right_CH)
    else:  # bf16 products, fp32 sums
        total_VH += left_VC @ right_CH
