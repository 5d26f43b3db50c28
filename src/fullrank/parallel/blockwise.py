"""The engine of little memory: a step goes through the model block by block, all rows through one block before the next.

Forward, row by row: nothing is kept but what enters each block. Backward, block by block from the top: each row's block is
computed again and differentiated, so that after the last row the block's gradient is whole, and the only one. It is then used and
dropped. Per parameter, rows are added in the order of the plain step (`fullrank.parallel.single`) with blocks recomputed, so the
gradients, and with them the weights, are bitwise the same where products are.

The norm by which gradients are clipped is known only when the last of them is there. Three ways to wait for it:

release     a first backward pass takes norms only, a second one updates: nothing is kept, blocks are differentiated twice
spill       gradients wait on a shelf (disk; host memory beside an accelerator): 4 bytes a parameter elsewhere, one pass
keep        gradients wait in memory

Without clipping, or with a rule that needs none, a gradient is used at once and there is one pass in any case. What is outside
the blocks (embeddings, last norm, head) is alive from the first row's head to the end: a tied embedding gets the last of its
gradient at the very end.

Relied on, and checked at every step: blocks are a list, each is called once in its order with the very output of the one before,
and nothing else that needs a gradient passes between them.

Shape legend: T tokens, H width of the hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fullrank.errors import ModelError
from fullrank.models import pages
from fullrank.models.blocks import blocks_of
from fullrank.models.rows import RowModel
from fullrank.models.widened import OUTSIDE, Unit
from fullrank.optim.shelf import Shelf
from fullrank.parallel.draws import Draws, drawn, draws
from fullrank.parallel.engine import StepOutcome
from fullrank.parallel.single import SingleDevice
from fullrank.recipe import Recipe, Train
from fullrank.sequences.layout import MicroBatch
from fullrank.sequences.loss import add_gradients

Gradients = dict[str, torch.Tensor]

_KEEP = "use machine.gradients=keep, with weights of fp32"


@dataclass
class _Call:
    """How a block was called for a row."""

    hidden_1TH: torch.Tensor | None
    """What entered it; None while it is on a shelf, and once it is not needed any more."""
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    draws: Draws | None
    """States of the generators, where the model draws."""


@dataclass
class _Row:
    """A row on its way through the model."""

    number: int
    """Within the step."""
    calls: list[_Call] = field(default_factory=list)
    start_1TH: torch.Tensor | None = None
    """What entered the first block, with the graph of what comes before it."""
    passed: torch.Tensor | None = None
    """What the last block called gave."""
    top_1TH: torch.Tensor | None = None
    """What the last block gave, a leaf whose gradient the head fills."""
    grad_1TH: torch.Tensor | None = None
    """Gradient of what the block gave that the backward pass comes to next."""


def is_blockwise(recipe: Recipe) -> bool:
    """Whether a recipe's steps go block by block: gradients do not stay in memory, or weights of 16 bits are widened by
    blocks."""
    return recipe.gradients != "keep" or recipe.train.rounding != "none"


class Blockwise(SingleDevice):
    """See `fullrank.parallel.engine.Engine` for what is promised.

    Args:
        rows: the model on the device, as it takes rows; weights in fp32, or bf16, on a CPU widened (`fullrank.models.widened`).
        train: the recipe's training section, `precision` resolved.
        gradients: keep, release or spill.
        states: where optimizer states wait between updates; None for the device.
        spilled: where gradients wait that are spilled.
        inputs: where the blocks' inputs wait; None for the device.

    Raises:
        ModelError: the model's blocks cannot be told apart.
    """

    def __init__(
        self,
        rows: RowModel,
        train: Train,
        *,
        gradients: str,
        states: Shelf | None = None,
        spilled: Shelf | None = None,
        inputs: Shelf | None = None,
    ) -> None:
        super().__init__(rows, train, recompute="none", states=states)
        self.recompute = "block" if inputs is None else "offload"
        self._gradients, self._spilled, self._inputs = gradients, spilled, inputs
        self._shelves += [shelf for shelf in (spilled, inputs) if shelf is not None]
        blocks = blocks_of(self.model)
        if blocks is None:
            raise ModelError("this model's blocks are not a list, so its gradients cannot be released one by one", hint=_KEEP)
        self._blocks = list(blocks)
        names = {id(p): name for name, p in self._named.items()}
        owned = [[names[id(p)] for p in block.parameters() if id(p) in names] for block in self._blocks]
        self._owned = [list(dict.fromkeys(own)) for own in owned]
        inside = [name for own in self._owned for name in own]
        if len(inside) != len(set(inside)):
            raise ModelError("blocks of this model share weights, so no block's gradient is whole before the end", hint=_KEEP)
        self._outside = [name for name in self._named if name not in set(inside)]
        self._forwards: list[Callable[..., Any]] = []

    def compute_type(self) -> contextlib.AbstractContextManager[object]:
        """Autocast without its cache, which would keep a copy of every block's weights through a row."""
        if self._precision == "bf16-mixed":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    # ---- the step -----------------------------------------------------------------------------------------------------

    def step(
        self, micro_batches: Iterable[MicroBatch], supervised_tokens: int, *, learning_rate: float, seed: int
    ) -> StepOutcome:
        self.model.train()
        torch.manual_seed(seed)
        self._updater.reset_changed()
        loss = torch.zeros((), device=self.device)
        rows: list[_Row] = []
        try:
            with self._by_hand(), self.rows.ready(), self._intercepted():
                outside: Gradients = {}
                with self._wide(OUTSIDE):
                    self._make_room_for_the_heads_gradient()
                    for batch in micro_batches:
                        if len(batch.targets_S):
                            rows.append(row := _Row(len(rows)))
                            loss += self._forward(row, batch.to(self.device), supervised_tokens)
                            self._fold(self._outside, outside)
                    self._take(self._outside, outside)
                return self._backward(rows, float(loss), outside, learning_rate, seed)
        finally:
            for p in self._named.values():
                p.grad = None

    def _backward(self, rows: list[_Row], loss: float, outside: Gradients, learning_rate: float, seed: int) -> StepOutcome:
        if not math.isfinite(loss):
            return StepOutcome(loss, math.nan, updated=False)
        at_once = self._max_grad_norm is None and self._gradients != "keep"
        twice = not at_once and self._gradients == "release"
        norms: dict[str, torch.Tensor] = {}
        kept: Gradients = {}
        for gradients in self._through(rows, outside, again=twice):
            norms.update((name, torch.linalg.vector_norm(gradient)) for name, gradient in gradients.items())
            if at_once:
                if not all(bool(norms[name].isfinite()) for name in gradients):
                    return StepOutcome(loss, math.nan, updated=False)
                self._update(gradients, learning_rate, seed)
            elif self._spilled is not None and gradients is not outside:
                for name, gradient in gradients.items():
                    self._spilled.put(name, gradient)
            elif not twice:
                kept.update(gradients)
        norm = self._norm(norms)
        if not math.isfinite(norm) or at_once:
            return StepOutcome(loss, norm, updated=at_once, changed_ratio=self._changed_ratio())
        waiting: Iterable[Gradients]
        if twice:
            waiting = itertools.chain(self._through_blocks(rows, again=False), [outside])
        else:
            waiting = [kept] if self._spilled is None else itertools.chain(self._from_shelf(self._spilled, set(norms)), [outside])
        for gradients in waiting:
            self._update(gradients, learning_rate, seed, norm)
        return StepOutcome(loss, norm, updated=True, changed_ratio=self._changed_ratio())

    def _from_shelf(self, shelf: Shelf, found: set[str]) -> Iterator[Gradients]:
        """The blocks' gradients as they went there, each block's read while the one before is used."""
        units = [[name for name in unit if name in found] for unit in reversed(self._owned)]
        shelf.fetch(units[0])
        for unit, following in zip(units, [*units[1:], []], strict=True):
            shelf.fetch(following)
            yield {name: shelf.get(name) for name in unit}

    def _make_room_for_the_heads_gradient(self) -> None:
        """It is the largest there is, and lives through the step: not in the heap, among what comes and goes."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is not None and weight.requires_grad and weight.dtype in (torch.float32, torch.float64):
            weight.grad = pages.zeros(weight.shape, weight.dtype, weight.device)

    # ---- forward ------------------------------------------------------------------------------------------------------

    def _forward(self, row: _Row, batch: MicroBatch, supervised_tokens: int) -> torch.Tensor:
        """A row's share of the loss; the head's gradients are then there."""
        self._row = row
        with self.compute_type():
            loss = add_gradients(self.rows, batch, supervised_tokens, self.watch)
        if len(row.calls) != len(self._blocks):
            raise ModelError(f"{len(row.calls)} of this model's {len(self._blocks)} blocks were called", hint=_KEEP)
        row.passed = None
        return loss

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Inside, blocks are computed without a graph, and how they were called is noted."""
        before = [block.__dict__.get("forward") for block in self._blocks]
        self._forwards = [block.forward for block in self._blocks]
        for level, block in enumerate(self._blocks):
            block.forward = functools.partial(self._call, level)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _call(self, level: int, hidden_1TH: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        row = self._row
        if level != len(row.calls) or (level and hidden_1TH is not row.passed):
            raise ModelError("this model does more between its blocks than pass hidden states on", hint=_KEEP)
        if any(isinstance(some, torch.Tensor) and some.requires_grad for some in (*arguments, *named.values())):
            raise ModelError("this model's blocks are given more than hidden states that needs a gradient", hint=_KEEP)
        if level == 0:
            row.start_1TH = hidden_1TH if hidden_1TH.requires_grad else None
        hidden_1TH = hidden_1TH.detach()
        call = _Call(hidden_1TH, arguments, named, draws(self.device) if self.rows.drops else None)
        row.calls.append(call)
        if self._inputs is not None:
            self._inputs.put(_input_name(level, row), hidden_1TH)
            call.hidden_1TH = None
        with self._wide(self._blocks[level]), torch.no_grad():
            out = self._forwards[level](hidden_1TH, *arguments, **named)
        first = out[0] if isinstance(out, tuple) else out
        if level == len(self._blocks) - 1:
            first = row.top_1TH = first.detach().requires_grad_()
        row.passed = first
        return (first, *out[1:]) if isinstance(out, tuple) else first

    # ---- backward -----------------------------------------------------------------------------------------------------

    def _through(self, rows: list[_Row], outside: Gradients, *, again: bool) -> Iterator[Gradients]:
        """The whole gradients of all units: the blocks from the top, then what is outside."""
        yield from self._through_blocks(rows, again=again)
        with self._wide(OUTSIDE), self.watch("backward"):
            for name, gradient in outside.items():
                if gradient.dtype == self._named[name].dtype:
                    self._named[name].grad = gradient
            for row in rows:
                if row.start_1TH is not None:
                    torch.autograd.backward(row.start_1TH, row.grad_1TH)
                    row.start_1TH = None
                    self._fold(self._outside, outside)
            self.rows.settle()
            self._take(self._outside, outside)
        yield outside

    def _through_blocks(self, rows: list[_Row], *, again: bool) -> Iterator[Gradients]:
        """The whole gradient of each block, from the last to the lowest that is trained or has something trained below it.

        Args:
            again: whether there will be another pass, for which the blocks' inputs must stay.
        """
        for row in rows:
            row.grad_1TH = row.top_1TH.grad if row.top_1TH is not None else None
            if not again:
                row.top_1TH = None
        trained = [level for level, own in enumerate(self._owned) if own]
        lowest = 0 if any(row.start_1TH is not None for row in rows) else trained[0] if trained else len(self._blocks)
        for level in reversed(range(lowest, len(self._blocks))):
            gradients: Gradients = {}
            with self._wide(self._blocks[level]), self.watch("backward"):
                for n, row in enumerate(rows):
                    if self._inputs is not None:
                        following = (level, rows[n + 1]) if n + 1 < len(rows) else (level - 1, rows[0])
                        self._inputs.fetch([_input_name(*following)] if following[0] >= lowest else [])
                    self._through_block(level, row)
                    if not again:
                        row.calls[level].hidden_1TH = None
                    self._fold(self._owned[level], gradients)
                self._take(self._owned[level], gradients)
            yield gradients

    def _through_block(self, level: int, row: _Row) -> None:
        """Adds to the gradients of a block's parameters; the row's becomes that of what entered the block."""
        call = row.calls[level]
        kept_1TH = call.hidden_1TH
        if kept_1TH is None:
            assert self._inputs is not None
            kept_1TH = self._inputs.get(_input_name(level, row))
        hidden_1TH = kept_1TH.detach().requires_grad_()
        with torch.enable_grad(), drawn(self.device, call.draws), self.compute_type():
            out = self._forwards[level](hidden_1TH, *call.arguments, **call.named)
        torch.autograd.backward(out[0] if isinstance(out, tuple) else out, row.grad_1TH)
        row.grad_1TH = hidden_1TH.grad

    def _fold(self, names: Iterable[str], into: Gradients) -> None:
        """Takes in what a row added: gradients of 16 bits are summed over rows in fp32."""
        for name in names:
            gradient = self._named[name].grad
            if gradient is None:
                continue
            if gradient.dtype in (torch.float32, torch.float64):
                into[name] = gradient  # where it is, the next row adds to it
            else:
                into[name] = into[name].add_(gradient) if name in into else gradient.float()
                self._named[name].grad = None

    def _take(self, names: Iterable[str], into: Gradients) -> None:
        self._fold(names, into)
        for name in names:
            self._named[name].grad = None

    # ---- weights of 16 bits, widened while they are computed with ---------------------------------------------------------

    def _by_hand(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.rows.widened is None else self.rows.widened.manual()

    @contextlib.contextmanager
    def _wide(self, unit: Unit) -> Iterator[None]:
        """Inside, a unit computes; gradients are to be taken off before the end."""
        widened = self.rows.widened
        if widened is None:
            yield
            return
        widened.open(unit)
        try:
            yield
        finally:
            for p in widened.parameters(unit):
                p.grad = None
            widened.close(unit)


def _input_name(level: int, row: _Row) -> str:
    return f"{row.number}.{level}"
