"""Libraries' heads and cross-entropies in one, for accelerators: used where, on the device at hand, one is right and faster.

Liger's Triton kernel (Hsu et al. 2024) and torch's `linear_cross_entropy` (2.13) sum cross-entropies that all count alike, of a
head without scale or cap. On a CPU neither is faster than `fullrank.sequences.head` (docs/LOG.md), so there they are not asked.

Shape legend: S predictions, H width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from fullrank.sequences.head import Head, SummedLoss, weighted_loss

#: Predictions of the trial.
_TRIAL = 1024
#: Largest difference of loss and gradients, relative to the largest number: sums of thousands of products in another order.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def with_fastest(head: Head, device: torch.device, dtype: torch.dtype) -> Head:
    """The head with the fastest sum of losses there is for it on a device; none where its own is.

    Args:
        head: of the model.
        device: an accelerator.
        dtype: that products are made in.
    """
    if head.scale != 1.0 or head.cap is not None:
        return head
    generator = torch.Generator().manual_seed(0)
    hidden_SH = torch.randn(_TRIAL, head.weight_VH.shape[1], generator=generator).to(device, dtype)
    targets_S = torch.randint(len(head.weight_VH), (_TRIAL,), generator=generator).to(device)
    weight_VH, bias_V = (None if p is None else p.detach().to(dtype) for p in (head.weight_VH, head.bias_V))
    given = [some.requires_grad_() for some in (hidden_SH, weight_VH, bias_V) if some is not None]
    wanted, fewest = _tried(_own, given, targets_S)
    best = head
    for loss in candidates():
        with contextlib.suppress(Exception):  # whatever a library or its compiler says
            found, seconds = _tried(loss, given, targets_S)
            pairs = zip(found, wanted, strict=True)
            if seconds < fewest and all((a - b).abs().max() <= _ROUNDING[dtype] * b.abs().max() for a, b in pairs):
                best, fewest = head._replace(summed=loss), seconds
    return best


def candidates() -> Iterator[SummedLoss]:
    """Those that are installed."""
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield lambda hidden_SH, targets_S, weight_VH, bias_V=None: liger(weight_VH, hidden_SH, targets_S, bias_V)
    if hasattr(nn.functional, "linear_cross_entropy"):
        yield torch_loss


def torch_loss(
    hidden_SH: torch.Tensor, targets_S: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None = None
) -> torch.Tensor:
    """Of torch, in chunks of its own choice."""
    options = nn.LinearCrossEntropyOptions()
    return nn.functional.linear_cross_entropy(
        hidden_SH, weight_VH, targets_S, linear_bias=bias_V, reduction="sum", options=options
    )


def _own(
    hidden_SH: torch.Tensor, targets_S: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None = None
) -> torch.Tensor:
    head = Head(cast(nn.Parameter, weight_VH), cast(nn.Parameter | None, bias_V), 1.0, None)
    return weighted_loss(head, hidden_SH, targets_S, torch.ones(len(targets_S), device=hidden_SH.device))


def _tried(loss: SummedLoss, given: list[torch.Tensor], targets_S: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """(loss and gradients, seconds of the faster of two passes after a first)."""
    hidden_SH, *parameters = given
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.enable_grad():
            total = loss(hidden_SH, targets_S, *parameters)
            found = [total.detach(), *torch.autograd.grad(total, given)]
        float(found[1].float().sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return found, min(seconds[1:])
