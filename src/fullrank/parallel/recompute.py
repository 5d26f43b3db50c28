"""Activations that are not kept: made again in the backward pass from what is.

selective   kept of a block: its input, what its matrix products and attention gave; the rest (norms, rotary angles, activation
            functions, products of elements) is made again, which costs passes over memory but no product (experts' grouped
            products excepted)
block       kept of a block: its input; the block is computed again (Chen et al. 2016, Training Deep Nets with Sublinear Memory
            Cost), a third more products
offload     as block, the input waiting in host memory (on a CPU the same as block)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from fullrank.parallel.draws import drawn, draws

Recompute = Literal["none", "selective", "block", "offload"]

#: What may be recomputed on a device, the least first. Beneath the compiled attention of an accelerator, selective recomputation
#: is unproven. Where steps go block by block (`fullrank.parallel.blockwise`), a block's input is all that is kept of it.
LADDER: dict[str, tuple[Recompute, ...]] = {
    "cpu": ("none", "selective", "block"),
    "mps": ("none", "block"),
    "cuda": ("none", "block", "offload"),
}
BLOCKWISE_LADDER: tuple[Recompute, ...] = ("block", "offload")


def ladder_of(device: str, engine: str, context: int = 1) -> tuple[Recompute, ...]:
    """What may be recomputed by an engine that takes a step row by row. FSDP2 gathers a block's weights by hooks that offloading
    would go around, and takes what DeepSpeed's hooks do for a part of the block that selective recomputation may keep; where
    `context` ranks share a row, attention is made of products like any other, and selective recomputation would keep all of their
    scores."""
    without = {"single": set(), "deepspeed": {"offload", "selective"}}.get(engine, {"offload"})
    return tuple(how for how in LADDER[device] if how not in (without if context == 1 else without | {"selective"}))


_aten = torch.ops.aten
#: Products, and attention as a CPU has it: elsewhere nothing is recomputed selectively (`fullrank.plan.stage`).
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute_blocks(model: PreTrainedModel, how: str) -> None:
    """Has every transformer block recompute as `how` says; `none` leaves the model as it is."""
    if how == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model, "activation_checkpointing_enable"):  # newer releases warn of the old name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if how == "offload":
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                vars(module)["_gradient_checkpointing_func"] = _offloaded


def _policy(_: SelectiveCheckpointContext, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(block: Callable[..., Any], hidden: torch.Tensor, *rest: Any) -> Any:
    """`block(hidden, *rest)`, of which only `hidden` is kept, in host memory.

    A block that is given more that needs a gradient (the last one, `fullrank.models.rows`) keeps its input where it is.
    """
    named = block.keywords if isinstance(block, functools.partial) else {}
    if any(isinstance(more, torch.Tensor) and more.requires_grad for more in (*rest, *named.values())):
        return checkpoint(block, hidden, *rest, use_reentrant=False)
    return _Offloaded.apply(lambda moved: block(moved, *rest), hidden)  # type: ignore[no-untyped-call]


class _Offloaded(torch.autograd.Function):
    """Recomputation whose input waits elsewhere."""

    @staticmethod
    def forward(ctx: Any, block: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        device = hidden.device
        ctx.block, ctx.device = block, device
        ctx.waiting = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=device.type == "cuda")
        ctx.waiting.copy_(hidden.detach(), non_blocking=True)
        ctx.draws = draws(device)
        ctx.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        with torch.no_grad():
            return block(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, torch.Tensor | None]:
        hidden = ctx.waiting.to(ctx.device, non_blocking=True).detach().requires_grad_()
        enabled, dtype = ctx.autocast
        with contextlib.ExitStack() as stack:
            stack.enter_context(drawn(ctx.device, ctx.draws))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled))
            out = ctx.block(hidden)
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [
            (some, grad) for some, grad in zip(outs, grads, strict=True) if isinstance(some, torch.Tensor) and grad is not None
        ]
        torch.autograd.backward([some for some, _ in pairs], [grad for _, grad in pairs])
        return None, hidden.grad
