"""16-bit weights that compute in fp32, a block at a time: for devices that multiply bf16 slowly or not at all.

Weights are stored in 2 bytes. Whoever needs a unit's numbers opens it: its parameters then hold fp32 copies, which are the stored
numbers exactly, and closes it again: the copies are dropped and the stored tensors are back, the very same memory, whatever was
done to the copies. Units are the transformer blocks and the rest (embeddings, last norm, head), so no more than the rest and one
block need be wide at once, and arithmetic is that of an fp32 model with these weights, bit by bit.

An optimizer updates the stored tensors while their unit is closed. While a unit is open its gradients are fp32; they are taken
off before it is closed, since a tensor and its gradient are of one type.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from fullrank.models import pages
from fullrank.models.blocks import blocks_of

OUTSIDE: Final = "outside"
"""The unit of all parameters that are not one block's own."""
Unit = nn.Module | Literal["outside"]

_NARROW = (torch.bfloat16, torch.float16)


class Widened:
    """A model whose units are opened and closed; opened twice, a unit is closed by the second `close`.

    Args:
        model: on any device; its parameters in 16 bits are widened, wider ones stay as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        blocks = list(blocks_of(model) or ())
        within = {module for block in blocks for module in block.modules()}
        holders = Counter(p for block in blocks for p in block.parameters())
        holders.update(p for module in model.modules() if module not in within for p in module.parameters(recurse=False))
        self.units: list[Unit] = [*blocks, OUTSIDE]
        """In the order of a forward pass, the rest last."""
        self._parameters: dict[Unit, list[nn.Parameter]] = {
            block: [p for p in block.parameters() if holders[p] == 1] for block in blocks
        }
        own = {p for parameters in self._parameters.values() for p in parameters}
        self._parameters[OUTSIDE] = [p for p in model.parameters() if p not in own]
        self._opened: Counter[Unit] = Counter()
        self._stored: dict[Unit, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self._by_hand = self._passing = False
        self._by_hooks: list[nn.Module] = []

    def parameters(self, unit: Unit) -> list[nn.Parameter]:
        """Those that opening the unit widens (or would, were they narrow); every parameter of the model is in one unit."""
        return self._parameters[unit]

    def open(self, unit: Unit) -> None:
        """Has the unit's parameters hold fp32 copies of what is stored."""
        self._opened[unit] += 1
        if self._opened[unit] > 1:
            return
        narrow = [p for p in self._parameters[unit] if p.dtype in _NARROW]
        assert all(p.grad is None for p in narrow), "gradients of closed units are kept elsewhere"
        self._stored[unit] = []
        for p in narrow:
            self._stored[unit].append((p, p.data))
            p.data = pages.zeros(p.shape, torch.float32, p.device).copy_(p.data)

    def close(self, unit: Unit) -> None:
        """Has the unit's parameters hold what is stored, the same memory as before; the copies are dropped."""
        assert self._opened[unit], "only what is open is closed"
        if self._opened[unit] == 1:
            assert all(p.grad is None for p, _ in self._stored[unit]), "gradients are taken off before their unit is closed"
            for p, stored in self._stored.pop(unit):
                p.data = stored
        self._opened[unit] -= 1

    @contextlib.contextmanager
    def opened(self, unit: Unit) -> Iterator[None]:
        """Inside, the unit is open."""
        self.open(unit)
        try:
            yield
        finally:
            self.close(unit)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, the model's forward pass computes in fp32: the rest is open, each block while it computes.

        For passes without gradients: a backward pass needs a block's weights once more, after it was closed.
        """
        if self._by_hand or self._passing:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._passing = True
            stack.callback(setattr, self, "_passing", False)
            stack.enter_context(self.opened(OUTSIDE))
            for unit in self.units:
                if isinstance(unit, nn.Module):
                    stack.callback(unit.register_forward_pre_hook(self._before).remove)
                    stack.callback(unit.register_forward_hook(self._after, always_call=True).remove)
            yield

    @contextlib.contextmanager
    def manual(self) -> Iterator[None]:
        """Inside, `forward` does nothing: whoever entered opens and closes."""
        before, self._by_hand = self._by_hand, True
        try:
            yield
        finally:
            self._by_hand = before

    # A pass that is under way when `manual` is entered ends as it began: a block is closed where a hook had opened it.

    def _before(self, block: nn.Module, _: Any) -> None:
        if not self._by_hand:
            self.open(block)
            self._by_hooks.append(block)

    def _after(self, block: nn.Module, *_: Any) -> None:
        if block in self._by_hooks:
            self._by_hooks.remove(block)
            self.close(block)
